"""At which sizes of its tensor a joint is measured.

1. The first `FEW` sizes, ends included, are spread over the sizes that the tensor can have (the levels of its group).
2. A joint jumps where the layout of its tensor changes, and may be flat otherwise. So where two neighbouring sizes
   differ by more than the tolerance, the size in the middle between them is measured too, and so on.
3. The tolerance is a share of the dense network's time (`GAIN`): a finer one would follow the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

from sluice.profiler.pieces.joints import Joint, find_joints
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.pieces.staircase import Staircase
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.grids import dense_points, thin, totals
from sluice.profiler.table.latency_table import LatencyTable

__all__ = [
    "explore_inner_joints",
    "explore_joints",
    "joint_graph",
    "joint_ms",
    "joint_points",
    "joint_sizes",
    "joint_tolerance",
]

FEW = 5
BATCH_OF_JOINTS = 8
GAIN = 0.003


def joint_tolerance(partition: Partition, table: LatencyTable) -> float:
    """Milliseconds (rule 3); a shard takes the dense pieces that it does not know to be like the others."""
    points = dense_points(partition)
    known = [found.ms for piece, at in points if (found := table.get(piece.key, at)) is not None]
    return GAIN * sum(known) * len(points) / max(1, len(known))


def joint_sizes(
    values: Sequence[int], saved: Callable[[int], float | None], tolerance: float
) -> tuple[tuple[int, ...], bool]:
    """The sizes of a joint, given the milliseconds ``saved`` at known sizes; and whether all of them are known."""
    chosen = thin(values, FEW)
    place = {value: k for k, value in enumerate(values)}
    while all(saved(value) is not None for value in chosen):
        between = {
            values[(place[a] + place[b]) // 2]
            for a, b in itertools.pairwise(chosen)
            if place[b] - place[a] > 1 and abs((saved(b) or 0.0) - (saved(a) or 0.0)) > tolerance
        }
        if not between:
            return chosen, True
        chosen = tuple(sorted({*chosen, *between}))
    return chosen, False


def joint_points(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    table: LatencyTable,
    tolerance: float,
    tensors: Collection[str] | None = None,
) -> list[tuple[Joint, tuple[int, ...]]]:
    """The points wanted of all joints, or of those at ``tensors``, given the points in the table so far."""
    joints = [joint for joint in _joints(partition) if tensors is None or joint.tensor in tensors]
    return _points_of(joints, partition, stairs, table, tolerance)


def _points_of(
    joints: Sequence[Joint],
    partition: Partition,
    stairs: Mapping[str, Staircase],
    table: LatencyTable,
    tolerance: float,
) -> list[tuple[Joint, tuple[int, ...]]]:
    points: list[tuple[Joint, tuple[int, ...]]] = []
    for joint in joints:
        if joint.extent is None:
            points.append((joint, ()))
            continue
        known = {extents[0]: found.ms for extents, found in table.points(joint.key).items()}
        values = totals([g for g, _ in joint.extent.coefs], partition, stairs)
        sizes, _ = joint_sizes(values, known.get, tolerance * joint_graph(joint, partition).batch / partition.batch)
        points += [(joint, (size,)) for size in sizes]
    return points


def _missing(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    joints: Sequence[Joint],
    table: LatencyTable,
    tolerance: float,
) -> list[tuple[Joint, tuple[int, ...]]]:
    """The points of these joints that the table lacks so far."""
    points = _points_of(joints, partition, stairs, table, tolerance)
    return [(joint, at) for joint, at in points if table.get(joint.key, at) is None]


def joint_graph(joint: Joint, partition: Partition) -> Partition:
    """The graph at the batch that the joint is measured at (rules 1 and 2 of `sluice.profiler.pieces.joints`)."""
    return partition if joint.pair else partition.small or partition


def _joints(partition: Partition) -> list[Joint]:
    """All joints, each of the graph that it is measured in."""
    at_batch = find_joints(partition)
    if partition.small is None:
        return list(at_batch)
    small = {joint.tensor: joint for joint in find_joints(partition.small)}
    return [joint if joint.pair else small[joint.tensor] for joint in at_batch]


def joint_ms(joint: Joint, partition: Partition, ms: float, call_ms: float) -> float:
    """Milliseconds that the joint saves, net of calls, at the batch of the partition, given ``ms`` in `joint_graph`."""
    return (ms - joint.calls * call_ms) * partition.batch / joint_graph(joint, partition).batch


def explore_joints(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    bench: Bench,
    tolerance: float,
    wanted: Callable[[Joint], bool] = lambda joint: True,
) -> None:
    """Measure all joints of a graph that are ``wanted``, until the table has their points."""
    joints = [joint for joint in _joints(partition) if wanted(joint)]
    _explore([(partition, stairs, joints)], bench, tolerance)


def explore_inner_joints(
    graphs: Sequence[tuple[Partition, Mapping[str, Staircase], Collection[str]]], bench: Bench, tolerance: float
) -> None:
    """Measure the joints at some tensors of several graphs, until the table has their points.

    Joints of different graphs share calls: each graph by itself has one or two, and every call waits for a quiet
    machine.
    """
    distinct = {id(partition): partition for partition, *_ in graphs}  # one graph shows many layers
    found = {key: _joints(partition) for key, partition in distinct.items()}
    _explore(
        [(p, stairs, [j for j in found[id(p)] if j.tensor in tensors]) for p, stairs, tensors in graphs],
        bench,
        tolerance,
    )


def _explore(
    graphs: Sequence[tuple[Partition, Mapping[str, Staircase], Sequence[Joint]]], bench: Bench, tolerance: float
) -> None:
    """The points that a joint needs follow from its known ones, so they are asked for anew after every batch.

    A graph that has all of its points lacks none later, so it is not asked again.
    """
    done = 0
    while True:
        lacking = [(graph, points) for graph in graphs if (points := _missing(*graph, bench.table, tolerance))]
        graphs = [graph for graph, _ in lacking]
        missing = {
            (joint.key, at): (joint_graph(joint, partition), joint, at)
            for (partition, *_), points in lacking
            for joint, at in points
        }
        if not missing:
            return
        batch = list(missing.values())[:BATCH_OF_JOINTS]
        bench.joints(batch)
        bench.progress(done + len(batch), done + len(missing))
        done = done + len(batch) if len(missing) > len(batch) else 0
