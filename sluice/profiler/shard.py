"""Profile a shard: its share of the points of a complete table, and of the engines once all points are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx

from sluice.core.deployment import Deployment
from sluice.core.progress import Progress, progress_of
from sluice.profiler.choice import partition_of
from sluice.profiler.profile import Profile, fingerprint_here, open_bench
from sluice.profiler.survey import complete_points, measure_slots, survey
from sluice.profiler.sweep.engine_times import missing_plans
from sluice.profiler.sweep.shards import Shard
from sluice.profiler.table.measurement import UNCERTAIN
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY
from sluice.solver.options import check_methods

__all__ = ["ShardDone", "profile_shard"]


@dataclass(frozen=True, slots=True)
class ShardDone:
    """The points and engines that a shard added to its table, and whether the table now holds all of the network.

    Of the table's points ``disturbed`` were measured on a machine that was never quiet; ``moved`` as in `Profile`.
    """

    shard: Shard
    points: int
    engines: int
    complete: bool
    disturbed: int = 0
    moved: float = 1.0


def profile_shard(
    model: onnx.ModelProto,
    table: str | os.PathLike[str],
    shard: Shard,
    *,
    deployment: Deployment,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    seed: int = 0,
    progress: bool | Progress = True,
) -> ShardDone:
    """Measure one shard's share of the points that a complete table holds and ``table`` lacks.

    Arguments are those of `profile_onnx`. The dense network is measured by every shard, as what is offered follows from
    it. Engines are measured only where the table holds all points, as the merged table of all shards does.
    """
    methods, show = check_methods(methods), progress_of(progress)
    fingerprint = fingerprint_here(deployment)
    partition, space = partition_of(model, fingerprint, exclude, methods, None)
    bench = open_bench(table, fingerprint, deployment.place, seed)
    with bench.table:
        before = len(bench.table)
        with show("dense network") as advance:
            layout = survey(partition, replace(bench, progress=advance), methods=methods, space=space)
        points = complete_points(layout)
        with show("points of the shard") as advance:
            own = [point for k, point in enumerate(points) if shard.takes(k)]
            measure_slots(replace(bench, progress=advance), own)
        added, engines = len(bench.table) - before, 0
        complete = all(bench.table.get(slot.part.key, at) is not None for slot, at in points)
        if complete:
            done = Profile(layout, bench, space, layout.alternatives.options, progress=show)
            plans = [dict(layout.dense)]
            plans += missing_plans(partition, done.latency, done.options, plans, seed)  # the same list for all shards
            mine = [plan for k, plan in enumerate(plans) if shard.takes(k)]
            engines = len(bench.table.engines(done.model_key))
            done.time_engines(mine)
            engines = len(bench.table.engines(done.model_key)) - engines
        disturbed, _ = bench.table.beyond(UNCERTAIN, REFERENCE_KEY)
    return ShardDone(shard, added, engines, complete, disturbed, bench.reference.moved)
