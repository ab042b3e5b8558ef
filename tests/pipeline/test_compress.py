from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import sluice
from sluice.artifacts.check import check, check_deployed
from sluice.artifacts.deploy import as_module
from sluice.artifacts.engine_check import EngineCheck
from sluice.artifacts.report import Report
from sluice.artifacts.result import Compressed
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.gates.gating import insert_gates
from sluice.passes.graph.onnx_file import buffers_of, finalize
from sluice.pipeline import prepare, verify
from sluice.pipeline.bsr import BeamProblem
from sluice.pipeline.compress import compress, sweep
from sluice.pipeline.finish import finish
from sluice.pipeline.one_shot import plan_one_shot
from sluice.pipeline.pairs import structure
from sluice.pipeline.problem import Problem
from sluice.pipeline.recipe import Recipe
from sluice.profiler.survey import complete_points
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import Runner
from sluice.runtime.ort.cpu import OrtRunner
from sluice.solver.decide import least_ms
from sluice.solver.options import METHODS
from sluice.training.budget import Budget
from sluice.training.recovery import Recovery
from sluice.training.train import Data
from tests import tiny
from tests.device import profile_on

BUDGET = "70%"


@pytest.fixture(autouse=True, scope="module")
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.table_in(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def measured(table: Path) -> Profile:
    return sluice.profile(tiny.model(), tiny.inputs(), table, batch=tiny.BATCH, progress=False)


def test_a_profile_rests_on_what_was_measured(measured: Profile) -> None:
    """The least configuration is measured, and engines on the way there calibrate: a budget's bounds are no guess."""
    latency, table = measured.latency, measured.bench.table
    least = least_ms(latency)
    assert measured.knows(latency.dense) and measured.knows(least.widths)
    assert len(table.engines(measured.model_key)) > 2
    assert measured.coverage.points < measured.coverage.complete
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=3)
    assert Budget(gated, measured, BUDGET).dense_ms == latency.dense_ms()


def test_a_complete_profile_needs_no_more() -> None:
    measured = sluice.profile(
        tiny.model(), tiny.inputs(), batch=tiny.BATCH, methods=("filter",), complete=True, progress=False
    )
    points, complete = measured.coverage.points, measured.coverage.complete
    assert points >= complete
    assert all(measured.bench.table.get(slot.part.key, at) for slot, at in complete_points(measured.layout))


@pytest.fixture(scope="module", params=[0, 3], ids=["one-shot", "gates"])
def compressed(
    request: pytest.FixtureRequest, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Compressed, Path]:
    out = tmp_path_factory.mktemp("out") / "deep" / "slim"
    done = compress(
        tiny.model(), tiny.inputs(), budget=BUDGET, data=tiny.data(), table=table, out=out, batch=tiny.BATCH,
        methods=("filter",), gate_epochs=request.param, epochs=2, evaluate=accuracy, progress=False,
    )  # fmt: skip
    return done, out


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float(np.mean([float((model(x).argmax(1) == y).float().mean()) for x, y in tiny.data()]))


def test_the_budget_is_met_and_used(compressed: tuple[Compressed, Path]) -> None:
    report = compressed[0].report
    assert report.met() and report.measured_ms is not None
    assert report.budget_ms == pytest.approx(0.7 * report.dense_ms)
    assert 0.8 * report.budget_ms < report.measured_ms <= report.budget_ms
    assert report.promised_ms == pytest.approx(report.measured_ms, rel=0.02)


