from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest

from sluice.latency import Extent, LatencyModel, Term
from sluice.passes.options import Options, RankOption
from sluice.passes.rewrite_onnx import cut_graph
from sluice.plan import Drop, Merge
from sluice.profiler import calibrate as calibrate_module
from sluice.profiler.anchor import make_anchor
from sluice.profiler.assemble import assemble
from sluice.profiler.calibrate import ENGINES, _kind, calibrate, measure_engines, model_key
from sluice.profiler.engine import build_engine
from sluice.profiler.explore import explore
from sluice.profiler.grids import piece_points
from sluice.profiler.joint_sweep import explore_joints, joint_tolerance
from sluice.profiler.measure import Measurement
from sluice.profiler.pieces import Dissection, dissect
from sluice.profiler.sweep import Bench
from sluice.profiler.table import LatencyTable
from sluice.runtime.runner import Session
from tests.device import FINGERPRINT, FakeRunner, chain, staircase


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def profiled(dissection: Dissection, bench: Bench) -> LatencyModel:
    stairs = explore(dissection, bench)
    bench.pieces(dissection, piece_points(dissection, stairs))
    explore_joints(dissection, stairs, bench, joint_tolerance(dissection, bench.table))
    return assemble(dissection, stairs, bench.table)


def bench_on(table: LatencyTable, runner: FakeRunner) -> Bench:
    return Bench(table, runner, make_anchor(table, runner, rng()), rng())


def test_what_engines_add_is_found() -> None:
    """Whole engines here take 12% longer than their pieces tell, and a constant on top."""

    class Whole(FakeRunner):
        def ms(self, model: onnx.ModelProto, batch: int = 2) -> float:
            ms = super().ms(model, batch)
            return 1.12 * ms + 0.3 if model.graph.name == "chain" else ms

    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, Whole(staircase(8)))
        raw = profiled(dissection, bench)
        model = calibrate(dissection, raw, bench)
        assert (model.slope, model.intercept) == (pytest.approx(1.12), pytest.approx(0.3))
        assert model.error["p95_abs_err"] < 1e-9 and model.error["spearman"] == pytest.approx(1.0)
        slope, intercept, error = table.get_calibration(model_key(dissection, raw)) or (0.0, 0.0, {})
        assert (slope, intercept) == (model.slope, model.intercept) and error.items() >= model.error.items()
        engine = cut_graph(dissection.model, dissection.analysis, dissection.masks({"conv0": 16, "conv1": 8}))
        assert model.ms({"conv0": 16, "conv1": 8}) == pytest.approx(bench.runner.ms(engine))  # type: ignore[attr-defined]


def test_engines_that_the_table_knows_are_not_measured_again() -> None:
    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(staircase(4))
        bench = bench_on(table, runner)
        raw = profiled(dissection, bench)
        first = calibrate(dissection, raw, bench)
        known = table.engines(model_key(dissection, raw))
        assert len(known) == ENGINES and {"conv0": 26, "conv1": 18} in [widths for widths, _ in known]
        built = runner.built
        second = calibrate(dissection, raw, bench)
        assert runner.built == built
        assert (second.slope, second.intercept, second.error) == (first.slope, first.intercept, first.error)


def test_engines_for_validation_stay_out_of_the_calibration() -> None:
    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner()
        bench = bench_on(table, runner)
        key = model_key(dissection, profiled(dissection, bench))
        plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
        found = measure_engines(dissection, bench, plans)
        assert table.engines(key) == []
        recorded = measure_engines(dissection, bench, plans[:2], record=key)
        assert [(widths, m.ms) for widths, m in table.engines(key)] == list(zip(plans[:2], recorded, strict=True))
        engines = [cut_graph(dissection.model, dissection.analysis, dissection.masks(plan)) for plan in plans]
        assert found == pytest.approx([runner.ms(engine) for engine in engines])


