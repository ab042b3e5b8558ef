from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sluice.cli import main
from sluice.core.deployment import UNFIT, Deployment
from sluice.core.errors import SluiceError
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.profiler import profile as profile_module
from sluice.profiler import view as view_module
from sluice.profiler.pieces.weightless import with_weights
from sluice.profiler.profile import fingerprint_here, measured_elsewhere, profile_known, profile_onnx
from sluice.profiler.summary import profile_summary
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close
from sluice.solver.random_configurations import random_configuration
from tests.device import REFERENCE_MS, Cost, FakeRunner, FakeSession, chain, line, staircase
from tests.profiler.timing.test_reference_engine import Host

TWO = Deployment(batch=2)


@pytest.fixture
def on_fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRunner], FakeRunner]:
    def use(runner: FakeRunner) -> FakeRunner:
        for module in (profile_module, view_module):
            monkeypatch.setattr(module, "make_runner", lambda target, threads=1: runner)
        return runner

    return use


def drawn(profile: Profile, count: int = 25) -> list[dict[str, int]]:
    """Some of the combinations of levels."""
    levels = profile.latency.levels
    plans = [dict(zip(levels, point, strict=True)) for point in itertools.product(*levels.values())]
    return [plans[int(k)] for k in np.random.default_rng(0).integers(len(plans), size=count)]


def promises(
    profile: Profile, runner: FakeRunner, plans: Sequence[Mapping[str, int]]
) -> tuple[list[float], list[float]]:
    """Promised and engine's milliseconds."""
    cut = profile.partition
    engines = [runner.ms(cut_graph(with_weights(cut.model), cut.analysis, cut.masks(plan))) for plan in plans]
    return [profile.latency.ms(plan) for plan in plans], engines


@pytest.mark.parametrize(("target", "precision"), UNFIT)
def test_what_a_target_cannot_run_is_said_before_it_is_asked_for(target: str, precision: str) -> None:
    with pytest.raises(SluiceError, match=f"^{target} cannot be timed in {precision}: .*; choose fp16, or another"):
        profile_onnx(chain([20, 13], batch="N"), deployment=Deployment(target, 2, precision=precision), progress=False)


