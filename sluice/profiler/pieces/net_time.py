"""Milliseconds net of calls: a piece that is timed alone pays for a call of an engine, in the network it does not.

The measured time of a piece has one call in it, less one per source, whose time was subtracted with its call. A joint
holds the calls that it saves. The engine of a network makes one call in all. A call includes what an output takes,
since a small piece takes a few microseconds only.
"""

from __future__ import annotations

from collections.abc import Sequence

from sluice.profiler.pieces.joints import Joint, find_joints
from sluice.profiler.pieces.partition import Partition, Piece
from sluice.profiler.pieces.sources import has_source
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement

__all__ = [
    "CALL_KEY",
    "calls_in",
    "dense_points",
    "joint_graph",
    "joint_ms",
    "known_call",
    "measured_joints",
    "net_ms",
]

CALL_KEY = "call-v4"  # of the point that is the time of an engine with nothing to do
FORMER_KEY = "call-v3"  # the same without its output, in tables of before


def dense_points(partition: Partition, pieces: Sequence[Piece] | None = None) -> list[tuple[Piece, tuple[int, ...]]]:
    """Every piece of the graph, or some of them, at its dense size."""
    dense, pieces = partition.dense, partition.pieces if pieces is None else pieces
    return [(piece, tuple(int(e.at(dense)) for e in piece.extents)) for piece in pieces]


def known_call(table: LatencyTable) -> Measurement | None:
    """The point of a call, if the table has one."""
    found = table.get(CALL_KEY, ())
    return table.get(FORMER_KEY, ()) if found is None else found


def calls_in(piece: Piece, partition: Partition) -> int:
    """How many calls are in the milliseconds of the piece; with several sources less than none."""
    return 1 - sum(has_source(partition.analysis.shapes[name]) for name in piece.bare)


def net_ms(piece: Piece, partition: Partition, ms: float, call_ms: float) -> float:
    """``ms`` of the piece net of calls."""
    return max(0.0, ms - calls_in(piece, partition) * call_ms)


def joint_graph(joint: Joint, partition: Partition) -> Partition:
    """The graph at the batch that the joint is measured at (rules 1 and 2 of `sluice.profiler.pieces.joints`)."""
    return partition if joint.batch == partition.batch else partition.small or partition


def measured_joints(partition: Partition) -> list[Joint]:
    """All joints, each of the graph that it is measured in."""
    at_batch = find_joints(partition)
    if partition.small is None:
        return list(at_batch)
    small = {joint.tensor: joint for joint in find_joints(partition.small)}
    return [joint if joint.pair or joint.fits else small[joint.tensor] for joint in at_batch]


def joint_ms(joint: Joint, partition: Partition, ms: float, call_ms: float) -> float:
    """Milliseconds that the joint saves, net of calls, at the batch of the partition, given ``ms`` in `joint_graph`."""
    return (ms - joint.calls * call_ms) * partition.batch / joint_graph(joint, partition).batch
