"""The points of a graph's pieces: grids over the levels of their groups, thinned where there would be too many.

1. Levels crowd where the cost of a group is steep, which is mostly near its full width. So thinning does not keep every
   other level, but the levels that leave the others nearest to the straight lines between them: in turn, the level that
   is furthest off the known cost of the group. `EVEN` times its distance to the next kept level counts as much, so that
   a wide gap is split.
2. A sum of groups is measured at the values where it was explored. A sum that occurs in a restructured graph alone was
   not explored; it is measured at sums of the levels nearest to equal shares of the groups.
3. The measured time of a piece has one call in it, less one per source, whose time was subtracted with its call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from sluice.profiler.pieces.partition import Partition, Piece
from sluice.profiler.pieces.sources import has_source
from sluice.profiler.pieces.staircase import Staircase, sum_of
from sluice.profiler.table.latency_table import LatencyTable

__all__ = [
    "MAX_GRID",
    "SUMS",
    "calls_in",
    "cost_of",
    "dense_ms",
    "dense_points",
    "knots_of",
    "net_ms",
    "piece_points",
    "thin",
    "totals",
]

MAX_GRID = 49
EVEN = 0.2
SUMS = 7


def dense_points(partition: Partition, pieces: Sequence[Piece] | None = None) -> list[tuple[Piece, tuple[int, ...]]]:
    """Every piece of the graph, or some of them, at its dense size."""
    dense, pieces = partition.dense, partition.pieces if pieces is None else pieces
    return [(piece, tuple(int(e.at(dense)) for e in piece.extents)) for piece in pieces]


def dense_ms(partition: Partition, table: LatencyTable, call_ms: float) -> dict[str, float]:
    """Milliseconds of every piece at its dense size, net of calls, by name; `SluiceError` where the table lacks one."""
    points = dense_points(partition)
    return {p.name: net_ms(p, partition, table.require(p.key, extents).ms, call_ms) for p, extents in points}


def net_ms(piece: Piece, partition: Partition, ms: float, call_ms: float) -> float:
    """``ms`` of the piece net of calls; the engine of a network makes one call in all."""
    return max(0.0, ms - calls_in(piece, partition) * call_ms)


def calls_in(piece: Piece, partition: Partition) -> int:
    """How many calls are in the milliseconds of the piece (rule 3); with several sources less than none."""
    return 1 - sum(has_source(partition.analysis.shapes[name]) for name in piece.bare)


def piece_points(partition: Partition, stairs: Mapping[str, Staircase]) -> list[tuple[Piece, tuple[int, ...]]]:
    """Every piece on the product of the levels of its extents (rule 1 of `sluice.profiler.sweep.bench`)."""
    return [
        (piece, tuple(int(v) for v in point))
        for piece in partition.pieces
        for point in itertools.product(*knots_of(piece, partition, stairs))
    ]


def knots_of(
    piece: Piece, partition: Partition, stairs: Mapping[str, Staircase], most: int = MAX_GRID
) -> list[list[int]]:
    """The values of every extent of a piece at which it is measured, at most ``most`` points if there are several."""
    names = [[group for group, _ in extent.coefs] for extent in piece.extents]
    lists = [totals(groups, partition, stairs) for groups in names]
    counts = [len(values) for values in lists]
    while len(lists) > 1 and math.prod(counts) > most:
        counts[counts.index(max(counts))] -= 1
    costs = [cost_of(groups, stairs) for groups in names]
    return [list(thin(values, count, cost)) for values, count, cost in zip(lists, counts, costs, strict=True)]


def cost_of(groups: Sequence[str], stairs: Mapping[str, Staircase]) -> Mapping[int, float]:
    """The cost of a group or a sum by its value; empty where it was not explored."""
    found = stairs.get(sum_of(groups))
    return found.cost if found is not None else {}


def totals(names: Sequence[str], partition: Partition, stairs: Mapping[str, Staircase]) -> list[int]:
    """The sizes that a sum of groups is measured at: a group's levels; those of several by rule 2."""
    if (found := stairs.get(sum_of(names))) is not None:
        return list(found.levels)
    shares = (k / (SUMS - 1) for k in range(SUMS))
    lists = [stairs[name].levels for name in names]
    return sorted({sum(_nearest(levels, share * levels[-1]) for levels in lists) for share in shares})


def _nearest(levels: Sequence[int], width: float) -> int:
    return min(levels, key=lambda level: abs(level - width))


def thin(values: Sequence[int], count: int, cost: Mapping[int, float] | None = None) -> tuple[int, ...]:
    """``count`` of the increasing values, ends included, by rule 1; spread evenly where the cost is not known."""
    if len(values) <= count:
        return tuple(values)
    curve = {v: cost[v] for v in values} if cost and cost.keys() >= set(values) else dict.fromkeys(values, 0.0)
    height, width = max(curve.values()) - min(curve.values()) or 1.0, values[-1] - values[0]
    chosen = {values[0], values[-1]}

    def missed(value: int) -> float:
        low, high = max(c for c in chosen if c < value), min(c for c in chosen if c > value)
        share = (value - low) / (high - low)
        off = abs(curve[value] - (1.0 - share) * curve[low] - share * curve[high])
        return off / height + EVEN * min(value - low, high - value) / width

    while len(chosen) < count:
        chosen.add(max((value for value in values if value not in chosen), key=missed))
    return tuple(sorted(chosen))