def test_every_field_of_the_report_is_filled(compressed: tuple[Compressed, Path]) -> None:
    done, _ = compressed
    report = done.report
    for field in fields(Report):
        if field.name in ("edits", "readings", "metric_deployed", "least"):  # widths alone, fp32 and a budget have none
            continue
        assert getattr(report, field.name) not in (None, (), {}), field.name
    assert 0 <= report.parity_max_rel < 1e-5  # type: ignore[operator]
    assert report.params_dense == sum(p.numel() for p in tiny.model().parameters())
    assert report.params_slim == sum(p.numel() for p in done.module.parameters()) < report.params_dense
    assert 0 < report.macs_slim < report.macs_dense
    assert 1 <= report.rounds <= 4 and report.seconds > 0
    assert report.metric_dense == accuracy(tiny.model()) and report.metric_slim == accuracy(done.module)
    assert {(g.name, g.dense) for g in report.groups} == {("conv1", 10), ("conv2", 13)}
    assert {g.name: g.kept for g in report.groups} == dict(done.plan.widths)
    assert report.fingerprint["batch"] == tiny.BATCH
    assert dict(report.skipped).keys() == {"fc"}
    # What the parts save adds up to something.
    before, after = (sum(getattr(row, name) for row in report.pieces) for name in ("ms_before", "ms_after"))
    assert after < before


