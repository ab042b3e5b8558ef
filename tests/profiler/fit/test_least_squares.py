from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sluice.profiler.fit.least_squares import errors, fit_linear, left_out, mean_error, rank_correlation


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


def test_a_stiff_coefficient_gives_way_to_data_only() -> None:
    """Without data for it, it is nothing; with plenty, it is what it is."""
    raw, kind = rng().uniform(0.5, 5.0, (2, 400))
    measured = 0.9 * raw + 0.15 * kind
    assert fit_linear([raw, kind], measured, [0.0, 0.1]) == pytest.approx([0.9, 0.15], rel=0.01)
    few = fit_linear([raw[:3], kind[:3]], measured[:3], [0.0, 3.0])
    assert 0.0 < few[1] < 0.075
    assert fit_linear([raw, np.zeros(400)], raw, [0.0, 0.1]) == pytest.approx([1.0, 0.0], abs=1e-12)


def test_the_mean_error_by_hand() -> None:
    assert mean_error(np.array([1.1, 1.8, 3.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.2 / 3)
