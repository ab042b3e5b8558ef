"""All parts of configurations that may be part of a better one, from clique to clique: the least loss in a budget.

A *label* is a choice of all variables that are eliminated up to a clique: its loss, its milliseconds, without and with
what is read again, and the values of the variables that the clique shares with its parent.

1. `sluice.solver.elimination` knows the least price of all that is not part of the label, exactly. A label whose own
   price and that exceed ``most`` together is left out.
2. A label is left out as well where another of equal shared values has no more loss and no more of both milliseconds.
   It is compared with one other, the best of those with fewer milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sluice.solver.elimination import Clique, Elimination

__all__ = ["best_within"]


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Labels, increasing in ``shared``, the flat place of the values shared with the parent.

    ``excess`` is the price that a label has beyond the cheapest one with the same shared values; ``value`` is that of
    the eliminated variable and ``parts`` are the labels of the children.
    """

    shared: np.ndarray
    loss: np.ndarray
    ms: np.ndarray  # shape (2, labels)
    excess: np.ndarray
    value: np.ndarray
    parts: list[np.ndarray]


def best_within(
    elimination: Elimination,
    beliefs: Sequence[np.ndarray],
    kinds: tuple[int, int],
    most: float,
    rooms: tuple[float, float],
    limit: int,
) -> np.ndarray | None:
    """The values of the variables where the loss is least, of the labels of rule 1 within the budget; None without any.

    Args:
        beliefs: those of ``elimination`` at the price.
        kinds: which costs are the milliseconds and those read again; the first kind is the loss.
        rooms: the most milliseconds, and the most together with those read again.
        limit: the most labels of a clique.

    Raises:
        OverflowError: there are more.
    """
    found: list[_Labels] = []
    for clique, belief in zip(elimination.cliques, beliefs, strict=True):
        found.append(_labels(clique, belief, [found[c] for c in clique.children], elimination, kinds, most, limit))
    last = found[-1]
    within = np.flatnonzero((last.ms <= np.asarray(rooms)[:, None]).all(axis=0))
    if not len(within):
        return None
    values = np.zeros(len(beliefs) - 1, dtype=int)
    chosen = {len(found) - 1: int(within[np.argmin(last.loss[within])])}
    for place in range(len(found) - 1, -1, -1):
        clique, labels = elimination.cliques[place], found[place]
        if clique.scope:
            values[clique.scope[0]] = labels.value[chosen[place]]
        chosen |= {child: int(part[chosen[place]]) for child, part in zip(clique.children, labels.parts, strict=True)}
    return values


def _labels(
    clique: Clique,
    belief: np.ndarray,
    children: Sequence[_Labels],
    elimination: Elimination,
    kinds: tuple[int, int],
    most: float,
    limit: int,
) -> _Labels:
    flat = np.flatnonzero(belief.reshape(-1) <= most)
    places = dict(zip(clique.scope, np.unravel_index(flat, belief.shape), strict=True)) if clique.scope else {}
    loss, time, again = (clique.costs[kind].reshape(-1)[flat] for kind in (0, *kinds))
    ms = np.stack([time, time + again])
    price = belief.reshape(-1)[flat]
    row = np.arange(len(flat))
    parts: list[np.ndarray] = []
    for place, labels in zip(clique.children, children, strict=True):
        scope = elimination.cliques[place].scope[1:]
        at = elimination.flat({v: values[row] for v, values in places.items()}, scope, len(row))
        first, last = np.searchsorted(labels.shared, at, "left"), np.searchsorted(labels.shared, at, "right")
        count = last - first
        if count.sum() > limit:
            raise OverflowError(f"{count.sum()} labels")
        own = np.repeat(np.arange(len(row)), count)
        part = np.arange(len(own)) + np.repeat(first - np.cumsum(count) + count, count)
        kept = price[own] + labels.excess[part] <= most
        own, part = own[kept], part[kept]
        row, price = row[own], price[own] + labels.excess[part]
        loss, ms = loss[own] + labels.loss[part], ms[:, own] + labels.ms[:, part]
        parts = [*(known[own] for known in parts), part]
    shared = elimination.flat({v: values[row] for v, values in places.items()}, clique.scope[1:], len(row))
    kept = _undominated(shared, loss, ms)
    least = belief.min(axis=0).reshape(-1) if clique.scope else belief.reshape(-1)
    value = places[clique.scope[0]][row][kept] if clique.scope else np.zeros(len(kept), dtype=int)
    excess = price[kept] - least[shared[kept]]
    return _Labels(shared[kept], loss[kept], ms[:, kept], excess, value, [part[kept] for part in parts])


def _undominated(shared: np.ndarray, loss: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """The places of the labels that rule 2 keeps, increasing in what is shared."""
    order = np.lexsort((ms[1], loss, ms[0], shared))
    # Ranks of losses, lower by more than all of them from one shared value to the next: a running least by value.
    rank = np.unique(loss[order], return_inverse=True)[1].astype(np.int64)
    rank -= np.cumsum(np.diff(shared[order], prepend=shared[order][:1]) > 0) * (len(order) + 1)
    falls = np.concatenate([[True], rank[1:] < np.minimum.accumulate(rank)[:-1]])[: len(order)]
    best = order[np.maximum.accumulate(np.where(falls, np.arange(len(order)), 0))]
    return order[falls | (ms[1][order] < ms[1][best])]
