"""The array algebra that both rewriters share; numpy only.

1. A *slice* keeps some indices of one axis: ``take(w, axis, keep)``. Kept indices travel as half-open ranges, so a
   plan stays small when thousands of columns behind a flatten are cut.
2. A *reshape* maps one labelled axis onto another. Write the sizes before and after as products; they split into
   the shortest aligned runs with equal products (row-major order makes the runs independent). Within a run the
   index of every element is known, so the label of every output position is a gather:
   ``(C, H, W) -> C*H*W`` repeats labels, ``(H, W, C) -> H*W*C`` tiles them, ``C -> (g, C/g)`` splits them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["from_ranges", "reshape_labels", "reshape_runs", "take", "to_ranges"]


def take(array: np.ndarray, axis: int, keep: Sequence[int] | np.ndarray) -> np.ndarray:
    """``array`` with only the indices ``keep`` of ``axis``, contiguous."""
    return np.ascontiguousarray(np.take(array, np.asarray(keep, dtype=np.int64), axis=axis))


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


def reshape_labels(
    labels: np.ndarray, axis: int, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """Labels of the output positions of a row-major reshape.

    Args:
        labels: shape ``(before[axis],)``, any integers.
        axis: the labelled axis of the input.
        before, after: full sizes.
    Returns:
        An array over the output axes of the labelled run, reduced to size 1 wherever it does not vary, and those
        output axes; None if the sizes cannot be aligned.
    """
    runs = reshape_runs(before, after)
    if runs is None:
        return None
    ins, outs = next((i, o) for i, o in runs if axis in i)
    shape = [1] * len(ins)
    shape[axis - ins.start] = len(labels)
    full = np.broadcast_to(labels.reshape(shape), [before[i] for i in ins]).reshape([after[o] for o in outs])
    for k in range(full.ndim):
        first = full.take([0], axis=k)
        if (full == first).all():
            full = first
    return full, tuple(outs)
