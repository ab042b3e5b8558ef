"""Least squares of the relative residual, and the error of a prediction.

    c = argmin  sum_i (sum_k c_k * column_k[i] / measured[i] - 1)^2  +  sum_k (stiffness_k * c_k)^2

1. The residual is relative, so small engines count as much as large ones.
2. A column with a stiffness is a correction that the data must pay for: with a residual of 2% and a coefficient that is
   rarely above 0.2, ``stiffness = 0.02 / 0.2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["errors", "fit_linear", "left_out", "mean_error", "rank_correlation"]


def fit_linear(
    columns: Sequence[np.ndarray], measured: np.ndarray, stiffness: Sequence[float] | None = None
) -> np.ndarray:
    """The coefficients, one per column; ``stiffness`` is 0 for every column unless given."""
    design = np.stack([column / measured for column in columns], axis=1)
    held = np.diag(np.zeros(len(columns)) if stiffness is None else np.asarray(stiffness, dtype=np.float64))
    target = np.concatenate([np.ones(len(measured)), np.zeros(len(columns))])
    return np.asarray(np.linalg.lstsq(np.concatenate([design, held]), target, rcond=None)[0])


def left_out(
    columns: Sequence[np.ndarray], measured: np.ndarray, stiffness: Sequence[float] | None = None
) -> np.ndarray:
    """Every engine as predicted by a fit to all the others."""
    found = np.empty(len(measured))
    for i in range(len(measured)):
        rest = np.arange(len(measured)) != i
        coefficients = fit_linear([c[rest] for c in columns], measured[rest], stiffness)
        found[i] = sum(k * c[i] for k, c in zip(coefficients, columns, strict=True))
    return found


def mean_error(promised: np.ndarray, measured: np.ndarray) -> float:
    """Mean of ``|promised / measured - 1|``."""
    return float(np.mean(np.abs(promised / measured - 1.0)))


def errors(promised: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of ``|promised / measured - 1|``, Spearman's rank correlation, number of engines.

    There is no rank correlation where all engines are promised, or take, the same.
    """
    relative = np.abs(promised / measured - 1.0)
    ranked = len(np.unique(promised)) > 1 and len(np.unique(measured)) > 1
    return {
        "median_abs_err": float(np.median(relative)),
        "p95_abs_err": float(np.quantile(relative, 0.95)),
        **({"spearman": rank_correlation(promised, measured)} if ranked else {}),
        "n": float(len(measured)),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing the mean of theirs."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, index, count = np.unique(values, return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(count) - (count - 1) / 2)[index])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
