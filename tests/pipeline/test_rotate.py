"""`compress(rotate=True)` changes the basis of attention first, and what comes out computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sluice.pipeline.compress import compress
from sluice.runtime.base.compare import relative_error
from tests import tiny
from tests.sequences import sequence


@pytest.mark.parametrize("rotate", [False, True])
def test_a_budget_that_is_met_hands_out_the_changed_weights(rotate: bool, tmp_path: Path) -> None:
    model, (x,) = sequence("sdpa")
    data = [(torch.randn_like(x), torch.tensor([0, 1, 2])) for _ in range(2)]
    with tiny.simulated_device():
        done = compress(
            model, (x,), budget="1e3ms", data=data, table=tmp_path / "t.db", batch=tiny.BATCH, epochs=0, rehearsal=0.0,
            methods=("filter",), rotate=rotate, progress=False,
        )  # fmt: skip
    found, own = done.module.state_dict(), model.state_dict()
    with torch.no_grad():
        assert relative_error(done.module(x), model(x)) < 1e-5
    assert bool((found["attention.v.bias"] == 0.0).all()) is rotate
    assert torch.equal(found["attention.v.weight"], own["attention.v.weight"]) is not rotate
