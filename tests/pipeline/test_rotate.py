"""`compress(rotate=True)` changes the basis of attention first, and what comes out computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sluice.artifacts.check import check
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


def test_dimensions_of_heads_are_cut_where_the_basis_sorts_them(tmp_path: Path) -> None:
    model, (x,) = sequence("fused, by hand")
    data = [(torch.randn_like(x), torch.tensor([0, 1, 2])) for _ in range(2)]
    found = {}
    for rotate in (False, True):
        with tiny.simulated_device():
            done = compress(
                model, (x,), budget="55%", data=data, table=tmp_path / f"{rotate}.db", batch=tiny.BATCH, epochs=0,
                rehearsal=0.0, methods=("filter",), rotate=rotate, progress=False, out=tmp_path / str(rotate),
            )  # fmt: skip
        found[rotate] = {group.name: (group.dense, group.kept) for group in done.report.groups}
        assert done.report.measured_ms is not None and done.report.measured_ms <= done.report.budget_ms
        assert max(check(model, tmp_path / str(rotate)).values()) < 1e-5
    heads, dims = "attention.qkv", "attention.qkv#2"
    assert dims not in found[False] and found[True][dims][0] == 4
    assert found[False][heads][0] == found[True][heads][0] == 3
    assert found[True][dims][1] < 4 or found[True][heads][1] < 3
