"""The axes of a term: weights, linear in the program's columns, of the points at which the term is known.

1. The axis of a group is its levels; the weights are the binaries of the levels themselves.
2. An extent that concatenates groups gets an axis over the values that the levels can add up to: a selection, with one
   binary per value, or an interpolation.
3. An interpolation has weights for the knots, two adjacent ones of which are non-zero (SOS2). Binaries of segments say
   which two. Without them a staircase that is not convex would be undercut by a secant.
4. An axis over one group with fewer knots than levels has weights of knots that are linear in the levels' binaries, so
   it needs no binaries of its own.
5. A term whose grid of levels has at most `GRID_LIMIT` points has axes of the first kind only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.latency import Extent, Term
from sluice.solver.milp_rows import Rows

__all__ = ["Axes", "GridAxis", "Key", "on_grid"]

Key = tuple[tuple[tuple[int, float], ...], ...]
GRID_LIMIT = 400  # points of a product of levels beyond which an interpolating axis is cheaper


@dataclass(frozen=True, slots=True)
class GridAxis:
    """Linear expressions in columns that are non-negative and add up to one.

    ``weights[k]`` maps columns to their coefficient in the weight of point k; ``coords`` gives the level of a group
    (key: its name) or the value of an extent (key: its index) at the points.
    """

    weights: tuple[Mapping[int, float], ...]
    coords: Mapping[str | int, np.ndarray]

    @property
    def key(self) -> Key:
        return tuple(tuple(weights.items()) for weights in self.weights)


class Axes:
    """Makes the axes of terms. Terms over the same sum of groups share the columns of its axis."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sums: dict[tuple[Extent, bytes], GridAxis] = {}

    def of(self, term: Term) -> list[GridAxis]:
        """The axes on whose grid the term is known; their columns and rows are added to the program."""
        groups = list(dict.fromkeys(g for e in term.extents for g, _ in e.coefs))
        if len(groups) <= 1 or math.prod(len(self._rows.levels[g]) for g in groups) <= GRID_LIMIT:
            return [self._levels(g) for g in groups]
        concats = [k for k, e in enumerate(term.extents) if len({g for g, _ in e.coefs}) > 1]
        single = list(dict.fromkeys(e.coefs[0][0] for e in term.extents if len({g for g, _ in e.coefs}) == 1))
        axes = []
        if concats:
            widest = max(concats, key=lambda k: len(self._sum_values(term.extents[k])))
            axes.append(self._interpolated(widest, term.extents[widest], term.knots[widest]))
            axes += [self._selected(k, term.extents[k]) for k in concats if k != widest]
            return axes + [self._levels(g) for g in single]
        # Single groups only: the weights of the knots are linear in x, so that axis needs no binaries of its own.
        longest = max(single, key=lambda g: len(self._rows.levels[g]))
        owned = [k for k, e in enumerate(term.extents) if e.coefs and e.coefs[0][0] == longest]
        if len(owned) == 1 and len(term.knots[owned[0]]) < len(self._rows.levels[longest]):
            axes.append(self._knots(owned[0], term.extents[owned[0]], term.knots[owned[0]], longest))
            single.remove(longest)
        return axes + [self._levels(g) for g in single]

    def _levels(self, group: str) -> GridAxis:
        weights = tuple({column: 1.0} for column in self._rows.levels[group])
        return GridAxis(weights, {group: np.asarray(self._rows.model.levels[group], float)})

    def _knots(self, index: int, extent: Extent, knots: np.ndarray, group: str) -> GridAxis:
        values = np.asarray([extent.at({group: level}) for level in self._rows.model.levels[group]], float)
        hats = _hats(np.asarray(knots, float), values)
        columns = self._rows.levels[group]
        weights = tuple({c: float(h) for c, h in zip(columns, hat, strict=True) if h} for hat in hats.T)
        return GridAxis(weights, {index: np.asarray(knots, float)})

    def _interpolated(self, index: int, extent: Extent, knots: np.ndarray) -> GridAxis:
        values = self._sum_values(extent)
        points = np.unique(np.concatenate([np.asarray(knots, float), values[[0, -1]]]))
        points = points[(points >= values[0]) & (points <= values[-1])]
        if len(points) == 1 or len(values) <= len(points):
            return self._selected(index, extent)
        key = (extent, points.tobytes())
        if key not in self._sums:
            weights = self._rows.columns(len(points))
            segments = self._rows.columns(len(points) - 1, integral=True)
            self._rows.row(dict.fromkeys(weights, 1.0), 1.0, 1.0)
            self._rows.row(dict.fromkeys(segments, 1.0), 1.0, 1.0)
            for i in range(len(points) - 1):  # the facets of the SOS2 polytope, tighter than lambda_i <= b_{i-1} + b_i
                low = dict.fromkeys(weights[: i + 1], 1.0) | dict.fromkeys(segments[: i + 1], -1.0)
                high = dict.fromkeys(weights[i + 1 :], 1.0) | dict.fromkeys(segments[i:], -1.0)
                self._rows.row(low, -np.inf, 0.0)
                self._rows.row(high, -np.inf, 0.0)
            self._equal(dict(zip(weights, points.tolist(), strict=True)), extent, values[-1])
            self._sums[key] = GridAxis(tuple({c: 1.0} for c in weights), {"": points})
        return GridAxis(self._sums[key].weights, {index: points})

    def _selected(self, index: int, extent: Extent) -> GridAxis:
        values = self._sum_values(extent)
        key = (extent, b"selected")
        if key not in self._sums:
            columns = self._rows.columns(len(values), integral=True)
            self._rows.row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
            self._equal(dict(zip(columns, values.tolist(), strict=True)), extent, values[-1])
            self._sums[key] = GridAxis(tuple({c: 1.0} for c in columns), {"": values})
        return GridAxis(self._sums[key].weights, {index: values})

    def _equal(self, row: dict[int, float], extent: Extent, scale: float) -> None:
        """The weighted points equal the extent of the chosen widths; divided by the largest value for the solver."""
        for group, coef in extent.coefs:
            for column, level in zip(self._rows.levels[group], self._rows.model.levels[group], strict=True):
                row[column] = row.get(column, 0.0) - coef * level
        scale = max(abs(scale), 1.0)
        const = extent.const / scale
        self._rows.row({c: v / scale for c, v in row.items()}, const, const)

    def _sum_values(self, extent: Extent) -> np.ndarray:
        """All values that the extent can take, increasing."""
        coefs: dict[str, int] = {}
        for group, coef in extent.coefs:
            coefs[group] = coefs.get(group, 0) + coef
        values = np.asarray([extent.const], float)
        for group, total in coefs.items():
            values = np.unique(values[:, None] + total * np.asarray(self._rows.model.levels[group], float)[None, :])
        return values


