"""The array algebra that both rewriters share; numpy only.

1. A *slice* keeps some indices of one axis: ``take(w, axis, keep)``. Kept indices travel as half-open ranges, so a
   plan stays small when thousands of columns behind a flatten are cut.
2. A *reshape* maps one labelled axis onto others. Write the sizes before and after as products; they split into
   the shortest aligned runs with equal products (row-major order makes the runs independent). Within a run an output
   axis takes a block of the digits of the input index, so the label of every output position is a gather:
   ``(C, H, W) -> C*H*W`` repeats labels, ``(H, W, C) -> H*W*C`` tiles them, ``C -> (g, C/g)`` splits them.
3. A slice with a *step* of an axis that is cut takes every step-th entry of what is kept, and the same entries, if runs
   of ``step`` indices, counted from the axis' start, stay or go as a whole (`stepped`, `bounds_of_kept`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Part",
    "bounds_of_kept",
    "from_ranges",
    "kept_ones",
    "prime_beside",
    "reshape_parts",
    "reshape_runs",
    "stepped",
    "take",
    "to_ranges",
]

_LEAST = 97  # small, since labels of folded axes grow with it; above the sizes of most axes


def prime_beside(sizes: Collection[int]) -> int:
    """A prime that divides none of the sizes: it can stand for a free size, and its products stay recognisable."""
    prime = _LEAST
    while any(prime % d == 0 for d in range(2, int(prime**0.5) + 1)) or any(s % prime == 0 for s in sizes if s):
        prime += 2
    return prime


def take(array: np.ndarray, axis: int, keep: Sequence[int] | np.ndarray) -> np.ndarray:
    """``array`` with only the indices ``keep`` of ``axis``, contiguous."""
    return np.ascontiguousarray(np.take(array, np.asarray(keep, dtype=np.int64), axis=axis))


def stepped(size: int, start: int, stop: int, step: int) -> np.ndarray:
    """By index of an axis the one it must stay or go with, so that ``start:stop:step`` can be sliced after a cut."""
    at = np.arange(size)
    return np.where((at >= start - start % step) & (at < stop), at - at % step, at)


def bounds_of_kept(kept: np.ndarray, start: int, stop: int, step: int = 1) -> tuple[int, int]:
    """What ``start:stop:step`` of an axis is where the entries ``kept`` (a mask) are left of it."""
    first = int(kept[: start - start % step].sum()) + start % step
    end = int(kept[:stop].sum())
    place = np.cumsum(kept) - 1
    want = [place[k] for k in range(start, stop, step) if kept[k]]
    assert list(range(first, end, step)) == want, (kept, start, stop, step)
    return first, end


def to_ranges(indices: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Increasing indices as half-open ranges: ``0 1 2 5 -> ((0, 3), (5, 6))``."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def from_ranges(ranges: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Inverse of `to_ranges`."""
    return tuple(i for start, stop in ranges for i in range(start, stop))


def reshape_runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]] | None:
    """Shortest aligned runs of dimensions with equal products, or None if the totals differ.

    >>> reshape_runs((2, 6, 4, 4), (2, 96))
    [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]
    """
    runs: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return None
        # Trailing ones belong to the run they follow: (C, 1, 1) -> (C,) is one run.
        while i < len(before) and before[i] == 1 and (j >= len(after) or after[j] != 1):
            i += 1
        while j < len(after) and after[j] == 1 and (i >= len(before) or before[i] != 1):
            j += 1
        runs.append((range(i0, i), range(j0, j)))
    return runs


def kept_ones(axis: int, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The output axes of size 1 that an input axis of size 1 may have become."""
    outs = next((o for i, o in reshape_runs(before, after) or () if axis in i), range(0))
    return [k for k in outs if after[k] == 1]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What an output axis of a reshape takes of one input axis.

    The input axis is seen as a grid with one axis per part, the outer ones first; this part has ``size`` positions of
    it. ``index[i]`` is the position at index i of the output axis.
    """

    axis: int
    size: int
    index: np.ndarray


def reshape_parts(axis: int, before: Sequence[int], after: Sequence[int]) -> tuple[Part, ...] | None:
    """How a row-major reshape spreads one input axis over output axes; None if the sizes cannot be aligned.

    Boundaries between axes are numbers of elements, counted from the end. Where each of those that lie inside the input
    axis divides the next, every output axis takes a block of the digits of the input index.

    >>> [(part.axis, part.size, part.index.tolist()) for part in reshape_parts(1, (3, 6), (6, 3))]
    [(0, 2, [0, 1, 0, 1, 0, 1]), (1, 3, [0, 1, 2])]
    """
    runs = reshape_runs(before, after)
    if runs is None:
        return None
    ins, outs = next((i, o) for i, o in runs if axis in i)
    low, high = math.prod(before[axis + 1 : ins.stop]), math.prod(before[axis : ins.stop])
    strides = {k: math.prod(after[k + 1 : outs.stop]) for k in outs}
    inside = sorted({low, high, *(stride for stride in strides.values() if low < stride < high)})
    if any(large % small for small, large in itertools.pairwise(inside)):
        return None
    parts = []
    for k, stride in strides.items():
        start, stop = max(low, stride), min(high, stride * after[k])
        if stop > start:
            if start % stride:
                return None
            parts.append(Part(k, stop // start, np.arange(after[k]) // (start // stride) % (stop // start)))
    return tuple(parts)