@pytest.mark.parametrize("truth", [1.5, 1.0, -0.4])
def test_joints_that_save_more_than_was_measured_are_corrected(truth: float) -> None:
    """They save ``truth`` times what the table says; where that is not even a saving, the table is left as it is."""
    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(staircase(8)))
        raw = profiled(dissection, bench)
        knots = np.array([1.0, 9.0, 26.0])
        joint = Term("j", (Extent((("conv0", 1),)),), (knots,), raw.dense_ms() * np.array([0.04, 0.1, 0.16]), -1.0)
        raw = replace(raw, terms=(*raw.terms, joint))

        def whole(widths: dict[str, int]) -> float:
            return 0.9 * (raw.raw_ms(widths) + (1.0 - truth) * joint.at(widths)) + 0.01 * raw.dense_ms()

        plans = [
            {"conv0": int(a), "conv1": int(b)}
            for a, b in zip(rng().permutation(26) + 1, [*range(1, 19), *range(1, 9)], strict=True)
        ]
        for plan in plans[:ENGINES]:
            table.put_engine(model_key(dissection, raw), plan, Measurement(whole(plan), 0.01, 48, "thread_cpu"))
        model = calibrate(dissection, raw, bench)
        off = [model.ms(plan) / whole(plan) - 1.0 for plan in plans[ENGINES:]]
        *_, stated = table.get_calibration(model_key(dissection, raw)) or ({},)
        assert ("joints" in stated) == (truth == 1.5)
        corrected = next(term for term in model.terms if term.name == "j")
        if truth == -0.4:
            assert max(map(abs, off)) > 0.02 and (corrected.ms == joint.ms).all()
        else:
            assert max(map(abs, off)) < 0.01
            assert corrected.ms == pytest.approx(truth * joint.ms, rel=0.05)


def test_kinds_of_terms() -> None:
    options = Options(
        (RankOption("w", "channel"),), {"b|drop": Drop("b", ("w",))}, {"m": Merge(("w", "v"), (("w", "v"),))}
    )
    one = np.ones(())

    def kind(weight: float, *when: str) -> str:
        return _kind(Term("t", (), (), one, weight, when), options)

    rank = options.ranks[0].switch
    assert [kind(1.0), kind(1.0, "w|dense"), kind(1.0, rank), kind(1.0, "m")] == ["", "", "ranks", "merges"]
    assert {kind(-1.0), kind(-1.0, rank, "w|dense"), kind(-1.0, "m")} == {"joints"}


