"""The dynamic programme against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sluice.core.errors import SluiceError
from sluice.solver.dynamic_program import Entry, Front, Tiling, solve


def tilings(entries: list[Entry], length: int, start: int = 0) -> Iterator[list[Entry]]:
    if start == length:
        yield []
    for entry in entries:
        if entry.start == start:
            yield from ([entry, *rest] for rest in tilings(entries, length, entry.end))


def answers(front: Front) -> list[Tiling]:
    """The best tiling at every budget of the table that has one."""
    return [front.at(t * front.unit_ms) for t in np.flatnonzero(front.value > -np.inf)]


@st.composite
def tables(draw: st.DrawFn, whole: bool) -> tuple[list[Entry], int]:
    """Entries of a short chain; ``whole``: latencies are whole numbers of milliseconds, importances quarters."""
    length = draw(st.integers(1, 5))
    pairs = [(i, j) for i, j in itertools.combinations(range(length + 1), 2)]
    ms = st.integers(0, 6).map(float) if whole else st.floats(0.01, 6)
    importance = st.integers(-8, 2).map(lambda v: v / 4) if whole else st.floats(-2, 1)
    entries = []
    for i, j in pairs:
        for key in range(draw(st.integers(1 if j == i + 1 else 0, 2))):
            entries.append(Entry(i, j, key, draw(importance), draw(ms)))
    return entries, length


@settings(max_examples=80, deadline=None)
@given(tables(whole=True), st.integers(1, 20), st.sampled_from([0.0, 0.5]))
def test_exact_where_latencies_are_multiples_of_the_unit(
    table: tuple[list[Entry], int], budget: int, bonus: float
) -> None:
    entries, length = table
    front = solve(entries, length, float(budget), levels=budget, bonus=bonus)
    everything = [(sum(e.importance + bonus for e in t), sum(e.ms for e in t)) for t in tilings(entries, length)]
    for t in range(budget + 1):
        fitting = [(value, -ms) for value, ms in everything if ms <= t]
        if not fitting:
            with pytest.raises(SluiceError, match="the least is"):
                front.at(float(t))
            continue
        found = front.at(float(t))
        value = found.importance + bonus * len(found.entries)
        assert (pytest.approx(value), pytest.approx(-found.ms)) == max(fitting)
        assert found.entries[0].start == 0 and found.entries[-1].end == length
        assert all(a.end == b.start for a, b in itertools.pairwise(found.entries))


@settings(max_examples=80, deadline=None)
@given(tables(whole=False), st.floats(0.5, 20), st.integers(1, 300), st.floats(0, 1))
def test_a_budget_is_never_exceeded(
    table: tuple[list[Entry], int], budget: float, levels: int, fraction: float
) -> None:
    entries, length = table
    front = solve(entries, length, budget, levels)
    assume(front.least_ms <= fraction * budget)
    assert front.at(fraction * budget).ms <= fraction * budget * (1 + 1e-9)
    for tiling in answers(front):
        assert tiling.ms <= budget * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(tables(whole=False), st.floats(1, 20))
def test_a_fine_grid_loses_little(table: tuple[list[Entry], int], budget: float) -> None:
    """As good as the best that leaves one unit per segment."""
    entries, length = table
    front = solve(entries, length, budget)
    room = budget * (1 - (length + 1) / 10_000)
    best = [sum(e.importance for e in t) for t in tilings(entries, length) if sum(e.ms for e in t) <= room]
    assume(best)
    assert front.at(budget).importance >= max(best) - 1e-6


def test_rounding_down_would_exceed_the_budget() -> None:
    entries = [Entry(i, i + 1, "slow", 0.0, 1.9) for i in range(6)] + [
        Entry(i, i + 1, "fast", -1.0, 0.9) for i in range(6)
    ]
    found = solve(entries, 6, 9.0, levels=9).at(9.0)  # rounded down, 1.9 counts as 1 and 0.9 as nothing
    assert found.ms <= 9.0 and sum(int(e.ms) for e in found.entries) < 6


def test_the_front_rises_and_the_bonus_keeps_segments() -> None:
    entries = [Entry(i, i + 1, 0, -0.02, 1.0) for i in range(4)] + [
        Entry(0, 4, 7, 0.0, 2.0),
        Entry(0, 2, 5, -0.01, 1.0),
    ]
    front = solve(entries, 4, 5.0)
    values = [t.importance for t in answers(front)]
    assert values == sorted(values) and answers(front)[-1].entries == (entries[4],)
    assert len(solve(entries, 4, 5.0, bonus=1.0).at(5.0).entries) == 4
    assert front.at(2.5) == answers(front)[-1]


def test_equally_important_the_faster_wins() -> None:
    entries = [Entry(0, 1, "a", -0.5, 3.0), Entry(0, 1, "b", -0.5, 1.0), Entry(0, 1, "c", -0.5, 2.0)]
    assert [solve(order, 1, 5.0).at(5.0).entries[0].key for order in itertools.permutations(entries)] == ["b"] * 6


def test_size_of_the_published_problem() -> None:
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i in range(51) for j in range(i + 1, min(i + 9, 52))]
    entries = [Entry(i, j, 0, -rng.random(), rng.random()) for i, j in pairs]
    assert solve(entries, 51, 20.0).at(20.0).ms <= 20.0


def test_bad_input() -> None:
    entry = Entry(0, 1, 0, 0.0, 1.0)
    with pytest.raises(SluiceError, match="both must be positive"):
        solve([entry], 1, 0.0)
    with pytest.raises(SluiceError, match=r"bad segment \(0, 3\] 0"):
        solve([Entry(0, 3, 0, 0.0, 1.0)], 2, 1.0)
    with pytest.raises(SluiceError, match="no choice of segments takes 1 ms or less"):
        solve([Entry(0, 1, 0, 0.0, 2.0)], 1, 3.0).at(1.0)
    with pytest.raises(SluiceError, match="beyond the 3 ms"):
        solve([entry], 1, 3.0).at(4.0)
