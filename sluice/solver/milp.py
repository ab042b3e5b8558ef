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
5. Terms under the same switches and over the same axes are added up before there are columns. A term over one axis is
   added, for each of its switches, to a product over that axis and another under that switch: the joint on a tensor to
   the pieces that may make it.
6. Products of which at most one exists, because their switches are distinct members of one exactly-one rule, share the
   rows of an axis: the sum of their marginals is at most its weights. These rows are fewer and the relaxation is
   tighter, since states of a layer cannot each claim the same level.
7. The cache penalty is one column more. It is at least the sum of the terms' ``reload`` less ``cached_ms``, and exactly
   that in every optimum, since more only costs time. So every column has two costs, as time and as ``reload``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import LinearConstraint

from sluice.core.latency import LatencyModel, Term
from sluice.solver.milp_axes import Axes, GridAxis, Key, on_grid
from sluice.solver.milp_rows import Rows

__all__ = ["MixedIntegerProgram"]


@dataclass(slots=True)
class _Bundle:
    """Products over one axis of which at most one exists: their columns by point, shape ``(points, rest)``."""

    axis: GridAxis
    rules: set[int]
    switches: set[str]
    grids: list[np.ndarray] = field(default_factory=list)


class MixedIntegerProgram:
    """Columns and rows of one model: ``cost`` (raw ms per column), ``constant``, ``integrality``, rows and widths.

    First one binary ``x`` per level of every site, then the columns of the terms' costs (``lambda`` with segment
    binaries, selections among sums, products ``z``). All columns lie between 0 and ``most``, which is 1, and infinite
    for the column of rule 7.
    """

    def __init__(self, model: LatencyModel) -> None:
        self.model = model
        self._constant = np.zeros(2)
        self._rows = Rows(model)
        self._axes = Axes(self._rows)
        # Exactly one of these is set; switches that cannot be are left out, as in `_live`.
        self._exclusive = [
            frozenset(s for s, _ in rule.coefs if model.levels[s][-1])
            for rule in model.rules
            if rule.total == 1 and all(coef == 1 for _, coef in rule.coefs)
        ]
        self._parts: dict[tuple[frozenset[str], tuple[Key, ...]], tuple[Sequence[GridAxis], np.ndarray]] = {}
        self._bundles: dict[Key, list[_Bundle]] = {}
        for term in model.terms:
            self._gather(term)
        self._fold()
        for (when, _), (axes, costs) in self._parts.items():
            self._place(when, axes, costs)
        self._marginals()
        self.most = np.ones(len(self._rows.cost))
        if any(reload for _, reload in self._rows.cost):
            self._add_penalty()
            self.most = np.append(self.most, np.inf)
        else:
            self._constant[0] += max(0.0, float(self._constant[1]) - model.cached_ms)
        self.cost = np.asarray(self._rows.cost).reshape(-1, 2)[:, 0]
        self.constant = float(self._constant[0])
        self.integrality = np.asarray(self._rows.integral, dtype=int)

    def over_levels(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Objective with ``values[g][l]`` on ``x[g,l]``, zero where no value is given, shape ``(columns,)``."""
        objective = np.zeros(len(self._rows.cost))
        for group, own in values.items():
            columns = self._rows.levels[group]
            objective[columns.start : columns.stop] = own
        return objective

    def rows(self) -> LinearConstraint:
        return self._rows.constraint()

    def widths(self, solution: np.ndarray) -> dict[str, int]:
        picked = {g: int(np.argmax(solution[c.start : c.stop])) for g, c in self._rows.levels.items()}
        return {g: int(self.model.levels[g][level]) for g, level in picked.items()}

    def _live(self, term: Term) -> frozenset[str] | None:
        """The switches that decide whether the term exists: none where it always does, None where it never does."""
        live = frozenset(s for s in term.when if self.model.levels[s][-1])
        if term.when and not live:
            return None
        always = any(self.model.levels[s][0] for s in live) or live in self._exclusive
        return frozenset() if always else live

    def _gather(self, term: Term) -> None:
        """Add the term to the terms with the same switches and axes, so that columns are made once (rule 5)."""
        when = self._live(term)
        if when is None:
            return
        axes = sorted(self._axes.of(term), key=lambda axis: axis.key)
        ms = on_grid(term, term.ms, axes)
        reload = np.zeros(len(ms)) if term.reload is None else on_grid(term, term.reload, axes)
        costs = term.weight * np.stack([ms, reload])
        self._collect(when, axes, costs.reshape([2, *(len(a.weights) for a in axes)]))

    def _collect(self, when: frozenset[str], axes: Sequence[GridAxis], costs: np.ndarray) -> None:
        key = (when, tuple(axis.key for axis in axes))
        known = self._parts.get(key)
        self._parts[key] = (axes, costs if known is None else known[1] + costs)

    def _fold(self) -> None:
        """A term over one axis joins, switch by switch, a product over that axis and another (rule 5)."""
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

    def _place(self, when: frozenset[str], axes: Sequence[GridAxis], costs: np.ndarray) -> None:
        """Columns and rows of the terms with these switches and axes."""
        if len(axes) == 0 and not when:
            self._constant += costs
        elif len(axes) == 0:
            for column in self._on(when):
                self._rows.cost[column] += costs
        elif len(axes) == 1 and not when:
            for weights, cost in zip(axes[0].weights, costs.T, strict=True):
                for column, coef in weights.items():
                    self._rows.cost[column] += coef * cost
        else:
            shape = costs.shape[1:]
            z = self._rows.columns(math.prod(shape))
            self._rows.cost[z.start : z.stop] = list(costs.reshape(2, -1).T)
            grid = np.asarray(z).reshape(shape)
            if when:
                self._rows.row(dict.fromkeys(z, 1.0) | dict.fromkeys(self._on(when), -1.0), 0.0, 0.0)
            for k, axis in enumerate(axes):
                self._bundle(axis, when).append(np.moveaxis(grid, k, 0).reshape(len(axis.weights), -1))

    def _add_penalty(self) -> None:
        """Rule 7; the column is in units of the largest reload, as the solver's tolerances are absolute."""
        unit = max(abs(float(reload)) for _, reload in self._rows.cost)
        row = {column: float(reload) / unit for column, (_, reload) in enumerate(self._rows.cost) if reload}
        (penalty,) = self._rows.columns(1)
        self._rows.cost[penalty] = np.asarray([unit, 0.0])
        self._rows.row({**row, penalty: -1.0}, -np.inf, (self.model.cached_ms - float(self._constant[1])) / unit)

    def _on(self, when: frozenset[str]) -> list[int]:
        """Columns whose sum is 1 where one of the switches is set."""
        return [self._rows.levels[s][-1] for s in sorted(when)]

    def _bundle(self, axis: GridAxis, when: frozenset[str]) -> list[np.ndarray]:
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
                    self._rows.row(row, -np.inf if bundle.switches else 0.0, 0.0)
