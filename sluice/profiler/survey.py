"""Measure what a latency model is assembled from: staircases, pieces, joints, alternatives; all of it or a share."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from sluice.core.latency import LatencyModel
from sluice.core.progress import Progress, silent
from sluice.passes.search_space import SearchSpace
from sluice.profiler.fit.assemble import assemble
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.pieces.staircase import Staircase
from sluice.profiler.pieces.variants import Alternatives
from sluice.profiler.sweep.alternatives import find_alternatives
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import measure_engines, missing_plans, model_key
from sluice.profiler.sweep.explore import explore
from sluice.profiler.sweep.grids import dense_points, piece_points
from sluice.profiler.sweep.joint_sweep import explore_joints, joint_tolerance
from sluice.profiler.sweep.shards import WHOLE, Shard, share_of
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.runtime.base.runner import Clock, Session
from sluice.solver.options import EditSpace

__all__ = ["Survey", "Unknown", "closed_bench", "measure_engine_share", "survey", "survey_of_known"]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What the table knows of a network, found by measuring what it did not know."""

    partition: Partition
    stairs: dict[str, Staircase]
    alternatives: Alternatives

    def latency(self, bench: Bench) -> LatencyModel:
        """The model, not calibrated; only of a survey of the whole."""
        return assemble(self.partition, self.stairs, bench.table, self.alternatives)

    def coverage(self, table: LatencyTable) -> tuple[int, int, int]:
        """How many points of the pieces are in the table, how many there would be at all widths and ranks, and how many
        of the first were measured on a machine that was never quiet."""
        dense = [(piece, self.partition.dense) for piece in self.partition.pieces]
        shown = [(piece, s.partition.dense) for s in self.alternatives.shown for piece in s.place.pieces]
        pieces = {piece.key: math.prod(int(e.at(sizes)) for e in piece.extents) for piece, sizes in (*shown, *dense)}
        found = [measured for key in pieces for measured in table.points(key).values()]
        return len(found), sum(pieces.values()), sum(measured.uncertain for measured in found)


def survey(
    partition: Partition,
    bench: Bench,
    progress: Progress,
    *,
    methods: Sequence[str],
    space: SearchSpace,
    shard: Shard = WHOLE,
) -> Survey:
    """Measure what is missing of the shard's share; groups of which it has none stay at their size."""
    share = share_of(partition, shard, methods)
    with progress("staircases") as advance:
        explored = explore(partition, replace(bench, progress=advance), share.groups)
    unexplored = {group: Staircase({}, (size,)) for group, size in partition.dense.items()}
    stairs = {**unexplored, **explored}
    with progress("pieces") as advance:
        points = [(piece, at) for piece, at in piece_points(partition, stairs) if share.has(piece)]
        replace(bench, progress=advance).pieces(partition, points)
    with progress("joints") as advance:
        own = replace(bench, progress=advance)
        tolerance = joint_tolerance(partition, bench.table)
        ours = {piece.name for piece in partition.pieces if share.has(piece)}
        if ours:
            own.call()
        explore_joints(partition, stairs, own, tolerance, wanted=lambda joint: joint.producer.name in ours)
    with progress("alternatives") as advance:
        alternatives = Alternatives(EditSpace())
        if set(methods) - {"filter"}:
            own = replace(bench, progress=advance)
            # What takes a layer's place is compared with the dense layers, whoever has those.
            own.pieces(partition, dense_points(partition))
            alternatives = find_alternatives(partition, stairs, own, methods, space.without(share.foreign))
    return Survey(partition, stairs, alternatives)


def survey_of_known(
    partition: Partition, table: LatencyTable, *, methods: Sequence[str], space: SearchSpace
) -> Survey | None:
    """The survey of the whole if the table holds all of it, else None; nothing is measured."""
    try:
        return survey(partition, closed_bench(table), silent, methods=methods, space=space)
    except Unknown:
        return None


def measure_engine_share(known: Survey, bench: Bench, shard: Shard, seed: int) -> int:
    """Measure the shard's engines of those that a calibration needs; how many were missing (rule 4 of shards)."""
    model = known.latency(bench)
    key = model_key(known.partition, model)
    there = [widths for widths, _ in bench.table.engines(key)]
    plans = missing_plans(known.partition, model, known.alternatives, [], seed)  # the same list for all shards
    own = [plan for k, plan in enumerate(plans) if shard.takes(k) and plan not in there]
    measure_engines(known.partition, bench, own, known.alternatives.options, record=key)
    return len(own)


class Unknown(Exception):
    """A point that would have to be measured."""


@dataclass(frozen=True, slots=True)
class _Closed:
    """A runner that builds nothing, and an engine that does not run."""

    fingerprint: Fingerprint

    @property
    def clock(self) -> Clock:
        return self.fingerprint.clock

    @property
    def device(self) -> str:
        return self.fingerprint.device

    @property
    def version(self) -> str:
        return self.fingerprint.runtime_version

    def build(
        self,
        model: onnx.ModelProto | bytes | str | os.PathLike[str],
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> Session:
        raise Unknown

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise Unknown

    def sample(self, repeats: int) -> float:
        raise Unknown


def closed_bench(table: LatencyTable) -> Bench:
    """A bench that only reads: `Unknown` is raised where something would have to be measured."""
    nothing = _Closed(table.fingerprint)
    return Bench(table, nothing, ReferenceEngine(nothing, math.nan), np.random.default_rng(0), closed=True)
