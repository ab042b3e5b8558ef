from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from sluice.core.latency import Extent, LatencyModel, Term
from sluice.core.plan import Drop, Merge
from sluice.profiler.fit.assemble import Layout, fill
from sluice.profiler.fit.cache_reload import megabytes
from sluice.profiler.fit.calibrate import HELD, MANY, READ, _kind, calibrate
from sluice.profiler.pieces.engine import build_engine, model_key
from sluice.profiler.survey import complete_points, measure_slots
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.solver.options import EditSpace, RankOption
from tests.device import FINGERPRINT, FakeRunner, chain, staircase
from tests.profiler.on_device import bench_on, surveyed

WIDTHS = [26, 18]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def complete(widths: list[int], runner: FakeRunner) -> tuple[Layout, LatencyTable]:
    """A small chain, all of whose points are measured."""
    table = LatencyTable.create(":memory:", FINGERPRINT)
    bench = bench_on(table, runner)
    layout = surveyed(chain(widths, batch="N"), bench)
    measure_slots(bench, complete_points(layout))
    return layout, table


def plans_of(model: LatencyModel, count: int) -> list[dict[str, int]]:
    """Different ones, the dense one first."""
    every = [{"conv0": a, "conv1": b} for a in model.levels["conv0"] for b in model.levels["conv1"]]
    order = rng().permutation(len(every) - 1)[: count - 1]
    return [dict(model.dense), *(every[int(k)] for k in order)]


def put(layout: Layout, table: LatencyTable, engines: Mapping[tuple[int, int], float]) -> None:
    for (a, b), ms in engines.items():
        table.put_engine(
            model_key(layout.partition, layout.dense), {"conv0": a, "conv1": b}, Measurement(ms, 0.01, 48, "thread_cpu")
        )


def told(
    layout: Layout, table: LatencyTable, model: LatencyModel, count: int, whole: Callable[[Mapping[str, int]], float]
) -> LatencyModel:
    """The model calibrated on ``count`` engines, which take what ``whole`` says."""
    put(layout, table, {(p["conv0"], p["conv1"]): whole(p) for p in plans_of(model, count)})
    return calibrate(model, layout, table)


def test_without_engines_the_model_is_what_it_was() -> None:
    layout, table = complete(WIDTHS, FakeRunner(staircase(8)))
    model = fill(layout, table)
    assert calibrate(model, layout, table) is model
    table.put_engine("another network", {"conv0": 1}, Measurement(1.0, 0.0, 9, "thread_cpu"))
    table.put_engine(model_key(layout.partition, layout.dense), {"conv0": 8}, Measurement(1.0, 0.0, 9, "thread_cpu"))
    assert calibrate(model, layout, table) is model  # of a configuration that lacks a site nothing can be said


@pytest.mark.parametrize("count", [1, 2, 3, MANY - 1, MANY, 24])
def test_where_times_add_up_there_is_nothing_to_mend(count: int) -> None:
    runner = FakeRunner(staircase(8), slower=lambda ms: ms + 0.01)
    layout, table = complete(WIDTHS, runner)
    model = fill(layout, table)
    found = told(layout, table, model, count, lambda p: runner.ms(build_engine(layout.partition, p)))
    assert found.slope == pytest.approx(1.0, abs=1e-6) and found.intercept == pytest.approx(0.01, rel=1e-4)
    assert found.error["n"] == count and found.error["p95_abs_err"] < 1e-6
    assert ("spearman" in found.error) == (count > 1)


def test_one_quick_engine_gives_a_slope() -> None:
    """And a call stays a call, give or take what an engine is known to."""
    layout, table = complete(WIDTHS, FakeRunner(staircase(8), slower=lambda ms: ms + 0.01))
    model = fill(layout, table)
    found = told(layout, table, model, 1, lambda p: 0.01 + 0.9 * model.raw_ms(p))
    assert found.dense_ms() == pytest.approx(0.01 + 0.9 * model.raw_ms(model.dense), rel=1e-3)
    assert found.slope == pytest.approx(0.9, rel=0.01) and found.intercept == pytest.approx(0.01, rel=0.2)
    # The plain sum had not seen the engine, and its error is what is stated.
    assert found.error["median_abs_err"] == pytest.approx(model.dense_ms() / found.dense_ms() - 1.0, rel=0.01)
    assert found.error["median_abs_err"] > 0.05 and found.error["n"] == 1.0 and READ not in found.error


