"""Least sums, beliefs and the search within a budget, against every combination of values of small random tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sluice.solver.elimination import Elimination
from sluice.solver.labels import best_within

SIZES = (3, 2, 4, 1, 3, 2, 3)
SCOPES = ((0, 1), (1, 2), (0, 2, 4), (3,), (4, 5), (2,), (6,))  # the last one shares nothing with the others
KINDS = 3


def random_tables(seed: int) -> list[tuple[int, tuple[int, ...], np.ndarray]]:
    """Axes in any order, two tables over some scopes, and combinations that are not allowed."""
    rng = np.random.default_rng(seed)
    tables = []
    for scope in (*SCOPES, *SCOPES[:3]):
        variables = tuple(int(v) for v in rng.permutation(scope))
        shape = tuple(SIZES[v] for v in variables)
        tables += [(kind, variables, rng.normal(size=shape)) for kind in range(KINDS)]
    forbidden = np.where(rng.random((3, 2)) < 0.3, np.inf, 0.0)
    forbidden[0, 0] = 0.0
    return [*tables, (0, (0, 1), forbidden), (1, (2, 2), rng.normal(size=(4, 4)))]


def eliminated(tables: list[tuple[int, tuple[int, ...], np.ndarray]]) -> Elimination:
    found = Elimination(SIZES, [scope for _, scope, _ in tables], KINDS, 1e4)
    for table in tables:
        found.add(*table)
    return found


def everything(tables: list[tuple[int, tuple[int, ...], np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All values, shape ``(combinations, variables)``, and their costs, shape ``(combinations, kinds)``."""
    values = np.asarray(list(itertools.product(*map(range, SIZES))))
    costs = np.zeros((len(values), KINDS))
    for kind, scope, table in tables:
        costs[:, kind] += table[tuple(values[:, v] for v in scope)]
    return values, costs


@pytest.mark.parametrize("seed", range(5))
def test_least_and_beliefs_are_those_of_all_combinations(seed: int) -> None:
    tables = random_tables(seed)
    elimination, (values, costs) = eliminated(tables), everything(tables)
    weights = (1.0, 0.7, 0.2)
    totals = costs @ np.asarray(weights)
    least, at = elimination.least(weights)
    assert least == pytest.approx(totals.min())
    assert at.tolist() == values[totals.argmin()].tolist()
    assert elimination.costs_at(at).tolist() == pytest.approx(costs[totals.argmin()].tolist())
    beliefs = elimination.beliefs(weights)
    for clique, belief in zip(elimination.cliques, beliefs, strict=True):
        for place in np.ndindex(*belief.shape):
            here = (values[:, list(clique.scope)] == np.asarray(place, dtype=int)).all(axis=1)
            assert belief[place] == pytest.approx(totals[here].min())
    for variable, marginal in enumerate(elimination.marginals(beliefs)):
        expected = [totals[values[:, variable] == value].min() for value in range(SIZES[variable])]
        assert marginal.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_within_a_budget_is_that_of_all_combinations(seed: int) -> None:
    tables = random_tables(seed)
    elimination, (values, costs) = eliminated(tables), everything(tables)
    price = float(np.random.default_rng(seed).uniform(0.2, 2.0))
    weights = (1.0, price, 0.3 * price)
    beliefs = elimination.beliefs(weights)
    both = np.stack([costs[:, 1], costs[:, 1] + costs[:, 2]])
    rooms = tuple(np.quantile(both, 0.2, axis=1).tolist())
    within = (both <= np.asarray(rooms)[:, None]).all(axis=0)
    best = costs[within, 0].min()
    totals = costs @ np.asarray(weights)
    most = float(totals[within & (costs[:, 0] == best)].min())  # the best one is left by a hair
    found = best_within(elimination, beliefs, (1, 2), most + 1e-9, (rooms[0], rooms[1]), 10_000)
    assert found is not None
    (at,) = np.flatnonzero((values == found).all(axis=1))
    assert within[at] and costs[at, 0] == pytest.approx(best)
    assert best_within(elimination, beliefs, (1, 2), totals.min() - 1e-6, (rooms[0], rooms[1]), 10_000) is None
    with pytest.raises(OverflowError):
        best_within(elimination, beliefs, (1, 2), 1e9, (rooms[0], rooms[1]), 3)


def test_too_many_combinations_are_refused_before_there_are_tables() -> None:
    scopes = [(a, b) for a in range(12) for b in range(a)]  # all with all: 10^12
    with pytest.raises(OverflowError):
        Elimination([10] * 12, scopes, KINDS, 1e6)