def test_the_report_on_disk_is_the_report(compressed: tuple[Compressed, Path]) -> None:
    done, out = compressed
    names = ["manifest.json", "plan.json", "report.json", "slim.onnx", "slim.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert Report.from_json((out / "report.json").read_text()) == done.report
    assert json.loads((out / "report.json").read_text())["version"] == 8
    assert Plan.load(out / "plan.json") == done.plan


def test_what_is_loaded_is_what_is_deployed(compressed: tuple[Compressed, Path]) -> None:
    done, out = compressed
    loaded = sluice.load(tiny.Tiny, out)
    engine = OrtRunner().build(onnx.load(out / "slim.onnx"))
    for batch in (1, tiny.BATCH, 5):
        x = tiny.inputs(batch)
        (found,) = engine.run({engine_input(out): x.numpy()}).values()
        with torch.no_grad():
            assert_close(found, loaded(x), tol=1e-5)
            assert_close(done.module(x), loaded(x), tol=1e-6)
    widths = dict(done.plan.widths)
    assert loaded.get_parameter("conv1.weight").shape == (widths["conv1"], 3, 3, 3)
    assert loaded.get_parameter("conv2.weight").shape == (widths["conv2"], widths["conv1"], 3, 3)


class Columns(nn.Module):
    """(N, 3, 40, 1) to (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(k, n, (9, 1), padding=(4, 0)) for k, n in ((3, 10), (10, 13)))
        self.fc = nn.Linear(13, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def test_the_file_has_the_paddings_of_the_engine_that_was_verified(tmp_path: Path) -> None:
    model = Columns()
    inputs = torch.randn(tiny.BATCH, 3, 40, 1)
    done = compress(
        model, inputs, budget=BUDGET, data=[(inputs, torch.tensor([0, 1, 2]))], out=tmp_path, batch=tiny.BATCH,
        methods=("filter",), epochs=0, progress=False,
    )  # fmt: skip
    file = onnx.load(tmp_path / "slim.onnx")
    assert file == done.onnx == done.deployed
    assert [node.op_type for node in file.graph.node].count("Pad") == 2
    assert done.report.dense_runs == done.report.rounds  # a file of another structure would be measured once more
    with torch.no_grad():
        (found,) = OrtRunner().build(file).run({file.graph.input[0].name: inputs.numpy()}).values()
        assert_close(found, done.module(inputs))


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_another_precision(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, engines and the deployed file have it; the fp32 file beside that still is what the plan gives."""
    built: list[onnx.ModelProto] = []

    def counted(build: Callable[..., Any]) -> Callable[..., Any]:
        def counting(self: OrtRunner, model: Any, **options: Any) -> Any:
            built.append(model)
            return build(self, model, **options)

        return counting

    monkeypatch.setattr(OrtRunner, "build", counted(OrtRunner.build))
    monkeypatch.setattr(OrtRunner, "build_part", counted(OrtRunner.build_part))
    done = compress(
        tiny.model(), tiny.inputs(), budget=BUDGET, data=tiny.data(), table=tmp_path / "t.db", out=tmp_path / "out",
        batch=tiny.BATCH, methods=("filter",), precision=precision, epochs=1, rehearsal=0, evaluate=accuracy,
        progress=False,
    )  # fmt: skip
    report, file = done.report, onnx.load(tmp_path / "out" / f"slim.{precision}.onnx")
    assert report.met() and report.fingerprint["precision"] == precision
    assert file == done.deployed != done.onnx and structure(file) in {structure(model) for model in built}
    assert report.metric_deployed == accuracy(as_module(file))
    assert report.engine_error is not None and report.engine_tolerance is not None
    assert 0 < report.engine_error < report.engine_tolerance < 1
    narrow = {"int8": (onnx.TensorProto.UINT8, onnx.TensorProto.INT8), "fp16": (onnx.TensorProto.FLOAT16,)}[precision]
    pieces = [m for m in built if m.graph.input[0].type.tensor_type.elem_type in narrow]
    assert len(pieces) > 10
    assert max(check(tiny.model(), tmp_path / "out").values()) < 1e-5
    assert [(name, like.same) for name, like in check_deployed(tmp_path / "out").items()] == [
        (f"slim.{precision}.onnx", True)
    ]
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == report


def test_an_engine_of_another_network_is_an_error_and_the_result_is_saved(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.pipeline.finish.engine_check", lambda *_: EngineCheck(float("inf"), 0.1, runtime=True))
    with pytest.raises(SluiceError, match="the relative error of its outputs is inf, of which the precision explains"):
        compress(
            tiny.model(), tiny.inputs(), budget=BUDGET, data=tiny.data(), table=table, out=tmp_path / "out",
            batch=tiny.BATCH, methods=("filter",), epochs=0, rehearsal=0, progress=False,
        )  # fmt: skip
    report = Report.load(tmp_path / "out" / "report.json")
    assert (report.engine_error, report.engine_tolerance) == (None, 0.1)


def test_what_may_fail_with_a_precision_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging the deployed file, for one; and a network whose figure is no number has a report all the same."""

    def cannot_judge(model: nn.Module) -> float:
        raise RuntimeError("no such attribute")

    monkeypatch.setattr("sluice.pipeline.recover.fit", lambda *args, **options: pytest.fail("trained"))
    settings: dict[str, Any] = dict(
        budget=BUDGET, data=tiny.data(), table=tmp_path / "t.db", batch=tiny.BATCH, methods=("filter",),
        precision="int8", rehearsal=0, progress=False,
    )  # fmt: skip
    with pytest.raises(SluiceError, match="evaluate raised RuntimeError: no such attribute"):
        compress(tiny.model(), tiny.inputs(), epochs=1, evaluate=cannot_judge, **settings)
    done = compress(
        tiny.model(), tiny.inputs(), epochs=0, evaluate=lambda model: float("nan"), out=tmp_path / "out", **settings
    )
    assert done.report.metric_deployed is None
    assert (tmp_path / "out" / "slim.int8.onnx").exists()


def test_a_file_of_another_precision_does_not_stay(compressed: tuple[Compressed, Path], tmp_path: Path) -> None:
    done, _ = compressed
    stale = tmp_path / "slim.int8.onnx"
    stale.write_bytes(b"\x08\x0a\x12of another plan")
    done.save(tmp_path)
    assert not stale.exists() and (tmp_path / "slim.onnx").exists()


def test_sweeps_say_what_cannot_be_reached_before_pricing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the units are in which the budgets are given."""
    settings: dict[str, Any] = dict(
        data=tiny.data(), table=table, batch=tiny.BATCH, methods=("filter",), progress=False
    )  # fmt: skip
    with pytest.raises(SluiceError, match="there are no budgets"):
        next(sweep(tiny.model(), tiny.inputs(), budgets=[], **settings))
    monkeypatch.setattr(prepare, "price_problem", lambda *args, **options: pytest.fail("priced"))
    with pytest.raises(SluiceError, match="cannot be met"):
        next(sweep(tiny.model(), tiny.inputs(), budgets=["90%", "0.000001ms"], **settings))


def test_int8_without_data_is_refused_before_anything_is_trained() -> None:
    measured = sluice.profile(tiny.model(), tiny.inputs(), batch=tiny.BATCH, precision="int8", progress=False)
    gated = insert_gates(tiny.model(), tiny.inputs())
    scores = {group.name: np.ones(group.size) for group in gated.meta["space"].analysis.groups}
    with pytest.raises(SluiceError, match="int8 is calibrated on data; give data="):
        finish(gated, Budget(gated, measured, BUDGET), importance=scores, progress=False)


def engine_input(out: Path) -> str:
    return str(onnx.load(out / "slim.onnx").graph.input[0].name)


def test_fine_tuning_moves_the_weights(measured: Profile) -> None:
    def finished(epochs: int) -> Compressed:
        gated = insert_gates(tiny.model(), tiny.inputs())
        scores = {site: np.arange(1.0, 1.0 + gate.size) for site, gate in gated.gates.items()}
        budget = Budget(gated, measured, BUDGET)
        recovery = Recovery(compensate=False)
        return finish(
            gated, budget, importance=scores, data=tiny.data(), epochs=epochs, recovery=recovery, progress=False
        )

    plain, tuned = finished(0), finished(1)
    assert plain.plan == tuned.plan
    dense = tiny.model()
    (keep,) = [s.keep for s in plain.plan.slices if (s.param, s.axis) == ("conv1.weight", 0)]
    assert keep == tuple(range(10 - len(keep), 10))  # the largest scores
    assert torch.equal(plain.module.get_parameter("conv1.weight"), dense.conv1.weight[list(keep)])
    assert not torch.equal(tuned.module.get_parameter("conv1.weight"), dense.conv1.weight[list(keep)])
    assert plain.report.metric_dense is None and plain.report.metric_slim is None


def test_an_own_loop_ends_in_finish(measured: Profile) -> None:
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=12).train()
    budget = Budget(gated, measured, BUDGET)
    optimizer = torch.optim.Adam(gated.parameters(), lr=0.02)
    for x, y in 2 * tiny.data():
        loss = nn.functional.cross_entropy(gated(x), y) + budget.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gated.step()
    done = finish(gated, budget, progress=False)
    assert done.report.met() and not done.module.training


def test_a_budget_without_a_profile_cannot_be_measured(measured: Profile) -> None:
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=3)
    with pytest.raises(SluiceError, match="no profile"):
        finish(gated, Budget(gated, measured.latency, BUDGET))


