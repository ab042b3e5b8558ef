"""The configuration of least loss within a budget: a price per millisecond, and an exact search of what it leaves.

The budget is the one constraint that ties all layers together. With a price ``lam`` in its place,

    g(lam) = min_w  loss(w) + lam (T(w) - room)          g(lam) <= the least loss within the budget, for any lam >= 0

falls apart into layers and their neighbours, and is solved exactly (`sluice.solver.elimination`).

1. ``g`` is concave and piecewise linear. Its maximum lies where the line of a configuration within the budget and that
   of one beyond it cross: the price there is tried next, until ``g`` is on both lines.
2. The cache penalty ``max(0, reload - cached)`` is at least ``mu (reload - cached)`` for every ``mu`` in [0, 1], so a
   bound with any ``mu`` holds. Several are tried; the best counts.
3. What is better than ``aim`` has no part at which the least of ``loss + lam (T - room)`` is beyond ``aim``. What is
   left is searched (`sluice.solver.labels`), with an aim near the bound first and the best loss that was met last. So
   the answer is the optimum. In practice it lies a few percent above the bound, and the search takes milliseconds.
4. Layers that share too much, as long runs that may merge do, leave too many combinations. There the answer is None;
   where the search alone is too long, the best configuration that was met, its gap and the levels that are left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.latency import LatencyModel
from sluice.solver.descent import loss_of
from sluice.solver.elimination import Elimination
from sluice.solver.labels import best_within
from sluice.solver.site_tables import RELOAD, TIME, SiteTables

__all__ = ["Least", "fastest", "least_loss"]

COMBINATIONS, LABELS = 4e6, 200_000  # of all cliques together, and of one: beyond them another way is quicker
STEPS = 40
AIMS = (1 / 16, 1 / 4, 1.0)  # from the bound to the best loss that was met, the highest if none was
CLOSE = 1e-9  # relative, of sums of the same numbers in another order
MUS = ((0.0, 1.0), (0.5,), (0.25, 0.75))
FEW = 1e-12  # of a loss in milliseconds: what is not allowed stays so, and of equally fast ones the best counts


@dataclass(frozen=True, slots=True, eq=False)
class Least:
    """The best configuration that was met; ``levels`` are the places of the levels of a better one, by site."""

    widths: Mapping[str, int]
    loss: float
    gap: float
    levels: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Line:
    """The loss of a configuration, and the milliseconds by which it exceeds the budget."""

    loss: float
    over: float


@dataclass(frozen=True, slots=True)
class _Price:
    """A price, the weights of costs that it means, the bound that it proves, and what is added to a bound."""

    weights: tuple[float, float, float]
    bound: float
    room: float


def least_loss(model: LatencyModel, losses: Mapping[str, np.ndarray], target_ms: float) -> Least | None:
    """The least loss within ``target_ms`` (rule 4), None also where there is nothing within it.

    Args:
        losses: by site, one per level, shape ``(len(levels[site]),)``; sites left out cost nothing.
    """
    tables = SiteTables(model, losses)
    if not tables.complete:
        return None
    try:
        search = _Search(model, losses, target_ms, tables)
    except OverflowError:
        return None
    again = any(term.reload is not None for term in model.terms)
    price: _Price | None = None
    tried: dict[float, float] = {}
    for mus in MUS if again else ((0.0,),):
        best = max(tried, key=lambda mu: tried[mu], default=0.0)
        for mu in mus:
            if len(mus) == 1 or len(tried) < 2 or abs(mu - best) < 0.3:
                found = search.price(mu)
                if found is None:
                    return None
                tried[mu] = found.bound
                price = found if price is None or found.bound > price.bound else price
    return None if price is None else search.finish(price)


def fastest(model: LatencyModel) -> Mapping[str, int] | None:
    """The configuration of the fewest milliseconds; None where there is a cache penalty, or too much is shared."""
    tables = SiteTables(model, {})
    if not tables.complete or any(term.reload is not None for term in model.terms):
        return None
    try:
        return tables.configuration(tables.eliminate(COMBINATIONS).least((FEW, 1.0, 0.0))[1])
    except OverflowError:
        return None


class _Search:
    """The best configuration within the budget that was met, and the steps of rules 1 and 3."""

    def __init__(
        self, model: LatencyModel, losses: Mapping[str, np.ndarray], target_ms: float, tables: SiteTables
    ) -> None:
        self.model, self.losses, self.tables = model, losses, tables
        self.most_ms = target_ms + CLOSE * abs(target_ms)
        self.room = (self.most_ms - model.intercept) / model.slope
        self.elimination: Elimination = tables.eliminate(COMBINATIONS)
        self.loss, self.widths = math.inf, dict(model.dense)
        self.highest = float(sum(own.max() for own in losses.values()))

    def meet(self, values: np.ndarray) -> float:
        """The loss at the values of the variables, kept if it is the best within the budget."""
        widths = self.tables.configuration(values)
        loss = loss_of(self.model, self.losses, widths)
        if loss < self.loss and self.model.ms(widths) <= self.most_ms:
            self.loss, self.widths = loss, widths
        return loss

    def price(self, mu: float) -> _Price | None:
        """Rule 1; None where no configuration is within the budget."""
        room = self.room + mu * self.model.cached_ms

        def line(loss: float, ms: float) -> tuple[float, _Line]:
            total, values = self.elimination.least((loss, ms, ms * mu))
            found, reached = self.meet(values), self.elimination.costs_at(values)
            return total, _Line(found, float(reached[TIME] + mu * reached[RELOAD]) - room)

        bound, low = line(1.0, 0.0)
        if low.over <= 0:
            return _Price((1.0, 0.0, 0.0), bound, 0.0)
        _, high = line(FEW, 1.0)
        if high.over > 0:
            return None
        best = _Price((1.0, 0.0, 0.0), bound, 0.0)
        for _ in range(STEPS):
            at = (high.loss - low.loss) / (low.over - high.over)
            total, found = line(1.0, at)
            bound = total - at * room
            if bound > best.bound:
                best = _Price((1.0, at, at * mu), bound, at * room)
            if bound >= high.loss + at * high.over - CLOSE * (abs(high.loss) + at * abs(room)):
                break
            low, high = (found, high) if found.over > 0 else (low, found)
        return best

    def finish(self, price: _Price) -> Least | None:
        """Rule 3."""
        beliefs = self.elimination.beliefs(price.weights)
        slack = CLOSE * (abs(price.bound) + abs(price.room) + 1e-6)
        rooms = (self.room, self.room + self.model.cached_ms)
        proved = price.bound
        for share in AIMS:
            if self.loss - proved <= slack:
                break
            aim = price.bound + share * (min(self.loss, self.highest) - price.bound) + slack
            try:
                values = best_within(self.elimination, beliefs, (TIME, RELOAD), aim + price.room, rooms, LABELS)
            except OverflowError:
                break
            reached = math.inf if values is None else self.meet(values)
            proved = min(aim, reached, self.loss)
        if math.isinf(self.loss):
            return None
        gap = max(0.0, self.loss - proved - 2 * slack) / max(abs(self.loss), slack)
        most = self.loss + price.room + slack
        open_ = [marginal <= most for marginal in self.elimination.marginals(beliefs)]
        return Least(self.widths, self.loss, gap, self.tables.narrowed(open_))
