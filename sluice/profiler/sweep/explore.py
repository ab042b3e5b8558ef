"""Which widths are measured: the staircase is found, not assumed.

1. Every kind of group is explored by bisection on its cost, the sum of all distinct pieces that lie on it, with the
   other widths dense. The interval with the largest difference between its ends is split, at the roundest number near
   its middle, until no interval spans more than `GAIN` of the dense cost, or a sixteenth of the width, or `MAX_WIDTHS`
   are known. Only multiples of the 16 bytes that kernels load at once are tried (four floats, eight halves), less in
   narrow groups, and the full width. A layer of 19 channels takes another kernel, which wants the plain layout, while
   all activations around it are laid out in blocks: plans of MobileNetV2 with such widths took up to a quarter longer
   than their pieces and joints told.
2. *Levels*: a width is worth offering if no larger width costs as little. The solver chooses among the levels.
3. Sums of groups (concatenations) are explored like groups, but closer (`SUM_GAIN`, `SUM_WIDTHS`). Any sum of levels
   may come up, so all values that were tried are kept: a straight line between two distant ones crosses steps. Between
   28 and 52 channels, where there is a step behind 32 and behind 48, such a line gave a layer of DenseNet a third more
   than it took. All values up to `VECTOR` are tried: kernels take fewer channels than that in other ways, and more
   channels may cost less (1x1 convolutions to 32: of 12 channels 112 us, of 16 49, of 20 to 32 90, of 36 to 48 135).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from sluice.core.latency import Extent
from sluice.profiler.pieces.partition import Partition, Piece
from sluice.profiler.pieces.staircase import Staircase, step_of, sum_of
from sluice.profiler.sweep.bench import Bench

__all__ = ["explore"]

GAIN = 0.06
WORTH = 0.015
MAX_WIDTHS = 14
SUM_GAIN, SUM_WIDTHS = 0.02, 20
VECTOR = 4  # packs: 64 bytes
GroupSum = tuple[str, ...]  # a group, or the groups of a sum


def explore(
    partition: Partition, bench: Bench, only: Collection[str] | None = None, most: int = MAX_WIDTHS
) -> dict[str, Staircase]:
    """Every group (or those of ``only``) with at most ``most`` widths each, and every sum of these.

    The name of a sum is that of `sluice.profiler.pieces.staircase.sum_of`.
    """
    dense = partition.dense
    groups = [g for g in dense if only is None or g in only]
    step = {group: step_of(dense[group], bench.table.fingerprint.precision) for group in groups}
    tried: dict[GroupSum, tuple[int, ...]] = {(g,): (*range(step[g], dense[g], step[g]), dense[g]) for g in groups}
    ends = {axis: [values[0], values[-1]] for axis, values in tried.items()}
    found = {axis[0]: Staircase(c, _levels(c)) for axis, c in _costs(partition, bench, tried, ends, most, GAIN).items()}
    sums = {_axis(e): None for p in partition.pieces for e in p.extents if len(e.coefs) > 1}
    tried = {axis: _sums([found[g].levels for g in axis]) for axis in sums if found.keys() >= set(axis)}
    first = {}
    for axis, values in tried.items():
        narrow = VECTOR * max(step[g] for g in axis)
        first[axis] = [v for v in values if v <= narrow or v in (values[0], values[-1])]
    for axis, cost in _costs(partition, bench, tried, first, max(most, SUM_WIDTHS), SUM_GAIN).items():
        found[sum_of(axis)] = Staircase(cost, tuple(sorted(cost)))
    return found


def _costs(
    partition: Partition,
    bench: Bench,
    tried: Mapping[GroupSum, tuple[int, ...]],
    first: Mapping[GroupSum, list[int]],
    most: int,
    gain: float,
) -> dict[GroupSum, dict[int, float]]:
    """Cost of axes by value: at the ``first`` values, then at those of the ``tried`` values that bisection needs."""
    dense = partition.dense
    pieces_of = {axis: _distinct([p for p in partition.pieces if _lies_on(p, axis)], axis) for axis in tried}
    kinds = {axis: (tuple((p.key, _index(p, axis)) for p in pieces_of[axis]), tried[axis]) for axis in tried}
    lead = {kind: axis for axis, kind in reversed(list(kinds.items()))}
    known: dict[GroupSum, dict[int, float]] = {axis: {} for axis in lead.values()}
    asked = {axis: list(first[axis]) for axis in known}
    while any(asked.values()):
        wanted = [(p, _at(p, axis, w, dense)) for axis, ws in asked.items() for w in ws for p in pieces_of[axis]]
        bench.pieces(partition, wanted)
        for axis, widths in asked.items():
            for w in widths:
                known[axis][w] = sum(bench.table.require(p.key, _at(p, axis, w, dense)).ms for p in pieces_of[axis])
        asked = {axis: _next_widths(known[axis], tried[axis], most, gain) for axis in known}
    return {axis: known[lead[kind]] for axis, kind in kinds.items()}


def _sums(levels: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """All values that levels of several groups may add up to."""
    found = {0}
    for own in levels:
        found = {a + b for a in found for b in own}
    return tuple(sorted(found))


def _axis(extent: Extent) -> GroupSum:
    return tuple(group for group, _ in extent.coefs)


def _lies_on(piece: Piece, axis: GroupSum) -> bool:
    """Whether the group is part of an extent of the piece, or the sum is one."""
    return axis[0] in piece.groups if len(axis) == 1 else any(_axis(e) == axis for e in piece.extents)


def _distinct(pieces: Sequence[Piece], axis: GroupSum) -> list[Piece]:
    return list({(p.key, _index(p, axis)): p for p in pieces}.values())


def _index(piece: Piece, axis: GroupSum) -> int:
    return next(k for k, e in enumerate(piece.extents) if _axis(e) == axis or (len(axis) == 1 and axis[0] in _axis(e)))


def _at(piece: Piece, axis: GroupSum, width: int, dense: Mapping[str, int]) -> tuple[int, ...]:
    if len(axis) == 1:
        return tuple(int(e.at({**dense, axis[0]: width})) for e in piece.extents)
    return tuple(width if _axis(e) == axis else int(e.at(dense)) for e in piece.extents)


def _next_widths(cost: Mapping[int, float], tried: Sequence[int], most: int, gain: float) -> list[int]:
    """The value that splits the interval with the largest difference, if any is worth it."""
    widths = sorted(cost)
    full = widths[-1]
    if len(widths) >= most:
        return []
    intervals = [
        (abs(cost[b] - cost[a]), a, b)
        for a, b in itertools.pairwise(widths)
        if any(a < v < b for v in tried) and b - a > max(1, full // 16) and abs(cost[b] - cost[a]) > gain * cost[full]
    ]
    if not intervals:
        return []
    _, low, high = max(intervals)
    return [_roundest(low, high, [v for v in tried if low < v < high])]


def _roundest(low: int, high: int, values: Sequence[int]) -> int:
    """The value with the largest power of two, of those inside the middle half if there are any."""
    quarter, middle = (high - low) / 4, (low + high) / 2
    inside = [v for v in values if low + quarter <= v <= high - quarter] or values
    return max(inside, key=lambda v: (v & -v, -abs(v - middle)))


def _levels(cost: Mapping[int, float]) -> tuple[int, ...]:
    """Rule 2: widths that no larger width undercuts, within `WORTH` of the dense cost."""
    widths = sorted(cost, reverse=True)
    margin = WORTH * cost[widths[0]]
    levels, cheapest = [widths[0]], cost[widths[0]]
    for width in widths[1:]:
        if cost[width] < cheapest - margin:
            levels.append(width)
            cheapest = cost[width]
    return tuple(sorted(levels))