def test_excluded_layers_keep_their_width(tmp_path: Path) -> None:
    done = compress(
        tiny.model(), tiny.inputs(), budget="80%", data=tiny.data(), batch=tiny.BATCH, exclude=["conv1"],
        methods=("filter",), gate_epochs=0, epochs=0, progress=False,
    )  # fmt: skip
    assert set(done.plan.widths) == {"conv2"} and done.plan.widths["conv2"] < 13
    assert "excluded" in dict(done.report.skipped)["conv1"]


@pytest.mark.parametrize("methods", [("filter",), METHODS])
@pytest.mark.parametrize("data", [tiny.data, tiny.data_without_labels])
def test_a_proposal_is_the_one_shot_plan(methods: tuple[str, ...], data: Callable[[], Data], table: Path) -> None:
    found = plan_one_shot(
        tiny.model(), tiny.inputs(), budget=BUDGET, data=data(), table=table, deployment=Deployment(batch=tiny.BATCH),
        methods=methods, progress=False,
    )  # fmt: skip
    assert found.budget_ms == pytest.approx(0.7 * found.dense_ms)
    assert found.promised_ms <= found.budget_ms * (1 + 1e-6)
    assert 0 < found.retained < 1
    slim = sluice.load(tiny.model, found.plan)
    assert slim(tiny.inputs()).shape == (tiny.BATCH, 5)


def test_a_proposal_needs_no_device(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"budget": BUDGET, "data": tiny.data(), "table": table, "methods": ("filter",)}
    here = Deployment(batch=tiny.BATCH)
    expected = plan_one_shot(tiny.model(), tiny.inputs(), **asked, deployment=here, progress=False)

    def absent(target: str, *rest: object) -> Runner:
        raise SluiceError(f"the target {target!r} cannot run here")

    profile_on(absent, monkeypatch)
    assert plan_one_shot(tiny.model(), tiny.inputs(), **asked, deployment=here, progress=False) == expected
    with pytest.raises(SluiceError, match="cannot run here"):  # whose engines must be measured
        compress(tiny.model(), tiny.inputs(), **asked, batch=tiny.BATCH, progress=False)


