"""What a latency model needs to begin with: the dense network, measured, and what is offered in its place.

1. Every piece and joint of the dense graph is measured at its dense size. That is one call or two.
2. From these points alone follows what else is offered (`sluice.profiler.fit.alternatives`).
3. The rest is measured when it is asked for (`sluice.profiler.need`), or all of it (`complete_points`): pieces on the
   product of at most `COARSE` of their levels per extent, `GRID` points in all, joints at `SIZES` sizes.
4. Shards share the points of rule 3 among hosts of one kind, by a hash.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError
from sluice.passes.search_space import SearchSpace
from sluice.profiler.fit.alternatives import find_alternatives
from sluice.profiler.fit.assemble import Layout, Slot, lay_out
from sluice.profiler.fit.cost_law import Known, fit_law
from sluice.profiler.pieces.joints import Joint
from sluice.profiler.pieces.levels import evenly
from sluice.profiler.pieces.net_time import dense_points, joint_graph, measured_joints, net_ms
from sluice.profiler.pieces.partition import Partition, Piece
from sluice.profiler.pieces.variants import Alternatives
from sluice.profiler.pieces.work import work_of
from sluice.profiler.sweep.bench import Bench, JointPoint, PiecePoint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.solver.options import EditSpace

__all__ = ["Coverage", "closed_bench", "complete_points", "coverage", "measure_slots", "survey"]

COARSE, GRID, SIZES = 9, 49, 5


def survey(partition: Partition, bench: Bench, *, methods: Sequence[str], space: SearchSpace) -> Layout:
    """The slots of the network (rules 1 and 2).

    Raises:
        Unknown: the bench is closed, and the table lacks a point of the dense network.
    """
    points = dense_points(partition)
    joints: list[JointPoint] = []
    for joint in measured_joints(partition):
        size = () if joint.extent is None else (int(joint.extent.at(partition.dense)),)
        joints.append((joint_graph(joint, partition), joint, size))
    call_ms = bench.call()
    bench.measure([(partition, *point) for point in points], joints)
    for piece, at in points:
        if (piece.key, at) in bench.refused:
            raise SluiceError(
                f"{piece.description}, a part of the dense network, does not run: {bench.refused[piece.key, at]}"
            )
    alternatives = Alternatives(EditSpace())
    if set(methods) - {"filter"}:
        found = {p.name: (p, at, bench.table.require(p.key, at).ms) for p, at in points}
        dense_ms = {name: net_ms(p, partition, ms, call_ms) for name, (p, _, ms) in found.items()}
        law = fit_law([_one(p, at, partition, dense_ms[name]) for name, (p, at, _) in found.items()])
        precision = bench.table.fingerprint.precision
        alternatives = find_alternatives(partition, law, dense_ms, methods, space, precision)
    return lay_out(partition, alternatives, bench.table.fingerprint.precision, space.limits)


def _one(piece: Piece, at: tuple[int, ...], partition: Partition, ms: float) -> Known:
    return Known(piece.key, work_of(piece, partition), np.array([at], dtype=np.float64), np.array([ms]))


def measure_slots(bench: Bench, points: Sequence[tuple[Slot, tuple[int, ...]]]) -> int:
    """Measure those of the points that the table lacks; how many these were."""
    pieces: list[PiecePoint] = []
    joints: list[JointPoint] = []
    for slot, at in points:
        if isinstance(slot.part, Joint):
            joints.append((joint_graph(slot.part, slot.graph), slot.part, at))
        else:
            pieces.append((slot.graph, slot.part, at))
    return bench.measure(pieces, joints)


def complete_points(layout: Layout) -> list[tuple[Slot, tuple[int, ...]]]:
    """Rule 3: everything that a complete table holds, each point once."""
    found: dict[tuple[str, tuple[int, ...]], tuple[Slot, tuple[int, ...]]] = {}
    for slot in layout.slots:
        most = [SIZES if isinstance(slot.part, Joint) else COARSE for _ in slot.knots]
        counts = [min(n, len(values)) for n, values in zip(most, slot.knots, strict=True)]
        while len(counts) > 1 and math.prod(counts) > GRID:
            counts[counts.index(max(counts))] -= 1
        axes = [evenly(values, count) for values, count in zip(slot.knots, counts, strict=True)]
        for at in itertools.product(*axes):
            found.setdefault((slot.part.key, at), (slot, at))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many ``points`` of a network a table holds, of how many in a ``complete`` one.

    ``disturbed`` of the first were measured on a machine that was never quiet.
    """

    points: int
    complete: int
    disturbed: int


def coverage(layout: Layout, table: LatencyTable) -> Coverage:
    """What the table holds of the network."""
    keys = {slot.part.key for slot in layout.slots}
    found = [measured for key in keys for measured in table.points(key).values()]
    return Coverage(len(found), len(complete_points(layout)), sum(measured.uncertain for measured in found))


def closed_bench(table: LatencyTable) -> Bench:
    """A bench that only reads: `Unknown` is raised where something would have to be measured."""
    nothing: Any = None  # which is never asked
    return Bench(table, nothing, ReferenceEngine(nothing, math.nan), np.random.default_rng(0), closed=True)
