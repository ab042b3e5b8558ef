"""Budgets in percent count from plain export's file where that is clearly faster than ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.passes.cut.export import plain_export, to_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline import plain as plain_module
from sluice.pipeline.compress import compress, sweep
from sluice.pipeline.pairs import APART, REBUILT, PairTimes, is_faster
from sluice.pipeline.plain import counted_from, plain_share
from sluice.profiler.profile import profile_onnx
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close
from tests import tiny
from tests.device import FakeRunner, chain, profile_on
from tests.exported import run

DENSE, FASTER, LITTLE = chain([62, 36, 20], batch="N"), chain([62, 35, 20]), chain([62, 36, 19])


class Keywords(nn.Module):
    """Takes a number beside its tensors, and its tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(7, 5), nn.Dropout(0.9)

    def forward(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        return factor * self.drop(self.fc(x)) + y


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_plain_export_at_the_batch_of_the_deployment(batch: int) -> None:
    model, inputs = Keywords().train(), {"y": torch.randn(3, 5), "x": torch.randn(3, 7), "factor": 2.0}
    file = plain_export(model, inputs, batch)
    assert file is not None and model.training
    shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in file.graph.input}
    assert shapes == {"x": [batch, 7], "y": [batch, 5]}
    x, y = torch.randn(batch, 7), torch.randn(batch, 5)
    with torch.no_grad():
        want = model.eval()(x, y, 2.0).numpy()
    (found,) = run(file, {"x": x.numpy(), "y": y.numpy()}).values()
    assert_close(found, want)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x.nonzero()


def test_what_cannot_be_exported_is_no_reference() -> None:
    assert plain_export(Branches(), torch.randn(3, 5), 3) is None


def profiled(monkeypatch: pytest.MonkeyPatch, **form: Any) -> Profile:
    profile_on(lambda target, threads=1: FakeRunner(), monkeypatch)
    return profile_onnx(DENSE, deployment=Deployment(batch=2, **form), progress=False)


def found(plain: onnx.ModelProto | None, monkeypatch: pytest.MonkeyPatch, **form: Any) -> PairTimes | None:
    profile = profiled(monkeypatch, **form)
    monkeypatch.setattr("sluice.passes.cut.export.plain_export", lambda *_: plain)
    return plain_share(profile, nn.Identity(), torch.zeros(2), DENSE)


def test_a_faster_file_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = found(FASTER, monkeypatch)
    assert times is not None and times.runs == times.dense_runs == 1
    share = FakeRunner().ms(FASTER) / FakeRunner().ms(DENSE)
    assert times.share == pytest.approx(share) and 0.9 < share < 1.0 - APART
    assert is_faster(times)
    assert counted_from(times, BudgetSpec.parse("40%")).ms(5.0) == pytest.approx(0.4 * share * 5.0)
    assert counted_from(times, BudgetSpec.parse("40ms")) == BudgetSpec.parse("40ms")


def test_less_than_the_comparison_is_uncertain_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times, budget = found(LITTLE, monkeypatch), BudgetSpec.parse("40%")
    assert times is not None and 1.0 - APART - REBUILT < times.share < 1.0
    assert not is_faster(times) and counted_from(times, budget) is budget
    assert not is_faster(replace(times, slim_ms=0.9 * times.dense_ms, uncertainty=0.2))
    assert not is_faster(None) and counted_from(None, budget) is budget


def test_a_file_of_our_structure_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module.Pairs, "once", lambda *_: pytest.fail("measured"))
    times = found(finalize(DENSE), monkeypatch)
    assert times is not None and times.share == 1.0 and times.runs == 0


def test_where_nothing_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(None, monkeypatch) is None
    assert found(FASTER, monkeypatch, precision="fp16") is None


def test_compress_keeps_a_budget_that_counts_from_the_plain_file(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = to_onnx(tiny.other_model(), tiny.inputs())
    monkeypatch.setattr("sluice.passes.cut.export.plain_export", lambda *_: smaller)
    settings: dict[str, Any] = dict(
        data=tiny.data(), table=tiny.table_in(tmp_path_factory.mktemp("t")), batch=tiny.BATCH, methods=("filter",),
        epochs=0, progress=False,
    )  # fmt: skip
    with tiny.simulated_device():
        report = compress(tiny.model(), tiny.inputs(), budget="70%", **settings).report
        ((_, swept),) = sweep(tiny.model(), tiny.inputs(), budgets=["70%"], **settings)
        absolute = compress(tiny.model(), tiny.inputs(), budget=f"{0.7 * report.dense_ms}ms", **settings).report
    assert report.plain_ms is not None and 0.8 * report.dense_ms < report.plain_ms < 0.95 * report.dense_ms
    for one in (report, swept.report):
        assert one.from_plain and one.met()
        assert one.budget_ms == pytest.approx(0.7 * report.plain_ms)
    assert absolute.budget_ms == pytest.approx(0.7 * report.dense_ms)