def test_the_users_model_is_not_changed(table: Path) -> None:
    model = tiny.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(
        model, tiny.inputs(), budget=BUDGET, data=tiny.data_without_labels(), table=table, batch=tiny.BATCH,
        gate_epochs=1, epochs=1, progress=False,
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def residual_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.table_in(tmp_path_factory.mktemp("residual"), tiny.residual_table_bytes())


def test_all_methods_end_to_end(residual_table: Path, tmp_path: Path) -> None:
    check_methods(METHODS, "45%", residual_table, tmp_path, gates=0)


@pytest.mark.parametrize(("method", "budget"), [("filter", "60%"), ("rank", "75%"), ("block", "80%"), ("merge", "90%")])
def test_one_method_end_to_end(method: str, budget: str, residual_table: Path, tmp_path: Path) -> None:
    check_methods((method,), budget, residual_table, tmp_path, gates=0)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("filter", "rank"), ("filter", "block"), METHODS])
def test_methods_end_to_end_with_gates(methods: tuple[str, ...], residual_table: Path, tmp_path: Path) -> None:
    check_methods(methods, "50%", residual_table, tmp_path, gates=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "budget", "epochs", "asked"),
    [("gates", "50%", 12, {"gates": True}), ("stops", "30%", 20, {"progressive": True})],
)
def test_a_late_candidate_end_to_end(
    name: str, budget: str, epochs: int, asked: dict[str, bool], residual_table: Path
) -> None:
    done = compress(
        tiny.residual(), tiny.inputs(), budget=budget, data=tiny.data() * 6, table=residual_table, batch=tiny.BATCH,
        epochs=epochs, rehearsal=1, progress=False, **asked,
    )  # fmt: skip
    names = [found for found, _, _ in done.report.readings]
    assert names.count(name) == 1 and names.index(name) < 2
    assert done.report.met() and (done.report.parity_max_rel or 0.0) < 1e-5


