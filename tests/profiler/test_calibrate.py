from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sluice.latency import LatencyModel
from sluice.passes.rewrite_onnx import cut_graph
from sluice.profiler.anchor import make_anchor
from sluice.profiler.assemble import assemble
from sluice.profiler.calibrate import (
    ENGINES,
    calibrate,
    errors,
    fit_linear,
    left_out,
    measure_engines,
    model_key,
    rank_correlation,
)
from sluice.profiler.grids import piece_points
from sluice.profiler.joint_sweep import explore_joints, joint_tolerance
from sluice.profiler.pieces import Dissection, dissect
from sluice.profiler.sweep import Bench, explore
from sluice.profiler.table import LatencyTable
from tests.device import FINGERPRINT, FakeRunner, chain, staircase


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_fit_recovers_slope_and_intercept() -> None:
    raw, megabytes = rng().uniform(0.2, 7.0, (2, 13))
    assert fit_linear([raw, np.ones(13)], 0.91 * raw + 0.13) == pytest.approx([0.91, 0.13])
    measured = 0.91 * raw + 0.13 + 0.05 * megabytes
    assert fit_linear([raw, np.ones(13), megabytes], measured) == pytest.approx([0.91, 0.13, 0.05])


def test_the_fit_minimises_the_relative_residual() -> None:
    raw, measured = np.array([0.5, 1.0, 4.0, 9.0]), np.array([0.7, 1.1, 5.0, 9.5])

    def loss(slope: float, intercept: float) -> float:
        return float((((slope * raw + intercept) / measured - 1) ** 2).sum())

    slope, intercept = fit_linear([raw, np.ones(4)], measured)
    for ds, di in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(slope + ds, intercept + di) > loss(slope, intercept)


def test_the_left_out_error_is_honest() -> None:
    """Each prediction ignores its own engine, so on noise the error exceeds the in-sample one."""
    noise = rng().normal(0.0, 0.1, 9)
    raw = np.linspace(1.0, 5.0, 9)
    measured = raw * (1 + noise)
    columns = [raw, np.ones(9)]
    outside = left_out(columns, measured)
    inside = sum(c * x for c, x in zip(fit_linear(columns, measured), columns, strict=True))
    assert np.mean((outside / measured - 1) ** 2) > 1.2 * np.mean((inside / measured - 1) ** 2)
    moved = measured.copy()
    moved[4] *= 3.0
    assert left_out(columns, moved)[4] == pytest.approx(outside[4])
    assert left_out(columns, moved)[3] != pytest.approx(outside[3])


def test_errors_by_hand() -> None:
    found = errors(np.array([1.1, 1.8, 3.0, 4.4]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["median_abs_err"] == pytest.approx(0.1)
    assert found["p95_abs_err"] == pytest.approx(0.1)
    assert found["spearman"] == pytest.approx(1.0) and found["n"] == 4.0
    found = errors(np.array([1.0, 1.0, 4.0, 3.0, 5.0]), np.array([1.0, 2.0, 4.0, 4.0, 5.0]))
    assert found["median_abs_err"] == 0.0
    assert found["p95_abs_err"] == pytest.approx(0.45)  # of 0, 0, 0, 0.25, 0.5
    assert errors(np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, 3.0]))["spearman"] == pytest.approx(0.5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_the_rank_correlation_shares_ranks_as_scipy_does(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    assume(len(np.unique(a)) > 1 and len(np.unique(b)) > 1)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


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
