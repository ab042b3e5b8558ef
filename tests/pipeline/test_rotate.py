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
    """Of four dimensions of every head two say what the other two say: nothing is lost without them."""
    model, (x,) = sequence("sdpa")
    with torch.no_grad():
        for layer in (model.attention.q, model.attention.k, model.attention.v):
            for tensor in (layer.weight, layer.bias):
                heads = tensor.view(3, 4, *tensor.shape[1:])
                heads[:, 2:] = heads[:, :2].flip(1) / 2
    torch.manual_seed(0)
    data = [(torch.randn_like(x), torch.tensor([0, 1, 2])) for _ in range(2)]
    kept, error = {}, {}
    for rotate in (False, True):
        with tiny.simulated_device():
            done = compress(
                model, (x,), budget="75%", data=data, table=tmp_path / f"{rotate}.db", batch=tiny.BATCH, epochs=0,
                rehearsal=0.0, methods=("filter",), rotate=rotate, progress=False, out=tmp_path / str(rotate),
            )  # fmt: skip
        kept[rotate] = {group.name: group.kept for group in done.report.groups if "attention" in group.name}
        assert done.report.measured_ms is not None and done.report.measured_ms <= done.report.budget_ms
        assert max(check(model, tmp_path / str(rotate)).values()) < 1e-5
        with torch.no_grad():
            error[rotate] = relative_error(done.module(x), model(x))
    assert kept == {False: {"attention.q": 2}, True: {"attention.q": 3, "attention.q#2": 2, "attention.v": 2}}
    assert error[True] < 1e-3 < 0.1 < error[False]