@pytest.mark.parametrize("gate_epochs", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_by_beam_search_end_to_end(gate_epochs: int, residual_table: Path, tmp_path: Path) -> None:
    done = compress(
        tiny.residual(), tiny.inputs(), budget="75%", data=tiny.data()[:2], table=residual_table, out=tmp_path / "out",
        batch=tiny.BATCH, methods=("bsr",), gate_epochs=gate_epochs, epochs=1, progress=False,
    )  # fmt: skip
    assert done.report.met() and (done.report.parity_max_rel or 0.0) < 1e-5
    assert done.plan.factorizations and not (done.plan.slices or done.plan.drops or done.plan.merges)


def test_a_sweep_serves_every_budget_from_one_set_of_prices(residual_table: Path, tmp_path: Path) -> None:
    runs = sluice.sweep(
        tiny.residual(), tiny.inputs(), budgets=["80%", "45%"], data=tiny.data(), table=residual_table, out=tmp_path,
        batch=tiny.BATCH, epochs=1, rehearsal=10, progress=False,
    )  # fmt: skip
    found = dict(runs)
    assert list(found) == ["80%", "45%"]
    for budget, done in found.items():
        assert done.report.met() and done.report.budget_ms == pytest.approx(
            float(budget[:-1]) / 100 * done.report.dense_ms
        )
        assert Plan.load(tmp_path / budget[:-1] / "plan.json") == done.plan
    assert found["45%"].report.measured_ms < found["80%"].report.measured_ms  # type: ignore[operator]


def test_a_negative_rehearsal_is_refused(residual_table: Path) -> None:
    with pytest.raises(SluiceError, match=r"rehearsal=-1 is no share of the epochs of the fine-tune; give 0.25"):
        compress(
            tiny.residual(), tiny.inputs(), budget="50%", data=tiny.data(), table=residual_table, rehearsal=-1,
            batch=tiny.BATCH,
        )  # fmt: skip


def check_methods(methods: tuple[str, ...], budget: str, table: Path, folder: Path, gates: int) -> None:
    """Within the budget, no edit of another method, and all forms of what comes out are one network."""
    model, out = tiny.residual(), folder / "out"
    done = compress(
        model, tiny.inputs(), budget=budget, data=tiny.data(), table=table, out=out, batch=tiny.BATCH,
        methods=methods, gate_epochs=gates, epochs=1, rehearsal=10, progress=False,
    )  # fmt: skip
    report, plan = done.report, done.plan
    assert report.met() and report.parity_max_rel is not None and report.parity_max_rel < 1e-5
    assert report.promised_ms == pytest.approx(report.measured_ms, rel=0.05)
    used = {"filter": plan.slices, "rank": plan.factorizations, "block": plan.drops, "merge": plan.merges}
    assert any(used.values()) and {m for m, edits in used.items() if edits} <= set(methods)
    if len(methods) == 1:
        assert used[methods[0]]
    loaded = sluice.load(tiny.residual, out)
    rewritten = finalize(rewrite_onnx(tiny.residual_onnx(), plan))
    for batch in (1, tiny.BATCH, 4):
        x = tiny.inputs(batch)
        with torch.no_grad():
            expected = done.module(x)
            assert_close(loaded(x), expected, tol=1e-5)
        engine = onnx.load(out / "slim.onnx")
        assert_close(next(iter(OrtRunner().build(engine).run({engine_input(out): x.numpy()}).values())), expected, 1e-5)
    assert structure(done.deployed) == structure(rewritten)  # what was verified is what is deployed
    shapes = {tuple(i.dims) for i in rewritten.graph.initializer if len(i.dims) > 1}
    assert shapes == {tuple(i.dims) for i in engine.graph.initializer if len(i.dims) > 1}


def test_every_question_is_settled_once_and_the_last_says_what_is_wrong(
    measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readings may hold the problem itself, and two of them may be the same."""
    part, whole = (Problem(measured, measured.partition.analysis, frozenset(), {}, {}) for _ in range(2))
    asked: list[Problem] = []
    asked_for, dense = BudgetSpec.parse(BUDGET), to_onnx(tiny.model(), tiny.inputs())

    def refuse(problem: Problem, budget: object, dense: object, pairs: object, rehearsed: object) -> None:
        asked.append(problem)
        raise SluiceError("the whole" if problem is whole else "a part")

    monkeypatch.setattr(verify, "solve_verified", refuse)
    with pytest.raises(SluiceError, match="the whole"):
        verify.first_verified([whole, part, part, whole], asked_for, dense)
    assert [problem is whole for problem in asked] == [True, False]
    with pytest.raises(SluiceError, match="the whole"):
        verify.first_verified([whole], asked_for, dense)
    assert len(asked) == 3


def test_without_gates_nothing_is_decided_before_the_end(residual_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BeamProblem, "solve", lambda self, target_ms: pytest.fail("decided"))
    monkeypatch.setattr(prepare, "count_batches", lambda data: pytest.fail("read to the end"))
    ready = prepare.prepare(
        tiny.residual(), tiny.inputs(), [BudgetSpec.parse(BUDGET)], Deployment(batch=tiny.BATCH),
        Recipe(tiny.data(), progress=False), table=residual_table, exclude=(), methods=("bsr",),
    )  # fmt: skip
    assert isinstance(ready.problem, BeamProblem) and ready.problem.steps


def test_what_is_profiled_says_which_weights_are_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(9, 3, 1, 1), persistent=False)
            self.conv, self.bn = nn.Conv2d(9, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(nn.functional.conv2d(x, self.kernel)))  # type: ignore[arg-type]

    seen: list[onnx.ModelProto] = []
    monkeypatch.setattr(prepare, "profile_onnx", lambda dense, *args, **kwargs: seen.append(dense))
    prepare.profile(Transform().eval(), torch.randn(2, 3, 7, 6), complete=True, progress=False)
    assert buffers_of(seen[0]) == {"kernel"} and "kernel" in {init.name for init in seen[0].graph.initializer}