@pytest.mark.parametrize("cost", [staircase(16), staircase(8, 1.3)], ids=["16", "8"])
def test_where_times_add_up_the_promise_is_exact(cost: Cost, on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    runner = on_fake(FakeRunner(cost))
    profile = profile_onnx(chain([50, 36, 20], batch="N"), deployment=TWO, progress=False)
    plans = drawn(profile)
    assert profile.knows(profile.latency.dense) and not all(map(profile.knows, plans))
    asked = profile.ask(plans)
    assert asked > 0 and all(map(profile.knows, plans)) and profile.ask(plans) == 0
    assert_close(*promises(profile, runner, plans), tol=1e-9)
    assert profile.latency.dense_ms() == pytest.approx(runner.ms(profile.partition.model))
    assert profile.latency.error["p95_abs_err"] < 1e-9 and profile.coverage.disturbed == 0


def test_nothing_but_the_dense_network_is_measured_unasked(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    runner = on_fake(FakeRunner(staircase(8)))
    profile = profile_onnx(chain([50, 36, 20], batch="N"), deployment=TWO, progress=False)
    cover, parts = profile.coverage, {slot.part.key for slot in profile.layout.slots}
    assert cover.points == len(parts) < 0.1 * cover.complete
    joints = {term.name for term in profile.latency.terms if term.weight < 0}
    # Pieces, joints of two parts and a whole, the call of two engines, and the dense engine.
    assert len(profile.partition.pieces) + 3 < runner.built <= len(profile.partition.pieces) + 3 * len(joints) + 3


def test_a_complete_table_leaves_nothing_to_its_estimates(
    tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]
) -> None:
    runner = on_fake(FakeRunner(staircase(8)))
    model = chain([14, 10], batch="N")  # few enough levels for all of them
    profile = profile_onnx(model, tmp_path / "t.db", deployment=TWO, complete=True, progress=False)
    plans = drawn(profile, 40)
    assert profile.coverage.points == profile.coverage.complete and all(map(profile.knows, plans))
    assert_close(*promises(profile, runner, plans), tol=1e-9)
    assert profile.latency.error["n"] > 8
    found = profile_known(model, tmp_path / "t.db")
    assert [found.latency.ms(plan) for plan in plans] == [profile.latency.ms(plan) for plan in plans]


def test_what_every_engine_costs_once_is_counted_once(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    """A call of 0.2 ms is in every piece, in what neighbours save, and once in the engine."""
    runner = on_fake(FakeRunner(staircase(8), slower=lambda ms: ms + 0.2))
    profile = profile_onnx(chain([26, 18], batch="N"), deployment=TWO, progress=False)
    engine = runner.ms(profile.partition.model)
    assert profile.latency.raw_ms(profile.latency.dense) == pytest.approx(engine - 0.2)
    assert profile.latency.ms(profile.latency.dense) == pytest.approx(engine)
    joints = [t for t in profile.latency.terms if t.weight < 0]
    assert len(joints) == len(profile.partition.pieces) - 1
    assert all(np.asarray(t.ms).ravel() == pytest.approx(0.0, abs=1e-9) for t in joints)


class Copying(FakeRunner):
    """Every tensor at the border of an engine is copied, 3 ns per element, and every engine is a call of 0.05 ms."""

    def ms(self, model: onnx.ModelProto, batch: int = 2) -> float:
        graph = model.graph
        ends = [] if graph.name == "call" else [*graph.input, *graph.output]
        dims = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in ends]
        return super().ms(model, batch) + 0.05 + sum(3e-6 * math.prod(n or batch for n in shape) for shape in dims)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_joints_at_a_smaller_batch_save_what_they_save_at_the_whole(
    batch: int, on_fake: Callable[[FakeRunner], FakeRunner]
) -> None:
    runner = on_fake(Copying(staircase(8)))
    profile = profile_onnx(chain([26, 18, 30], batch="N"), deployment=Deployment(batch=batch), progress=False)
    cut = profile.partition
    assert (cut.batch, (cut.small or cut).batch) == (batch, max(1, batch // 4))
    plans = [{**profile.latency.dense, **widths} for widths in ({}, {"conv0": 8, "conv1": 16, "conv2": 24})]
    profile.ask(plans)
    for plan in plans:
        engine = runner.ms(cut_graph(with_weights(cut.model), cut.analysis, cut.masks(plan)), batch)
        assert profile.latency.raw_ms(plan) == pytest.approx(engine - 0.05)


def test_joints_of_a_fixed_batch_are_measured_at_it(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    on_fake(FakeRunner(staircase(8)))
    profile = profile_onnx(chain([26, 18], batch=8), deployment=Deployment(batch=8), progress=False)
    assert profile.partition.small is None


def test_a_few_engines_of_plans_make_estimates_better(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    """What is estimated before anything is asked, and after some of it was."""
    runner = on_fake(FakeRunner(line))
    profile = profile_onnx(chain([50, 36, 44], batch="N"), deployment=TWO, progress=False)

    def missed() -> float:
        promised, engines = promises(profile, runner, drawn(profile, 60)[20:])
        return float(np.median(np.abs(np.array(promised) / engines - 1.0)))

    before = missed()
    profile.ask(drawn(profile, 20))
    after = missed()
    assert after < 0.5 * before < 0.25 and after < 0.05


def test_a_profile_is_a_view_of_its_table(tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    """A model that was taken stays what it is; the next one knows what was measured since, by whomever."""
    on_fake(FakeRunner(staircase(8)))
    model, path = chain([26, 18], batch="N"), tmp_path / "t.db"
    profile = profile_onnx(model, path, deployment=TWO, progress=False)
    plan = {"conv0": 12, "conv1": 8}
    before = profile.latency
    assert profile.latency is before
    promised = before.ms(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_module, "make_runner", lambda target, threads=1: FakeRunner(staircase(8)))
        other = profile_onnx(model, path, deployment=TWO, progress=False)
        assert other.ask([plan]) > 0
    assert profile.knows(plan) and before.ms(plan) == promised != profile.latency.ms(plan)
    assert profile.latency.levels == before.levels


def test_engines_that_were_measured_elsewhere_count(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    """Whole engines take 10% longer than their pieces where they are narrow; one engine tells."""
    on_fake(FakeRunner(staircase(8)))
    profile = profile_onnx(chain([26, 18], batch="N"), deployment=TWO, progress=False)
    plan = {"conv0": 8, "conv1": 8}
    profile.ask([plan])
    honest = profile.latency.ms(plan)
    dense_ms = profile.latency.dense_ms()
    profile.learn(plan, 1.1 * honest / dense_ms)
    assert profile.latency.error["n"] == 2.0
    assert 1.03 * honest < profile.latency.ms(plan) < 1.11 * honest
    assert profile.latency.dense_ms() == pytest.approx(dense_ms, rel=0.03)
    known = dict(profile.bench.table.engines(profile.model_key)[-1][0])
    assert known == plan
    calibration = profile.bench.table.get_calibration(profile.model_key)
    assert calibration is not None and calibration[0] == profile.latency.slope


def test_engines_are_timed_once(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    runner = on_fake(FakeRunner(staircase(8)))
    profile = profile_onnx(chain([26, 18], batch="N"), deployment=TWO, progress=False)
    plans = [dict(profile.latency.dense), {"conv0": 8, "conv1": 8}, {"conv0": 12, "conv1": 4}]
    profile.time_engines(plans)
    assert profile.latency.error["n"] == 3.0
    built = runner.built
    profile.time_engines(plans)
    assert runner.built == built


def test_a_profile_continues_a_table(tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    first = on_fake(FakeRunner(staircase(8)))
    model = chain([26, 18], batch="N")
    before = profile_onnx(model, tmp_path / "t.db", deployment=TWO, progress=False)
    again = on_fake(FakeRunner(staircase(8)))
    after = profile_onnx(model, tmp_path / "t.db", deployment=TWO, progress=False)
    assert first.built > 0 and again.built == 0
    plan = {"conv0": 16, "conv1": 8}
    assert after.latency.ms(plan) == before.latency.ms(plan)
    assert after.bench.reference.ms == before.bench.reference.ms == pytest.approx(REFERENCE_MS)
    # Another network with pieces of the same kind costs only what is missing.
    profile_onnx(chain([26, 18, 18], batch="N"), tmp_path / "t.db", deployment=TWO, progress=False)
    alone = on_fake(FakeRunner(staircase(8)))
    profile_onnx(chain([26, 18, 18], batch="N"), deployment=TWO, progress=False)
    assert 0 < again.built < alone.built


def test_a_table_of_other_conditions_is_refused(tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    on_fake(FakeRunner())
    model = chain([6, 5], batch="N")
    profile_onnx(model, tmp_path / "t.db", deployment=TWO, progress=False)
    with pytest.raises(SluiceError, match="batch"):
        profile_onnx(model, tmp_path / "t.db", deployment=Deployment(batch=3), progress=False)


def test_points_of_a_busy_machine_are_told_and_measured_anew_once_forgotten(
    tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]
) -> None:
    class Busy(FakeSession):
        """The reference of a machine that is quiet for a while when the reference's own time is taken, and never
        again."""

        bursts = 0

        def sample(self, repeats: int) -> float:
            self.bursts += 1
            return self.ms * (1.3 if self.bursts > 2010 else 1.0)

    class OnBusy(FakeRunner):
        def build(self, model: Any, **given: Any) -> FakeSession:
            found = super().build(model, **given)
            return Busy(found.ms) if found.ms == REFERENCE_MS else found

    on_fake(OnBusy(staircase(8)))
    model, path = chain([9, 5], batch="N"), tmp_path / "t.db"
    profile = profile_onnx(model, path, deployment=TWO, progress=False)
    points = profile.coverage.points
    assert profile.coverage.disturbed == points > 0
    told = profile_summary(profile, ["filter"])[1]
    asked, points = points, profile.coverage.points  # the least milliseconds were asked for
    assert profile.coverage.disturbed == points > asked
    assert any(line.startswith(f"{points} points are uncertain, the machine was busy") for line in told)

    calm = on_fake(FakeRunner(staircase(8)))
    found = profile_onnx(model, path, deployment=TWO, progress=False).coverage
    assert found.disturbed == points and calm.built == 0
    assert main(["table", "forget", str(path)]) == 0
    again = profile_onnx(model, path, deployment=TWO, progress=False)
    assert again.coverage.disturbed == 0 and 0 < again.coverage.points == asked <= calm.built


def test_a_table_of_another_device_is_read(tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    """Filled where the network will run, asked where that runtime may not even be installed."""
    path, methods = tmp_path / "t.db", ("filter", "rank")
    model = chain([26, 18], batch="N")
    assert not measured_elsewhere(path, TWO)
    on_fake(FakeRunner(staircase(8)))
    profile_onnx(model, path, deployment=TWO, methods=("filter",), progress=False)
    assert not measured_elsewhere(path, TWO)
    here = FakeRunner()
    here.device = "another device"
    on_fake(here)
    assert measured_elsewhere(path, TWO)
    assert not measured_elsewhere(path, Deployment(batch=3))  # not the table that is asked for at all
    with pytest.raises(SluiceError, match=r"was measured on 'a fake device' and lacks points .* profile it there"):
        profile_known(model, path, methods=methods)
    there = on_fake(FakeRunner(staircase(8)))
    expected = profile_onnx(model, path, deployment=TWO, methods=methods, progress=False)
    before, there.built = path.read_bytes(), 0
    on_fake(here)
    found = profile_known(model, path, methods=methods)
    assert here.built == there.built == 0 and path.read_bytes() == before
    assert found.fingerprint == expected.fingerprint and found.options == expected.options
    for k in range(9):
        plan = random_configuration(found.latency, np.random.default_rng(k))
        assert found.latency.ms(plan) == expected.latency.ms(plan)
    with pytest.raises(SluiceError, match="device is 'a fake device', not 'another device'"):
        profile_onnx(model, path, deployment=TWO, methods=methods, progress=False)


def test_a_table_of_another_host_is_read_and_not_added_to(
    tmp_path: Path, on_fake: Callable[[FakeRunner], FakeRunner]
) -> None:
    path, model = tmp_path / "t.db", chain([26, 18], batch="N")
    on_fake(Host("a"))
    expected = profile_onnx(model, path, deployment=TWO, progress=False).latency
    assert not measured_elsewhere(path, TWO)
    here, before = on_fake(Host("b")), path.read_bytes()
    assert measured_elsewhere(path, TWO)
    with pytest.raises(SluiceError, match=r"t\.db was begun on another host"):
        profile_onnx(model, path, deployment=TWO, progress=False)
    found = profile_known(model, path)
    assert found.latency.dense_ms() == expected.dense_ms() and not found.open
    assert here.built == 0 and path.read_bytes() == before


def test_nothing_to_cut_is_said(on_fake: Callable[[FakeRunner], FakeRunner]) -> None:
    on_fake(FakeRunner())
    with pytest.raises(SluiceError, match=r"nothing .*can be cut"):
        profile_onnx(chain([6, 5], batch="N"), deployment=TWO, exclude=["conv0", "conv1"], progress=False)


def test_the_stages_tell_all_points(
    on_fake: Callable[[FakeRunner], FakeRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    on_fake(FakeRunner(staircase(8)))
    profile = profile_onnx(chain([26, 18], batch="N"), deployment=TWO, progress=True)
    profile.ask([{"conv0": 8, "conv1": 8}])
    profile.time_engines([{"conv0": 8, "conv1": 8}])
    ended = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines() if ", took " in line]
    stages = [re.fullmatch(r"profile: ([a-z ]+) (\d+)(?:/(\d+))?", line) for line in ended]
    assert [found[1] for found in stages if found] == ["dense network", "engines", "points that plans use", "engines"]
    assert all(found[2] == found[3] for found in stages if found)


def test_a_small_network_in_the_real_runtime(tmp_path: Path) -> None:
    model = chain([6, 4], batch="N", size=7)
    profile = profile_onnx(model, tmp_path / "t.db", deployment=TWO, progress=False)
    assert profile.fingerprint == fingerprint_here(Deployment(batch=2))
    assert profile.latency.dense == {"conv0": 6, "conv1": 4}
    with LatencyTable.open(tmp_path / "t.db", profile.fingerprint) as table:
        assert len(table) > len(profile.partition.pieces)
        dense = next(m.ms for w, m in table.engines(profile.model_key) if w == profile.latency.dense)
    # Microseconds on a shared host: the order of magnitude is all that can be held.
    assert 0.1 < profile.latency.dense_ms() / dense < 10
    session = profile.runner().build(profile.partition.model)
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 7)).astype(np.float32)
    assert session.run({"x": x})["y"].shape == (2, 5)
    assert profile.reference(profile.runner()).ms == profile.bench.reference.ms > 0