def on_grid(term: Term, known: np.ndarray, axes: Sequence[GridAxis]) -> np.ndarray:
    """The term's values, ``known`` at its knots, at every point of the axes' grid, flattened."""
    shape = [len(a.weights) for a in axes]
    at: dict[str | int, np.ndarray] = {}
    for k, axis in enumerate(axes):
        for key, coords in axis.coords.items():
            at[key] = np.broadcast_to(coords.reshape([-1] + [1] * (len(axes) - k - 1)), shape).reshape(-1)
    count = math.prod(shape)
    value = np.broadcast_to(np.asarray(known, float).reshape(1, -1), (count, np.size(known)))
    for k, (extent, knots) in enumerate(zip(term.extents, term.knots, strict=True)):
        x = at.get(k)
        if x is None:
            x = np.full(count, float(extent.const))
            for group, coef in extent.coefs:
                x = x + coef * at[group]
        hats = _hats(np.asarray(knots, float), x)
        value = np.einsum("nk,nkr->nr", hats, value.reshape(count, len(knots), -1))
    return value.reshape(count)


def _hats(knots: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights of the knots at every x, shape ``(len(x), len(knots))``; the end knots hold beyond the ends."""
    return np.stack([np.interp(x, knots, unit) for unit in np.eye(len(knots))], axis=1)
