"""The mixed-integer program of a latency model: its cost is the model itself, not an approximation of it.

1. One binary ``x[g,l]`` per level of every site (width, rank, switch), one of them set. A rule of the model is a row
   over the switches' ``x``. A term over one site is a cost on that site's ``x``; a term over none is a constant.
2. A term over several sites gets product variables ``z >= 0`` over the grid of its *axes*, whose marginals equal the
   axes' weights. Where the axes are the sites' ``x`` this is exact, because all but one binary per axis are zero.
3. A term whose grid of levels would be large has at most **one** interpolating axis: the weights ``lambda`` of the
   term's own knots, adjacent by segment binaries (SOS2, so that a non-convex staircase is not undercut by a secant).
   With every other axis integral, ``z`` is still the product of the weights, so this is exact too. Further extents
   that concatenate groups become a selection among the values their levels can add up to.
4. A term that exists under switches, their sum ``on`` 0 or 1, has ``sum(z) = on`` and marginals *at most* the axes'
   weights. With ``on = 0`` all of ``z`` is zero. With ``on = 1`` every marginal has the same sum as the weights that
   bound it, so it equals them and rules 2 and 3 hold; this goes for a single axis as well. Over no axis the term is a
   cost on its switches.
5. Terms under the same switches and over the same axes are added up before there are columns. What depends on one
   axis is added, for each of its switches, to a product over that axis and another under that switch: the joint on a
   tensor to the pieces that may make it.
6. Products of which at most one exists, because their switches are distinct members of one exactly-one rule, share the
   rows of an axis: the sum of their marginals is at most its weights. These rows are fewer and the relaxation is
   tighter, since states of a layer cannot each claim the same level.
7. What is read again beyond what the caches spare is one column more. It is at least their difference, and exactly that
   in every optimum, since more only costs time. So what a column costs is known twice, as time and as ``reload``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from sluice.core.latency import Extent, LatencyModel, Rule, Term

__all__ = ["MixedIntegerProgram"]

_Key = tuple[tuple[tuple[int, float], ...], ...]
GRID_LIMIT = 400  # points of a product of levels beyond which an interpolating axis is cheaper


@dataclass(frozen=True, slots=True)
class _Axis:
    """Linear expressions in columns that are non-negative and add up to one.

    ``weights[k]`` maps columns to their coefficient in the weight of point k; ``coords`` gives the level of a group
    (key: its name) or the value of an extent (key: its index) at the points.
    """

    weights: tuple[Mapping[int, float], ...]
    coords: Mapping[str | int, np.ndarray]

    @property
    def key(self) -> _Key:
        return tuple(tuple(weights.items()) for weights in self.weights)


@dataclass(slots=True)
class _Bundle:
    """Products over one axis of which at most one exists: their columns by point, shape ``(points, rest)``."""

    axis: _Axis
    rules: set[int]
    switches: set[str]
    grids: list[np.ndarray] = field(default_factory=list)


class MixedIntegerProgram:
    """Columns and rows of one model: ``cost`` (raw ms per column), ``constant``, ``integrality``, rows and widths.

    First one binary ``x`` per level of every site, then what the terms' costs need (``lambda`` with segment binaries,
    selections among sums, products ``z``). All columns lie between 0 and ``most``, which is 1 but for that of rule 7.
    """

    def __init__(self, model: LatencyModel) -> None:
        self.model = model
        self._constant = np.zeros(2)
        self._cost: list[np.ndarray] = []  # (time, reload) of every column
        self._integral: list[bool] = []
        self._rows: list[tuple[Mapping[int, float], float, float]] = []
        self._sums: dict[tuple[Extent, bytes], _Axis] = {}
        self._x: dict[str, range] = {}
        for group in model.dense:
            self._x[group] = self._columns(len(model.levels[group]), integral=True)
            self._row(dict.fromkeys(self._x[group], 1.0), 1.0, 1.0)
        for rule in model.rules:
            self._row(*self._rule(rule))
        # Exactly one of these is set; switches that cannot be are left out, as in `_live`.
        self._exclusive = [
            frozenset(s for s, _ in rule.coefs if model.levels[s][-1])
            for rule in model.rules
            if rule.total == 1 and all(coef == 1 for _, coef in rule.coefs)
        ]
        self._parts: dict[tuple[frozenset[str], tuple[_Key, ...]], tuple[Sequence[_Axis], np.ndarray]] = {}
        self._bundles: dict[_Key, list[_Bundle]] = {}
        for term in model.terms:
            self._gather(term)
        self._fold()
        for (when, _), (axes, costs) in self._parts.items():
            self._place(when, axes, costs)
        self._marginals()
        self.most = np.ones(len(self._cost))
        if any(reload for _, reload in self._cost):
            self._read_again()
            self.most = np.append(self.most, np.inf)
        else:
            self._constant[0] += max(0.0, float(self._constant[1]) - model.cached_ms)
        self.cost = np.asarray(self._cost).reshape(-1, 2)[:, 0]
        self.constant = float(self._constant[0])
        self.integrality = np.asarray(self._integral, dtype=int)

    def over_levels(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Objective with ``values[g][l]`` on ``x[g,l]``, zero where no value is given, shape ``(columns,)``."""
        objective = np.zeros(len(self._cost))
        for group, own in values.items():
            columns = self._x[group]
            objective[columns.start : columns.stop] = own
        return objective

    def rows(self) -> LinearConstraint:
        indptr = np.cumsum([0] + [len(row) for row, _, _ in self._rows])
        indices = np.fromiter((c for row, _, _ in self._rows for c in row), dtype=np.int32)
        data = np.fromiter((v for row, _, _ in self._rows for v in row.values()), dtype=float)
        matrix = csr_array((data, indices, indptr.astype(np.int32)), shape=(len(self._rows), len(self._cost)))
        return LinearConstraint(matrix, [lo for _, lo, _ in self._rows], [hi for _, _, hi in self._rows])

    def widths(self, solution: np.ndarray) -> dict[str, int]:
        picked = {g: int(np.argmax(solution[c.start : c.stop])) for g, c in self._x.items()}
        return {g: int(self.model.levels[g][level]) for g, level in picked.items()}

    def _rule(self, rule: Rule) -> tuple[dict[int, float], float, float]:
        row: dict[int, float] = {}
        for switch, coef in rule.coefs:
            for column, value in zip(self._x[switch], self.model.levels[switch], strict=True):
                if value:
                    row[column] = row.get(column, 0.0) + coef * value
        return row, float(rule.total), float(rule.total)

    def _columns(self, count: int, *, integral: bool = False) -> range:
        start = len(self._cost)
        self._cost += [np.zeros(2) for _ in range(count)]
        self._integral += [integral] * count
        return range(start, start + count)

    def _row(self, row: Mapping[int, float], lo: float, hi: float) -> None:
        self._rows.append((row, lo, hi))

    def _live(self, term: Term) -> frozenset[str] | None:
        """The switches that decide whether the term exists: none where it always does, None where it never does."""
        live = frozenset(s for s in term.when if self.model.levels[s][-1])
        if term.when and not live:
            return None
        always = any(self.model.levels[s][0] for s in live) or live in self._exclusive
        return frozenset() if always else live

    def _gather(self, term: Term) -> None:
        """Add the term to what has the same switches and axes, so that columns are made once (rule 5)."""
        when = self._live(term)
        if when is None:
            return
        axes = sorted(self._axes(term), key=lambda axis: axis.key)
        ms = _on_grid(term, term.ms, axes)
        reload = np.zeros(len(ms)) if term.reload is None else _on_grid(term, term.reload, axes)
        costs = term.weight * np.stack([ms, reload])
        self._collect(when, axes, costs.reshape([2, *(len(a.weights) for a in axes)]))

    def _collect(self, when: frozenset[str], axes: Sequence[_Axis], costs: np.ndarray) -> None:
        key = (when, tuple(axis.key for axis in axes))
        known = self._parts.get(key)
        self._parts[key] = (axes, costs if known is None else known[1] + costs)

    def _fold(self) -> None:
        """What depends on one axis joins, switch by switch, a product over that axis and another (rule 5)."""
        homes = {
            (when, k): (when, keys) for when, keys in self._parts if len(when) == 1 and len(keys) > 1 for k in keys
        }
        for when, keys in [key for key in self._parts if key[0] and len(key[1]) == 1]:
            own, costs = self._parts.pop((when, keys))
            homeless = []
            for switch in when:
                home = homes.get((frozenset((switch,)), keys[0]))
                if home is None:
                    homeless.append(switch)
                    continue
                axes, total = self._parts[home]
                at = home[1].index(keys[0])
                along = [2, *(-1 if k == at else 1 for k in range(len(axes)))]
                self._parts[home] = (axes, total + costs.reshape(along))
            if homeless:
                self._collect(frozenset(homeless), own, costs)

    def _place(self, when: frozenset[str], axes: Sequence[_Axis], costs: np.ndarray) -> None:
        """Columns and rows of what exists under the same switches and depends on the same axes."""
        if len(axes) == 0 and not when:
            self._constant += costs
        elif len(axes) == 0:
            for column in self._on(when):
                self._cost[column] += costs
        elif len(axes) == 1 and not when:
            for weights, cost in zip(axes[0].weights, costs.T, strict=True):
                for column, coef in weights.items():
                    self._cost[column] += coef * cost
        else:
            shape = costs.shape[1:]
            z = self._columns(math.prod(shape))
            self._cost[z.start : z.stop] = list(costs.reshape(2, -1).T)
            grid = np.asarray(z).reshape(shape)
            if when:
                self._row(dict.fromkeys(z, 1.0) | dict.fromkeys(self._on(when), -1.0), 0.0, 0.0)
            for k, axis in enumerate(axes):
                self._bundle(axis, when).append(np.moveaxis(grid, k, 0).reshape(len(axis.weights), -1))

    def _read_again(self) -> None:
        """Rule 7; the column is in units of the largest reload, as the solver's tolerances are absolute."""
        unit = max(abs(float(reload)) for _, reload in self._cost)
        row = {column: float(reload) / unit for column, (_, reload) in enumerate(self._cost) if reload}
        (again,) = self._columns(1)
        self._cost[again] = np.asarray([unit, 0.0])
        self._row({**row, again: -1.0}, -np.inf, (self.model.cached_ms - float(self._constant[1])) / unit)

    def _on(self, when: frozenset[str]) -> list[int]:
        """Columns whose sum is 1 where one of the switches is set."""
        return [self._x[s][-1] for s in sorted(when)]

    def _bundle(self, axis: _Axis, when: frozenset[str]) -> list[np.ndarray]:
        """Where the marginals of a product go: with those of which at most one exists (rule 6)."""
        rules = {k for k, names in enumerate(self._exclusive) if when and when <= names}
        for bundle in self._bundles.setdefault(axis.key, []):
            if bundle.rules & rules and not bundle.switches & when:
                bundle.rules &= rules
                bundle.switches |= when
                return bundle.grids
        self._bundles[axis.key].append(_Bundle(axis, rules, set(when)))
        return self._bundles[axis.key][-1].grids

    def _marginals(self) -> None:
        for bundles in self._bundles.values():
            for bundle in bundles:
                for point, weights in enumerate(bundle.axis.weights):
                    row = dict.fromkeys(np.concatenate([g[point] for g in bundle.grids]).tolist(), 1.0)
                    row.update({column: -coef for column, coef in weights.items()})
                    self._row(row, -np.inf if bundle.switches else 0.0, 0.0)

    def _axes(self, term: Term) -> list[_Axis]:
        groups = list(dict.fromkeys(g for e in term.extents for g, _ in e.coefs))
        if len(groups) <= 1 or math.prod(len(self._x[g]) for g in groups) <= GRID_LIMIT:
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
        longest = max(single, key=lambda g: len(self._x[g]))
        owned = [k for k, e in enumerate(term.extents) if e.coefs and e.coefs[0][0] == longest]
        if len(owned) == 1 and len(term.knots[owned[0]]) < len(self._x[longest]):
            axes.append(self._knots(owned[0], term.extents[owned[0]], term.knots[owned[0]], longest))
            single.remove(longest)
        return axes + [self._levels(g) for g in single]

    def _levels(self, group: str) -> _Axis:
        weights = tuple({column: 1.0} for column in self._x[group])
        return _Axis(weights, {group: np.asarray(self.model.levels[group], float)})

    def _knots(self, index: int, extent: Extent, knots: np.ndarray, group: str) -> _Axis:
        values = np.asarray([extent.at({group: level}) for level in self.model.levels[group]], float)
        hats = _hats(np.asarray(knots, float), values)
        columns = self._x[group]
        weights = tuple({c: float(h) for c, h in zip(columns, hat, strict=True) if h} for hat in hats.T)
        return _Axis(weights, {index: np.asarray(knots, float)})

    def _interpolated(self, index: int, extent: Extent, knots: np.ndarray) -> _Axis:
        values = self._sum_values(extent)
        points = np.unique(np.concatenate([np.asarray(knots, float), values[[0, -1]]]))
        points = points[(points >= values[0]) & (points <= values[-1])]
        if len(points) == 1 or len(values) <= len(points):
            return self._selected(index, extent)
        key = (extent, points.tobytes())
        if key not in self._sums:
            weights = self._columns(len(points))
            segments = self._columns(len(points) - 1, integral=True)
            self._row(dict.fromkeys(weights, 1.0), 1.0, 1.0)
            self._row(dict.fromkeys(segments, 1.0), 1.0, 1.0)
            for i in range(len(points) - 1):  # the facets of the SOS2 polytope, tighter than lambda_i <= b_{i-1} + b_i
                low = dict.fromkeys(weights[: i + 1], 1.0) | dict.fromkeys(segments[: i + 1], -1.0)
                high = dict.fromkeys(weights[i + 1 :], 1.0) | dict.fromkeys(segments[i:], -1.0)
                self._row(low, -np.inf, 0.0)
                self._row(high, -np.inf, 0.0)
            self._equal(dict(zip(weights, points.tolist(), strict=True)), extent, values[-1])
            self._sums[key] = _Axis(tuple({c: 1.0} for c in weights), {"": points})
        return _Axis(self._sums[key].weights, {index: points})

    def _selected(self, index: int, extent: Extent) -> _Axis:
        values = self._sum_values(extent)
        key = (extent, b"selected")
        if key not in self._sums:
            columns = self._columns(len(values), integral=True)
            self._row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
            self._equal(dict(zip(columns, values.tolist(), strict=True)), extent, values[-1])
            self._sums[key] = _Axis(tuple({c: 1.0} for c in columns), {"": values})
        return _Axis(self._sums[key].weights, {index: values})

    def _equal(self, row: dict[int, float], extent: Extent, scale: float) -> None:
        """The weighted points equal the extent of the chosen widths; divided by the largest value for the solver."""
        for group, coef in extent.coefs:
            for column, level in zip(self._x[group], self.model.levels[group], strict=True):
                row[column] = row.get(column, 0.0) - coef * level
        scale = max(abs(scale), 1.0)
        const = extent.const / scale
        self._row({c: v / scale for c, v in row.items()}, const, const)

    def _sum_values(self, extent: Extent) -> np.ndarray:
        """All values that the extent can take, increasing."""
        coefs: dict[str, int] = {}
        for group, coef in extent.coefs:
            coefs[group] = coefs.get(group, 0) + coef
        values = np.asarray([extent.const], float)
        for group, total in coefs.items():
            values = np.unique(values[:, None] + total * np.asarray(self.model.levels[group], float)[None, :])
        return values


def _on_grid(term: Term, known: np.ndarray, axes: Sequence[_Axis]) -> np.ndarray:
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