@pytest.mark.parametrize("count", [1, 3])
def test_what_few_engines_take_beyond_their_pieces_is_read_by_weights(count: int) -> None:
    layout, table = complete(WIDTHS, FakeRunner(staircase(8), slower=lambda ms: ms + 0.01))
    model = fill(layout, table)
    weights = megabytes(layout, model)
    heavy = {term.name: replace(term, ms=weights[term.name]) for term in model.terms if term.name in weights}
    price = 0.15 * model.raw_ms(model.dense) / sum(term.at(model.dense) for term in heavy.values())

    def whole(plan: Mapping[str, int]) -> float:
        return 0.01 + model.raw_ms(plan) + price * sum(term.at(plan) for term in heavy.values())

    found = told(layout, table, model, count, whole)
    off = [found.ms(plan) / whole(plan) - 1.0 for plan in plans_of(model, 30)]
    by_slope = whole(model.dense) / model.dense_ms()
    plain = [by_slope * model.ms(plan) / whole(plan) - 1.0 for plan in plans_of(model, 30)]
    assert found.dense_ms() == pytest.approx(whole(model.dense), rel=5e-3)
    assert max(map(abs, off)) < 0.02 < 0.06 < max(map(abs, plain))
    assert found.error[READ] == pytest.approx(price, rel=0.2) and found.error[HELD] == 0.0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_engines_far_from_each_other_give_a_line(count: int) -> None:
    layout, table = complete(WIDTHS, FakeRunner(staircase(8), slower=lambda ms: ms + 0.001))
    model = fill(layout, table)

    def whole(plan: Mapping[str, int]) -> float:
        return 1.12 * model.raw_ms(plan) + 0.02 * model.dense_ms()

    narrow = {"conv0": model.levels["conv0"][0], "conv1": model.levels["conv1"][0]}
    put(layout, table, {(narrow["conv0"], narrow["conv1"]): whole(narrow)})
    found = told(layout, table, model, count - 1, whole)
    assert found.error["n"] == count
    off = [found.ms(plan) / whole(plan) - 1.0 for plan in plans_of(model, 30)]
    plain = [model.ms(plan) / whole(plan) - 1.0 for plan in plans_of(model, 30)]
    assert max(map(abs, off)) < 0.4 * max(map(abs, plain)) and np.median(np.abs(off)) < 0.02


def test_what_engines_add_is_found_from_many() -> None:
    """Whole engines here take 12% longer than their pieces tell, and a constant on top."""
    layout, table = complete(WIDTHS, FakeRunner(staircase(8)))
    model = fill(layout, table)
    found = told(layout, table, model, 12, lambda p: 1.12 * model.raw_ms(p) + 0.3)
    assert (found.slope, found.intercept) == (pytest.approx(1.12), pytest.approx(0.3))
    assert found.error["p95_abs_err"] < 1e-9 and found.error["spearman"] == pytest.approx(1.0)
    assert set(found.error) == {"n", "p95_abs_err", "median_abs_err", "spearman"}  # and no correction


@pytest.mark.parametrize("count", [3, 7, 12])
def test_the_stated_error_is_that_of_engines_not_seen(count: int) -> None:
    """One of them takes a fifth longer than anything tells; it is predicted by a fit that has not seen it."""
    layout, table = complete(WIDTHS, FakeRunner(staircase(8)))
    model = fill(layout, table)
    odd = plans_of(model, 3)[2]
    found = told(layout, table, model, count, lambda p: (1.2 if p == odd else 1.0) * model.raw_ms(p) + 1e-6)
    assert found.error["p95_abs_err"] > 0.1


@pytest.mark.parametrize("truth", [1.5, 1.0, -0.4])
def test_a_correction_is_kept_only_where_it_pays_and_is_sound(truth: float) -> None:
    """Joints save ``truth`` times what the table says; where that is not even a saving, the table is left as it is."""
    layout, table = complete(WIDTHS, FakeRunner(staircase(8)))
    raw = fill(layout, table)
    knots = np.array([1.0, 9.0, 26.0])
    saved = raw.dense_ms() * np.array([0.04, 0.1, 0.16])
    joint = Term("j", (Extent((("conv0", 1),)),), (knots,), saved, -1.0, bound=1.1 * saved)
    raw = replace(raw, terms=(*raw.terms, joint))

    def whole(widths: Mapping[str, int]) -> float:
        return 0.9 * (raw.raw_ms(widths) + (1.0 - truth) * joint.at(widths)) + 0.01 * raw.dense_ms()

    model = told(layout, table, raw, 24, whole)
    unseen = [p for p in plans_of(raw, 60) if p not in plans_of(raw, 24)]
    off = [model.ms(plan) / whole(plan) - 1.0 for plan in unseen]
    assert ("joints" in model.error) == (truth == 1.5)
    corrected = next(term for term in model.terms if term.name == "j")
    if truth == -0.4:
        assert max(map(abs, off)) > 0.02 and (corrected.ms == joint.ms).all()
    else:
        assert max(map(abs, off)) < 0.01
        assert corrected.ms == pytest.approx(truth * joint.ms, rel=0.05)
    # A bound is corrected as its estimate is.
    assert corrected.bound == pytest.approx(1.1 * corrected.ms)


def test_few_engines_are_no_ground_for_a_correction() -> None:
    layout, table = complete(WIDTHS, FakeRunner(staircase(8)))
    raw = fill(layout, table)
    saved = raw.dense_ms() * np.array([0.04, 0.1, 0.16])
    joint = Term("j", (Extent((("conv0", 1),)),), (np.array([1.0, 9.0, 26.0]),), saved, -1.0)
    raw = replace(raw, terms=(*raw.terms, joint))
    model = told(layout, table, raw, MANY - 1, lambda p: raw.raw_ms(p) - 0.5 * joint.at(p))
    assert "joints" not in model.error and model.terms == raw.terms


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


def test_estimates_are_calibrated_as_well() -> None:
    """The bounds of a model of which only the dense network is known keep their meaning."""
    bench = bench_on(LatencyTable.create(":memory:", FINGERPRINT), FakeRunner(staircase(8)))
    layout = surveyed(chain(WIDTHS, batch="N"), bench)
    model = fill(layout, bench.table)
    found = told(layout, bench.table, model, 1, lambda p: 0.8 * model.raw_ms(p))
    plan = {"conv0": 8, "conv1": 8}
    assert found.hopeful().ms(plan) < found.ms(plan) == pytest.approx(0.8 * model.ms(plan), rel=0.02)
    assert not found.measured_at(plan) and found.measured_at(found.dense)