def test_engines_are_timed_together_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    dissection = dissect(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        together: list[int] = []
        time = Bench.time

        def noted(self: Bench, sessions: Sequence[Session], names: Sequence[str], most: int) -> tuple[Measurement, ...]:
            together.append(len(sessions))
            return time(self, sessions, names, most)

        monkeypatch.setattr(Bench, "time", noted)
        monkeypatch.setattr(calibrate_module, "PASSES", 1)
        everything = measure_engines(dissection, bench, plans)
        assert together == [11]
        working = 4 * 2 * 9 * 9 * (26 + 26)  # the first activation's input and output
        sizes = [build_engine(dissection, plan).ByteSize() + working for plan in plans]
        monkeypatch.setattr(calibrate_module, "AT_ONCE", sum(sizes[:4]))
        assert measure_engines(dissection, bench, plans) == everything
        assert together[1] == 4 and sum(together[1:]) == 11 and len(together) > 3
        monkeypatch.setattr(calibrate_module, "AT_ONCE", 1)  # one engine must fit, whatever it takes
        assert measure_engines(dissection, bench, plans[:2]) == everything[:2] and together[-2:] == [1, 1]


@pytest.mark.parametrize(("slow", "passes"), [((), 2), ((1.09,), 3), ((1.0, 1.09), 3), ((1.09, 1.05), 3)])
def test_engines_are_timed_again_until_two_passes_agree(
    slow: tuple[float, ...], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is slow as a whole, or one engine in it is."""
    done: list[float] = []

    def one(self: Bench, sessions: Sequence[Session], names: Sequence[str], most: int) -> tuple[Measurement, ...]:
        done.append(slow[len(done)] if len(done) < len(slow) else 1.0)
        odd = 1.3 if len(done) == 1 else 1.0
        ms = [done[-1] * session.sample(1) * (odd if k == 4 else 1.0) for k, session in enumerate(sessions)]
        return tuple(Measurement(m, 0.01, 24, "thread_cpu") for m in ms)

    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        monkeypatch.setattr(Bench, "time", one)
        plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
        found = measure_engines(dissection, bench, plans)
        engines = [build_engine(dissection, plan) for plan in plans]
    assert len(done) == passes
    assert found == pytest.approx([FakeRunner().ms(engine) for engine in engines])


def test_a_pass_on_a_busy_machine_counts_only_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchor's scale made the first too quick by a fifth."""
    given = [(0.8, 0.25), (0.8, 0.25), (1.0, 0.01)]
    done: list[float] = []

    def one(self: Bench, sessions: Sequence[Session], names: Sequence[str], most: int) -> tuple[Measurement, ...]:
        factor, spread = given[min(len(done), 2)]
        done.append(factor)
        return tuple(Measurement(factor * s.sample(1), spread, 24, "thread_cpu") for s in sessions)

    dissection = dissect(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        monkeypatch.setattr(Bench, "time", one)
        plans = [{"conv0": 9, "conv1": 18}, {"conv0": 26, "conv1": 4}]
        truth = [FakeRunner().ms(build_engine(dissection, plan)) for plan in plans]
        assert measure_engines(dissection, bench, plans) == pytest.approx(truth) and len(done) == 3
        given[2:] = given[:2]
        done.clear()
        assert measure_engines(dissection, bench, plans) == pytest.approx([0.8 * ms for ms in truth])


def test_no_more_references_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dissection = dissect(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(12)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        measure_engines(dissection, bench_on(table, FakeRunner()), plans[:9], record="net")
        monkeypatch.setattr(calibrate_module, "AT_ONCE", 1)
        later = FakeRunner()
        measure_engines(dissection, bench_on(table, later), plans[9:], known=table.engines("net"))
        assert later.built == len(plans[9:]) + calibrate_module.FEWEST


def test_new_engines_are_given_in_the_time_of_the_known_ones() -> None:
    """The machine is a tenth slower by now, for these engines though not for the anchor."""
    dissection = dissect(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(16)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        measure_engines(dissection, bench_on(table, FakeRunner()), plans[:9], record="net")
        known = table.engines("net")
        later = FakeRunner(slower=lambda ms: 1.1 * ms)
        truth = [FakeRunner().ms(build_engine(dissection, plan)) for plan in plans]
        bench = bench_on(table, later)
        assert measure_engines(dissection, bench, plans[9:], known=known) == pytest.approx(truth[9:])
        assert later.built == len(plans[9:]) + min(9, calibrate_module.REFERENCES)
        assert measure_engines(dissection, bench, plans[9:]) == pytest.approx([1.1 * ms for ms in truth[9:]])
        assert measure_engines(dissection, bench, plans[9:], known=known[:1]) == pytest.approx(truth[9:])


def sites(**dense: int) -> LatencyModel:
    return LatencyModel((), dense, {site: (value,) for site, value in dense.items()})


def test_networks_have_keys_of_their_own() -> None:
    widths = sites(conv0=26, conv1=18)
    key = model_key(dissect(chain([26, 18]), 2), widths)
    assert key == model_key(dissect(chain([26, 18]), 2), sites(conv0=26, conv1=18))
    assert key != model_key(dissect(chain([26, 17]), 2), sites(conv0=26, conv1=17))
    assert key != model_key(dissect(chain([26, 18], stride=2), 2), widths)
    assert key != model_key(dissect(chain([26, 18]), 2), sites(conv0=26, conv1=18, **{"conv0.weight|dense": 1}))


@pytest.mark.parametrize("widths", [[2], [2, 2]])
def test_a_network_with_hardly_any_choice(widths: list[int]) -> None:
    dissection = dissect(chain(widths), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        model = calibrate(dissection, profiled(dissection, bench), bench)
        assert model.dense_ms() == pytest.approx(FakeRunner().ms(dissection.model))


def test_a_network_with_no_choice_at_all() -> None:
    """A staircase of one step: nothing narrower is worth having, and only one engine can be measured."""
    dissection = dissect(chain([7]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(staircase(16)))
        model = calibrate(dissection, profiled(dissection, bench), bench)
        assert model.levels == {"conv0": (7,)}
        assert model.error == {"median_abs_err": pytest.approx(0.0), "p95_abs_err": pytest.approx(0.0), "n": 1.0}
        assert model.dense_ms() == pytest.approx(FakeRunner(staircase(16)).ms(dissection.model))
