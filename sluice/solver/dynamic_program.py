"""Which segments a chain is cut into: the dynamic programme of LayerMerge (Kim et al. 2024), exact for its table.

Entries (i, j, key) with an importance and a latency tile the positions 0..L of a chain. In units of ``u = budget /
levels``, with ``g = ceil(ms / u)``,

    M[0, t] = 0        M[j, t] = max over entries (i, j, key) with g <= t of  M[i, t - g] + importance + bonus

1. Latencies are rounded up, so no tiling exceeds its budget (the authors round down, which overshoots). The
   price is at most one unit per segment, hence the fine grid.
2. ``bonus`` per segment does explicitly what ``exp(importance)`` does in the authors' objective: more segments
   keep more activations (reconstruction). Without it importances, being losses, favour few segments.
3. Of solutions equally important, to `TIE`, the one that takes less time wins.
4. One pass answers every budget up to the one given; a row of the table over all budgets is one array operation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["Entry", "Front", "Tiling", "solve"]

TIE = 1e-9


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to carry out the layers between positions ``start`` and ``end``.

    ``key`` tells it from others there, ``importance`` is the change of the score (a loss is negative), ``ms`` the time.
    """

    start: int
    end: int
    key: Hashable
    importance: float
    ms: float


@dataclass(frozen=True, slots=True)
class Tiling:
    """Entries that follow each other from 0 to L; ``importance`` is without bonus."""

    entries: tuple[Entry, ...]
    importance: float
    ms: float


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """The best tilings for all budgets ``t * unit_ms``, t = 0..levels.

    ``chosen[j, t]`` is the entry that ends at j, -1 where there is none; ``value`` (levels + 1) the objective.
    """

    entries: tuple[Entry, ...]
    costs: np.ndarray
    chosen: np.ndarray
    value: np.ndarray
    unit_ms: float

    def at(self, budget_ms: float) -> Tiling:
        """The best tiling within ``budget_ms``, which may not exceed the budget that was solved for.

        Raises:
            SluiceError: there is none, or the budget is beyond the table.
        """
        levels = len(self.value) - 1
        t = int(np.floor(budget_ms / self.unit_ms * (1 + 1e-12)))
        if t > levels:
            raise SluiceError(
                f"the budget of {budget_ms:.4g} ms is beyond the {levels * self.unit_ms:.4g} ms that were solved for; "
                "solve with the larger one"
            )
        if t < 0 or self.value[t] == -np.inf:
            raise SluiceError(
                f"no choice of segments takes {budget_ms:.4g} ms or less, the least is {self.least_ms:.4g} ms; "
                "give a larger budget"
            )
        return self._trace(t)

    @property
    def least_ms(self) -> float:
        """The smallest budget that has a solution; infinite if none has."""
        feasible = np.flatnonzero(self.value > -np.inf)
        return float(feasible[0] * self.unit_ms) if len(feasible) else float("inf")

    def _trace(self, t: int) -> Tiling:
        path: list[Entry] = []
        position = len(self.chosen) - 1
        while position:
            index = int(self.chosen[position, t])
            path.append(self.entries[index])
            t -= int(self.costs[index])
            position = path[-1].start
        return Tiling(tuple(path[::-1]), sum(e.importance for e in path), sum(e.ms for e in path))


def solve(entries: Sequence[Entry], length: int, budget_ms: float, levels: int = 10_000, bonus: float = 0.0) -> Front:
    """Best tilings of positions 0..``length`` for every budget up to ``budget_ms``.

    Raises:
        SluiceError: the budget is not positive, or an entry is not within 0..length or has a negative latency.
    """
    if not (budget_ms > 0 and np.isfinite(budget_ms)) or levels < 1:
        raise SluiceError(f"cannot solve for {budget_ms} ms in {levels} levels; both must be positive")
    for e in entries:
        if not (0 <= e.start < e.end <= length and e.ms >= 0 and np.isfinite([e.importance, e.ms]).all()):
            raise SluiceError(
                f"bad segment ({e.start}, {e.end}] {e.key}: {e.importance} in {e.ms} ms; it must lie within "
                f"0..{length}, and both must be finite, the latency not negative"
            )
    unit = budget_ms / levels
    costs = np.ceil(np.array([e.ms for e in entries]) / unit).astype(np.int64)
    value = np.full((length + 1, levels + 1), -np.inf)
    spent = np.full((length + 1, levels + 1), np.inf)
    chosen = np.full((length + 1, levels + 1), -1, dtype=np.int32)
    value[0], spent[0] = 0.0, 0.0
    for index in sorted(range(len(entries)), key=lambda k: entries[k].end):
        entry, cost = entries[index], int(costs[index])
        if cost > levels:
            continue
        i, j, rest = entry.start, entry.end, levels + 1 - cost
        score, ms = value[i, :rest] + (entry.importance + bonus), spent[i, :rest] + entry.ms
        old, old_ms = value[j, cost:], spent[j, cost:]
        # minus infinity on both sides compares as neither better nor equal
        better = (score > old + TIE) | ((score >= old - TIE) & (score > -np.inf) & (ms < old_ms))
        value[j, cost:] = np.where(better, score, old)
        spent[j, cost:] = np.where(better, ms, old_ms)
        chosen[j, cost:] = np.where(better, index, chosen[j, cost:])
    return Front(tuple(entries), costs, chosen, value[length], unit)
