from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.core.latency import Extent, Term
from sluice.profiler.fit.steps import STEP, with_steps

VALUES = tuple(range(4, 53, 4))


def blocks(width: int, step: int) -> float:
    return float(step * math.ceil(width / step))


def axes(*knots: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(k, dtype=np.float64) for k in knots)


def term(knots: tuple[np.ndarray, ...], ms: np.ndarray) -> Term:
    return Term("t", tuple(Extent(((g, 1),)) for g in "ab"[: len(knots)]), knots, ms)


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from([8, 12, 16, 20]),
    inner=st.lists(st.sampled_from(VALUES[1:-1]), unique=True, max_size=4),
    of_b=st.lists(st.floats(0.1, 9.0), min_size=3, max_size=3),
    offset=st.floats(0.0, 30.0),
    factor=st.floats(0.2, 5.0),
)
def test_a_staircase_that_other_extents_scale_is_found_again(
    step: int, inner: list[int], of_b: list[float], offset: float, factor: float
) -> None:
    """Only some values are known of the piece; of the axis, all."""
    known = (VALUES[0], *sorted(inner), VALUES[-1])
    curve = {v: offset + factor * blocks(v, step) for v in VALUES}
    ms = np.array([[of_b[k] * (7.0 + blocks(v, step)) for k in range(3)] for v in known])
    knots, found = with_steps(axes(known, (1, 2, 3)), ms, [curve, {}])
    assert set(known) <= set(knots[0]) <= set(VALUES) and list(knots[1]) == [1, 2, 3]
    for v, k in itertools.product(VALUES, range(3)):
        exact = of_b[k] * (7.0 + blocks(v, step))
        height = of_b[k] * (blocks(52, step) - blocks(4, step))
        assert term(knots, found).at({"a": v, "b": k + 1}) == pytest.approx(exact, abs=1.01 * STEP * height)


def test_a_line_is_far_off_where_the_steps_are_not_known() -> None:
    """The comparison above is one that can fail."""
    known = axes((16, 32))
    ms = np.array([blocks(16, 16), blocks(32, 16)])
    for curve, wanted in (({}, 20.0), ({v: blocks(v, 16) for v in (16, 20, 24, 28, 32)}, 32.0)):
        assert term(*with_steps(known, ms, [curve])).at({"a": 20}) == pytest.approx(wanted)


def test_a_hump_between_two_knots_is_kept() -> None:
    curve = {8: 50.0, 12: 110.0, 16: 50.0, 20: 90.0}
    knots, found = with_steps(axes((8, 16, 20)), np.array([0.5, 0.5, 0.9]), [curve])
    assert list(knots[0]) == [8, 12, 16, 20]
    assert found == pytest.approx([0.5, 1.1, 0.5, 0.9])


def test_two_axes_with_steps() -> None:
    known = (4, 16, 52)
    curve = {v: blocks(v, 16) for v in VALUES}
    ms = np.array([[blocks(a, 16) * blocks(b, 16) for b in known] for a in known])
    knots, found = with_steps(axes(known, known), ms, [curve, curve])
    for a, b in itertools.product(VALUES, VALUES):
        exact = blocks(a, 16) * blocks(b, 16)
        assert term(knots, found).at({"a": a, "b": b}) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("curve", [{}, {4: 3.0, 8: 5.0, 12: 1.0}, {4: 1.0, 8: 1.5, 12: 2.0}])
def test_curves_that_say_nothing_leave_the_grid(curve: dict[int, float]) -> None:
    """None is known, it falls, or it is the line."""
    knots, found = with_steps(axes((4, 12)), np.array([0.2, 0.8]), [curve])
    assert list(knots[0]) == [4, 12] and list(found) == [0.2, 0.8]


def test_times_that_fall_where_the_curve_rises_stay_lines() -> None:
    _, found = with_steps(axes((16, 32)), np.array([0.8, 0.4]), [{16: 1.0, 20: 2.0, 32: 2.0}])
    assert found == pytest.approx([0.8, 0.7, 0.4])


def test_a_piece_that_depends_on_nothing() -> None:
    knots, found = with_steps((), np.array(0.3), [])
    assert knots == () and found == 0.3
