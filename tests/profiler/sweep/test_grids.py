from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.profiler.sweep.alternatives import points_of
from sluice.profiler.sweep.grids import thin

values_and_count = st.lists(st.integers(1, 400), min_size=3, max_size=14, unique=True).flatmap(
    lambda values: st.tuples(st.just(sorted(values)), st.integers(2, len(values)))
)


def furthest(values: Sequence[int], knots: Sequence[int], cost: dict[int, float]) -> float:
    """How far off the lines between the knots the cost of any value is."""
    lines = np.interp(values, knots, [cost[knot] for knot in knots])
    return float(max(abs(lines - [cost[value] for value in values])))


@settings(deadline=None)
@given(values_and_count, st.sampled_from([None, math.sqrt, float]))
def test_some_of_the_values_with_their_ends(case: tuple[list[int], int], curve: object) -> None:
    values, count = case
    cost = {v: curve(v) for v in values} if callable(curve) else None
    found = thin(values, count, cost)
    assert len(found) == count and list(found) == sorted(found) and set(found) <= set(values)
    assert (found[0], found[-1]) == (values[0], values[-1])


def test_levels_that_crowd_near_the_full_width_leave_no_wide_gap() -> None:
    """Every other one of these would be (1, 224, 256), whatever lies between."""
    levels = (1, 32, 64, 112, 208, 224, 240, 256)
    assert thin(levels, 3) == (1, 112, 256)
    assert thin(levels, 3, {v: 0.1 + v for v in levels}) == (1, 112, 256)


def test_a_bend_is_kept() -> None:
    levels = (1, 16, 32, 48, 64, 96, 128)
    cost = {v: 5.0 + max(0, v - 32) for v in levels}
    assert thin(levels, 3, cost) == (1, 32, 128)
    assert furthest(levels, thin(levels, 3, cost), cost) < 0.2 * furthest(levels, (1, 64, 128), cost)


def test_a_curve_that_is_known_in_part_is_not_used() -> None:
    assert thin((1, 3, 50, 99), 3, {1: 5.0, 3: 900.0, 99: 8.0}) == (1, 50, 99)


@pytest.mark.parametrize(("share", "points"), [(0.0, 9), (0.019, 9), (0.02, 16), (0.05, 16), (0.06, 25), (1.0, 25)])
def test_what_replaces_more_gets_more_points(share: float, points: int) -> None:
    assert points_of(share) == points
