"""Slices, ranges, and the labels a reshape carries, against brute force on arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.core.algebra import (
    bounds_of_kept,
    from_ranges,
    prime_beside,
    reshape_parts,
    reshape_runs,
    stepped,
    take,
    to_ranges,
)


@given(st.sets(st.integers(0, 40)))
def test_ranges_round_trip(indices: set[int]) -> None:
    increasing = sorted(indices)
    ranges = to_ranges(increasing)
    assert from_ranges(ranges) == tuple(increasing)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "neighbours are joined"


def test_take_keeps_values_in_order() -> None:
    w = np.arange(24.0).reshape(2, 3, 4)
    cut = take(w, 2, (0, 3))
    assert cut.flags.c_contiguous
    np.testing.assert_array_equal(cut, w[:, :, [0, 3]])


@given(st.data())
def test_steps_go_on_where_runs_are_cut(data: st.DataObject) -> None:
    size, step = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    of = stepped(size, start, stop, step)
    stays = data.draw(st.sets(st.sampled_from(of.tolist()), min_size=1))
    kept = np.isin(of, list(stays))
    first, end = bounds_of_kept(kept, start, stop, step)
    taken = [k for k in range(start, stop, step) if kept[k]]
    assert np.flatnonzero(kept)[first:end:step].tolist() == taken


@given(st.data())
def test_slices_of_different_axes_commute(data: st.DataObject) -> None:
    shape = (4, 3, 5)
    w = np.arange(60).reshape(shape)
    axes = data.draw(st.permutations(range(3)))
    keeps = [data.draw(st.sets(st.integers(0, n - 1), min_size=1).map(sorted)) for n in shape]
    cut = w
    for axis in axes:
        cut = take(cut, axis, keeps[axis])
    np.testing.assert_array_equal(cut, w[np.ix_(*keeps)])


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ((2, 6, 4, 4), (2, 96), [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]),
        ((2, 6), (2, 2, 3), [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3))]),
        ((2, 6, 1, 1), (2, 6), [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]),
        ((3, 4), (2, 6), [(range(0, 2), range(0, 2))]),
        ((3, 4), (5, 2), None),
    ],
)
def test_runs(before: tuple[int, ...], after: tuple[int, ...], runs: list[tuple[range, range]] | None) -> None:
    assert reshape_runs(before, after) == runs


@given(st.data())
def test_parts_are_those_of_a_real_reshape(data: st.DataObject) -> None:
    """Label every element by its index along the axis, reshape, and put the index together from the parts."""
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(factors) - 1)))))
        bounds = [0, *[c for c in cuts if c < len(factors)], len(factors)]
        return tuple(int(np.prod(factors[i:j])) for i, j in itertools.pairwise(bounds))

    before, after = grouped(), grouped()
    axis = data.draw(st.integers(0, len(before) - 1))
    parts = reshape_parts(axis, before, after)
    assert parts is not None and np.prod([part.size for part in parts]) == before[axis]
    shape = [1] * len(before)
    shape[axis] = before[axis]
    real = np.broadcast_to(np.arange(before[axis]).reshape(shape), before).reshape(after)
    found = np.zeros(after, dtype=np.int64)
    for part in parts:
        spread = [1] * len(after)
        spread[part.axis] = after[part.axis]
        found = found * part.size + part.index.reshape(spread)
    np.testing.assert_array_equal(found, real)


@pytest.mark.parametrize(
    ("axis", "before", "after"),
    [(1, (3, 4), (5, 2)), (0, (6, 4), (8, 3)), (1, (4, 9), (6, 6))],
    ids=["totals differ", "a boundary inside", "a boundary below"],
)
def test_parts_that_cannot_be_aligned(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert reshape_parts(axis, before, after) is None


def test_a_prime_beside_the_sizes() -> None:
    assert prime_beside([3, 0, 64]) == 97
    assert prime_beside([97 * 4, 101]) == 103
