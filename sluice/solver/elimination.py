"""Least sums of tables that share variables, by elimination of one variable after the other.

A network is a chain of layers, and a table of costs knows the sites of a layer and of its neighbours alone. So

    min over all variables of  sum_k table_k(the variables of k)

needs no more than tables over a few variables at a time (Dechter 1999, "Bucket elimination"):

1. The variable whose elimination joins the fewest combinations of variables that shared no table goes first ("min
   fill"). Its tables are added up over its *clique*, itself and all variables that share a table with it. The least
   over the variable is a table over the rest, the *message*.
2. Backwards every variable takes the value that was least for those after it.
3. The clique whose tables get the message is its *parent*. With a message from every parent down, each clique knows the
   least total for each of its combinations; the least over the rest of the clique is the *min-marginal* of a value:
   the least total at which the variable takes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Clique", "Elimination", "Scope"]

Scope = tuple[int, ...]  # variables, increasing


@dataclass(frozen=True, slots=True, eq=False)
class Clique:
    """Variables, the eliminated one first; the costs over them; the cliques whose messages it gets; its parent.

    The last clique has no variables and no parent.
    """

    scope: Scope
    costs: np.ndarray
    children: list[int]
    parent: int


class Elimination:
    """Cliques in the order of elimination, and costs that are weighted sums of several kinds.

    Args:
        sizes: number of values of every variable.
        scopes: the variables of every table.
        kinds: of costs.
        limit: the most combinations of all cliques together.

    Raises:
        OverflowError: there are more than ``limit``.
    """

    def __init__(self, sizes: Sequence[int], scopes: Iterable[Scope], kinds: int, limit: float) -> None:
        self._sizes = sizes
        order = self._ordered(scopes, limit)
        self._place = {scope[0]: place for place, scope in enumerate(order)}
        self.cliques: list[Clique] = []
        for place, scope in enumerate([*order, ()]):
            own = (*scope[:1], *sorted(scope[1:], key=lambda v: self._place[v]))
            parent = self._place[own[1]] if len(own) > 1 else len(order)
            costs = np.zeros((kinds, *(sizes[v] for v in own)))
            self.cliques.append(Clique(own, costs, [], parent if place < len(order) else -1))
        for place, clique in enumerate(self.cliques[:-1]):
            self.cliques[clique.parent].children.append(place)

    def add(self, kind: int, variables: Scope, costs: np.ndarray) -> None:
        """Costs whose axes are variables of a scope, in any order; infinite where a combination is not allowed."""
        clique = self.cliques[min((self._place[v] for v in variables), default=-1)]
        scope = [v for v in clique.scope if v in variables]  # a variable may come twice
        summed = np.einsum(costs, [scope.index(v) for v in variables], list(range(len(scope))))
        clique.costs[kind] += self._spread(summed, scope, clique.scope)

    def _ordered(self, scopes: Iterable[Scope], limit: float) -> list[Scope]:
        """Variables with their neighbours at their turn (rule 1)."""
        beside: list[set[int]] = [set() for _ in self._sizes]
        for scope in scopes:
            for v in scope:
                beside[v] |= set(scope) - {v}

        def joined(v: int) -> float:
            pairs = itertools.combinations(sorted(beside[v]), 2)
            return float(sum(self._sizes[a] * self._sizes[b] for a, b in pairs if b not in beside[a]))

        weight = {v: joined(v) for v in range(len(self._sizes))}
        order, total = [], 0.0
        while weight:
            v = min(weight, key=lambda v: (weight[v], v))
            del weight[v]
            near = beside[v]
            order.append((v, *sorted(near)))
            total += math.prod(self._sizes[w] for w in order[-1])
            if total > limit:
                raise OverflowError(f"{total:.0f} combinations and more")
            for w in near:
                beside[w] |= near
                beside[w] -= {v, w}
            for w in near.union(*(beside[w] for w in near)):
                weight[w] = joined(w)
        return order

    def _spread(self, costs: np.ndarray, scope: Sequence[int], over: Scope) -> np.ndarray:
        """Costs over a scope in the order of another that contains it, as an array that broadcasts over the other."""
        return costs.reshape([self._sizes[v] if v in scope else 1 for v in over])

    def least(self, weights: Sequence[float]) -> tuple[float, np.ndarray]:
        """The least weighted sum and the values of the variables there, shape ``(variables,)``."""
        messages: list[np.ndarray] = []
        chosen: list[np.ndarray] = []
        for clique in self.cliques[:-1]:
            full = self._full(clique, messages, weights)
            chosen.append(full.argmin(axis=0))
            messages.append(full.min(axis=0))
        values = np.zeros(len(self._sizes), dtype=int)
        for place in range(len(chosen) - 1, -1, -1):
            scope = self.cliques[place].scope
            values[scope[0]] = chosen[place][tuple(values[v] for v in scope[1:])]
        return float(self._full(self.cliques[-1], messages, weights)), values

    def beliefs(self, weights: Sequence[float]) -> list[np.ndarray]:
        """By clique, the least weighted sum for each of its combinations (rule 3)."""
        messages: list[np.ndarray] = []
        for clique in self.cliques:
            messages.append(self._full(clique, messages, weights).min(axis=tuple(range(len(clique.scope) > 0))))
        above: list[np.ndarray] = [np.zeros(())] * len(self.cliques)
        found: list[np.ndarray] = [np.zeros(())] * len(self.cliques)
        for place in range(len(self.cliques) - 1, -1, -1):
            clique = self.cliques[place]
            own = self._weighted(clique, weights) + above[place]
            parts = [self.message(messages[child], child) for child in clique.children]
            for k, child in enumerate(clique.children):
                others = own + sum(part for j, part in enumerate(parts) if j != k)
                inside = self.cliques[child].scope[1:]
                above[child] = others.min(axis=tuple(a for a, v in enumerate(clique.scope) if v not in inside))[None]
            found[place] = own + sum(parts)
        return found

    def marginals(self, beliefs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """By variable, the least weighted sum at each of its values."""
        found: list[np.ndarray] = [np.zeros(0)] * len(self._sizes)
        for clique, belief in zip(self.cliques[:-1], beliefs, strict=False):
            found[clique.scope[0]] = belief.reshape(belief.shape[0], -1).min(axis=1)
        return found

    def costs_at(self, values: np.ndarray) -> np.ndarray:
        """The sums of the costs at the values of the variables, shape ``(kinds,)``."""
        at = (clique.costs[(slice(None), *(values[v] for v in clique.scope))] for clique in self.cliques)
        return np.sum(list(at), axis=0)

    def message(self, message: np.ndarray, child: int) -> np.ndarray:
        """What a clique tells its parent, as an array that broadcasts over the parent."""
        clique = self.cliques[child]
        return self._spread(message, clique.scope[1:], self.cliques[clique.parent].scope)

    def _full(self, clique: Clique, messages: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        full = self._weighted(clique, weights)
        for child in clique.children:
            full = full + self.message(messages[child], child)
        return full

    def flat(self, places: Mapping[int, np.ndarray], scope: Scope, count: int) -> np.ndarray:
        """The places of combinations in a flat table over a scope, shape ``(count,)``."""
        found = np.zeros(count, dtype=np.int64)
        for v in scope:
            found = found * self._sizes[v] + places[v]
        return found

    def _weighted(self, clique: Clique, weights: Sequence[float]) -> np.ndarray:
        total = np.zeros(clique.costs.shape[1:])
        for weight, costs in zip(weights, clique.costs, strict=True):
            if weight:
                total += weight * costs
        return total
