from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from sluice.profiler.sweep.explore import explore
from sluice.profiler.sweep.grids import piece_points
from sluice.profiler.sweep.joint_sweep import explore_joints, joint_tolerance

from sluice.core.latency import Extent, LatencyModel, Term
from sluice.core.plan import Drop, Merge
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.profiler.fit.assemble import assemble
from sluice.profiler.fit.calibrate import _kind, calibrate
from sluice.profiler.pieces.partition import Partition, partition_graph
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import ENGINES, model_key
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.timing.reference_engine import make_reference_engine
from sluice.solver.options import EditSpace, RankOption
from tests.device import FINGERPRINT, FakeRunner, chain, staircase


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def profiled(partition: Partition, bench: Bench) -> LatencyModel:
    stairs = explore(partition, bench)
    bench.pieces(partition, piece_points(partition, stairs))
    explore_joints(partition, stairs, bench, joint_tolerance(partition, bench.table))
    return assemble(partition, stairs, bench.table)


def bench_on(table: LatencyTable, runner: FakeRunner) -> Bench:
    return Bench(table, runner, make_reference_engine(table, runner, rng()), rng())


def test_what_engines_add_is_found() -> None:
    """Whole engines here take 12% longer than their pieces tell, and a constant on top."""

    class Whole(FakeRunner):
        def ms(self, model: onnx.ModelProto, batch: int = 2) -> float:
            ms = super().ms(model, batch)
            return 1.12 * ms + 0.3 if model.graph.name == "chain" else ms

    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, Whole(staircase(8)))
        raw = profiled(partition, bench)
        model = calibrate(partition, raw, bench)
        assert (model.slope, model.intercept) == (pytest.approx(1.12), pytest.approx(0.3))
        assert model.error["p95_abs_err"] < 1e-9 and model.error["spearman"] == pytest.approx(1.0)
        slope, intercept, error = table.get_calibration(model_key(partition, raw)) or (0.0, 0.0, {})
        assert (slope, intercept) == (model.slope, model.intercept) and error.items() >= model.error.items()
        engine = cut_graph(partition.model, partition.analysis, partition.masks({"conv0": 16, "conv1": 8}))
        assert model.ms({"conv0": 16, "conv1": 8}) == pytest.approx(bench.runner.ms(engine))  # type: ignore[attr-defined]


def test_engines_that_the_table_knows_are_not_measured_again() -> None:
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(staircase(4))
        bench = bench_on(table, runner)
        raw = profiled(partition, bench)
        first = calibrate(partition, raw, bench)
        known = table.engines(model_key(partition, raw))
        assert len(known) == ENGINES and {"conv0": 26, "conv1": 18} in [widths for widths, _ in known]
        built = runner.built
        second = calibrate(partition, raw, bench)
        assert runner.built == built
        assert (second.slope, second.intercept, second.error) == (first.slope, first.intercept, first.error)


@pytest.mark.parametrize("truth", [1.5, 1.0, -0.4])
def test_joints_that_save_more_than_was_measured_are_corrected(truth: float) -> None:
    """They save ``truth`` times what the table says; where that is not even a saving, the table is left as it is."""
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(staircase(8)))
        raw = profiled(partition, bench)
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
            table.put_engine(model_key(partition, raw), plan, Measurement(whole(plan), 0.01, 48, "thread_cpu"))
        model = calibrate(partition, raw, bench)
        off = [model.ms(plan) / whole(plan) - 1.0 for plan in plans[ENGINES:]]
        *_, stated = table.get_calibration(model_key(partition, raw)) or ({},)
        assert ("joints" in stated) == (truth == 1.5)
        corrected = next(term for term in model.terms if term.name == "j")
        if truth == -0.4:
            assert max(map(abs, off)) > 0.02 and (corrected.ms == joint.ms).all()
        else:
            assert max(map(abs, off)) < 0.01
            assert corrected.ms == pytest.approx(truth * joint.ms, rel=0.05)


def test_kinds_of_terms() -> None:
    options = EditSpace(
        (RankOption("w", "channel"),), {"b|drop": Drop("b", ("w",))}, {"m": Merge(("w", "v"), (("w", "v"),))}
    )
    one = np.ones(())

    def kind(weight: float, *when: str) -> str:
        return _kind(Term("t", (), (), one, weight, when), options)

    rank = options.ranks[0].switch
    assert [kind(1.0), kind(1.0, "w|dense"), kind(1.0, rank), kind(1.0, "m")] == ["", "", "ranks", "merges"]
    assert {kind(-1.0), kind(-1.0, rank, "w|dense"), kind(-1.0, "m")} == {"joints"}


@pytest.mark.parametrize("widths", [[2], [2, 2]])
def test_a_network_with_hardly_any_choice(widths: list[int]) -> None:
    partition = partition_graph(chain(widths), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        model = calibrate(partition, profiled(partition, bench), bench)
        assert model.dense_ms() == pytest.approx(FakeRunner().ms(partition.model))


def test_a_network_with_no_choice_at_all() -> None:
    """A staircase of one step: nothing narrower is worth having, and only one engine can be measured."""
    partition = partition_graph(chain([7]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(staircase(16)))
        model = calibrate(partition, profiled(partition, bench), bench)
        assert model.levels == {"conv0": (7,)}
        assert model.error == {"median_abs_err": pytest.approx(0.0), "p95_abs_err": pytest.approx(0.0), "n": 1.0}
        assert model.dense_ms() == pytest.approx(FakeRunner(staircase(16)).ms(partition.model))
