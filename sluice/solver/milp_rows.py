"""Columns and rows of a mixed-integer program over the levels of a latency model.

1. Every site has one binary column per level, of which exactly one is set.
2. A rule of the model is a row over the columns of its switches.
3. A column has two costs: as time, and as ``reload``, its part of the cache penalty (`LatencyModel`, rule 5).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from sluice.core.latency import LatencyModel, Rule

__all__ = ["Rows"]


class Rows:
    """Columns and rows while they are collected; columns and rows are only ever added.

    Attributes:
        cost: ``(time, reload)`` of every column, raw milliseconds.
        integral: whether the column is an integer.
        levels: by site, its columns, in the order of the model's levels.
    """

    def __init__(self, model: LatencyModel) -> None:
        self.model = model
        self.cost: list[np.ndarray] = []
        self.integral: list[bool] = []
        self._rows: list[tuple[Mapping[int, float], float, float]] = []
        self.levels: dict[str, range] = {}
        for group in model.dense:
            self.levels[group] = self.columns(len(model.levels[group]), integral=True)
            self.row(dict.fromkeys(self.levels[group], 1.0), 1.0, 1.0)
        for rule in model.rules:
            self.row(*self._rule(rule))

    def columns(self, count: int, *, integral: bool = False) -> range:
        """So many new columns, which cost nothing yet."""
        start = len(self.cost)
        self.cost += [np.zeros(2) for _ in range(count)]
        self.integral += [integral] * count
        return range(start, start + count)

    def row(self, row: Mapping[int, float], lo: float, hi: float) -> None:
        """``lo <= sum of coefficient * column <= hi``."""
        self._rows.append((row, lo, hi))

    def constraint(self) -> LinearConstraint:
        indptr = np.cumsum([0] + [len(row) for row, _, _ in self._rows])
        indices = np.fromiter((c for row, _, _ in self._rows for c in row), dtype=np.int32)
        data = np.fromiter((v for row, _, _ in self._rows for v in row.values()), dtype=float)
        matrix = csr_array((data, indices, indptr.astype(np.int32)), shape=(len(self._rows), len(self.cost)))
        return LinearConstraint(matrix, [lo for _, lo, _ in self._rows], [hi for _, _, hi in self._rows])

    def _rule(self, rule: Rule) -> tuple[dict[int, float], float, float]:
        row: dict[int, float] = {}
        for switch, coef in rule.coefs:
            for column, value in zip(self.levels[switch], self.model.levels[switch], strict=True):
                if value:
                    row[column] = row.get(column, 0.0) + coef * value
        return row, float(rule.total), float(rule.total)
