"""Profile one network on this device: what it is made of, what each part takes, and what is still unknown.

A profile begins with the dense network measured, piece by piece and as a whole. What else it is asked for is measured
then (`Profile.ask`, `sluice.profiler.need`), and kept in the table. A point that the table holds is not measured again,
so a second call, another network with equal pieces or a run after a kill costs only what is missing. This needs only
numpy, onnx, onnx-graphsurgeon, a runtime, and scipy for what was not measured.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from sluice.core.deployment import ON_CPU, Deployment
from sluice.core.errors import SluiceError
from sluice.core.progress import Progress, progress_of
from sluice.passes.graph.width_limits import FREE, WidthLimits
from sluice.passes.search_space import SearchSpace, agreed, called_like, find_search_space, read_onnx
from sluice.profiler.pieces.engine import model_key
from sluice.profiler.pieces.partition import Partition, partition_static, static_at, with_small
from sluice.profiler.pieces.weightless import light
from sluice.profiler.survey import closed_bench, complete_points, measure_slots, survey
from sluice.profiler.sweep.bench import Bench, Unknown
from sluice.profiler.sweep.engine_times import missing_plans
from sluice.profiler.sweep.fusion import by_kernels
from sluice.profiler.sweep.shards import Shard
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN
from sluice.profiler.timing import timing_cache
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY
from sluice.profiler.timing.reference_engine import is_of_another_host, make_reference_engine
from sluice.profiler.view import Profile, Seen
from sluice.runtime.base.runner import Runner
from sluice.runtime.targets import make_runner
from sluice.solver.options import EditSpace, check_methods

__all__ = [
    "Profile",
    "ShardDone",
    "fingerprint_here",
    "measured_elsewhere",
    "profile_known",
    "profile_onnx",
    "profile_shard",
]


def fingerprint_here(deployment: Deployment) -> Fingerprint:
    """What a table measured now, on this machine or at the address of the target, must carry.

    Raises:
        SluiceError: the target is not here, or not there.
    """
    return _fingerprint(make_runner(deployment.place, deployment.threads), deployment)


def _fingerprint(runner: Runner, d: Deployment) -> Fingerprint:
    return Fingerprint(runner.device, d.target, runner.version, d.threads, d.precision, d.batch, runner.clock)


def measured_elsewhere(table: str | os.PathLike[str], deployment: Deployment) -> bool:
    """Whether another device or host, or another version of the runtime, filled the table for this deployment."""
    if not os.path.exists(table):
        return False
    d = deployment
    with LatencyTable.open(table) as opened:
        there = opened.fingerprint
        if (there.runtime, there.batch, there.threads, there.precision) != (d.target, d.batch, d.threads, d.precision):
            return False
        try:
            runner = make_runner(d.place, d.threads)
        except SluiceError:
            return True
        return there != _fingerprint(runner, d) or is_of_another_host(opened, runner)


@dataclass(frozen=True, slots=True)
class ShardDone:
    """The points and engines that a shard added to its table, and whether the table now holds all of the network.

    Of the table's points ``disturbed`` were measured on a machine that was never quiet.
    """

    shard: Shard
    points: int
    engines: int
    complete: bool
    disturbed: int = 0


def profile_onnx(
    model: onnx.ModelProto,
    table: str | os.PathLike[str] = ":memory:",
    *,
    deployment: Deployment,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    like: SearchSpace | None = None,
    limits: WidthLimits = FREE,
    complete: bool = False,
    minutes: float = math.inf,
    seed: int = 0,
    progress: bool | Progress = True,
) -> Profile:
    """Measure the dense network, as far as ``table`` lacks it; the profile measures the rest when it is asked.

    Args:
        model: dense ONNX whose initialisers carry parameter names.
        table: SQLite file, made if it does not exist; refused if it belongs to another device or setting.
        deployment: what is measured; ``model`` itself is fp32 in any case.
        methods: what may be chosen, of ``filter``, ``rank``, ``block``, ``merge``.
        like: another reading of the same network, to whose sites and widths the choice is limited.
        limits: of widths, where there is no such reading.
        minutes: after so many no more is measured, and what is not known then is estimated. The dense network is
            measured in any case.
        complete: measure everything now, for a table that serves where this device is not at hand.
        progress: True for the display of `sluice.core.progress`, on standard error; or a way of one's own.
    Raises:
        SluiceError: nothing can be cut; the table is foreign, damaged or cannot be written.
    """
    methods, show = check_methods(methods), progress_of(progress)
    fingerprint = fingerprint_here(deployment)
    partition, space = _partition(model, fingerprint, exclude, methods, like, limits)

    if not minutes > 0:
        raise SluiceError(f"minutes={minutes} leave no time to measure; give more than 0, or leave it out")
    deadline = time.monotonic() + 60.0 * minutes
    bench = _open_bench(table, fingerprint, deployment.place, seed)
    partition = by_kernels(partition, bench.table, bench.runner, space, methods)
    with show("dense network") as advance:
        layout = survey(partition, replace(bench, progress=advance), methods=methods, space=space)
    limited = replace(bench, deadline=deadline)
    done = Profile(layout, limited, space, layout.alternatives.options, progress=show, address=deployment.address)
    _check_choice(space, done.options)
    if complete:
        with show("all points") as advance:
            measure_slots(replace(limited, progress=advance), complete_points(layout))
    done.time_engines(_engines_of_complete(done, seed) if complete else [layout.dense])
    return done if like is None else _limited(done, like)


def profile_known(
    model: onnx.ModelProto,
    table: str | os.PathLike[str],
    *,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    like: SearchSpace | None = None,
) -> Profile:
    """The profile of a network from ``table`` alone, of whatever device; arguments as above.

    Raises:
        SluiceError: the table cannot be read, or lacks a point of the dense network.
    """
    methods = check_methods(methods)
    opened = LatencyTable.open(table)
    there, bench = opened.fingerprint, closed_bench(opened)
    partition, space = _partition(model, there, exclude, methods, like)
    partition = by_kernels(partition, opened, None, space, methods)
    try:
        layout = survey(partition, bench, methods=methods, space=space)
        known = any(widths == dict(layout.dense) for widths, _ in opened.engines(model_key(partition, layout.dense)))
        if not known:
            raise Unknown
    except Unknown:
        opened.close()
        raise SluiceError(
            f"{opened.path} was measured on {there.device!r} and lacks points of this network; profile it there, "
            f"with a job that `sluice profile --pack --table` makes"
        ) from None
    _check_choice(space, layout.alternatives.options)
    done = Profile(layout, bench, space, layout.alternatives.options)
    return done if like is None else _limited(done, like)


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
    partition, space = _partition(model, fingerprint, exclude, methods, None)
    bench = _open_bench(table, fingerprint, deployment.place, seed)
    with bench.table:
        before = len(bench.table)
        partition = by_kernels(partition, bench.table, bench.runner, space, methods)
        with show("dense network") as advance:
            layout = survey(partition, replace(bench, progress=advance), methods=methods, space=space)
        points = complete_points(layout)
        with show("points of the shard") as advance:
            own = [(slot, at) for slot, at in points if shard.takes(slot.part.key, at)]
            measure_slots(replace(bench, progress=advance), own)
        added, engines = len(bench.table) - before, 0
        complete = all(bench.table.get(slot.part.key, at) is not None for slot, at in points)
        if complete:
            done = Profile(layout, bench, space, layout.alternatives.options, progress=show)
            plans = _engines_of_complete(done, seed)  # the same list for all shards
            mine = [plan for k, plan in enumerate(plans) if shard.takes(done.model_key, (k,))]
            engines = len(bench.table.engines(done.model_key))
            done.time_engines(mine)
            engines = len(bench.table.engines(done.model_key)) - engines
        disturbed, _ = bench.table.beyond(UNCERTAIN, REFERENCE_KEY)
    return ShardDone(shard, added, engines, complete, disturbed)


def _engines_of_complete(profile: Profile, seed: int) -> list[dict[str, int]]:
    """The configurations whose engines a complete table has: the dense one and random ones."""
    dense = [dict(profile.layout.dense)]
    return dense + missing_plans(profile.partition, profile.latency, profile.options, dense, seed)


def _open_bench(table: str | os.PathLike[str], fingerprint: Fingerprint, place: str, seed: int) -> Bench:
    """The table, opened or made, and its runner, with its timing cache and the reference engine."""
    rng, runner = np.random.default_rng(seed), make_runner(place, fingerprint.threads)
    opened = LatencyTable.open_or_create(table, fingerprint)
    try:
        timing_cache.restore(runner, opened.get_blob(timing_cache.NAME))
        return Bench(opened, runner, make_reference_engine(opened, runner, rng), rng)
    except BaseException:
        opened.close()
        raise


def _partition(
    model: onnx.ModelProto,
    fingerprint: Fingerprint,
    exclude: Sequence[str],
    methods: Sequence[str],
    like: SearchSpace | None,
    limits: WidthLimits = FREE,
) -> tuple[Partition, SearchSpace]:
    """The network at the batch of the deployment, its pieces, and what it can become."""
    bare = light(model)
    static = static_at(bare, fingerprint.batch)
    dims = like is not None and like.analysis.dims
    space = find_search_space(read_onnx(static, model, dims=dims), exclude, limits)
    if like is not None:
        space = replace(called_like(space, like), limits=like.limits)
    partition = partition_static(static, space.analysis, fingerprint.batch)
    # Less work takes no less time where a small batch leaves an accelerator idle, or threads wait for each other.
    if fingerprint.runtime in ON_CPU and fingerprint.threads == 1:
        partition = with_small(partition, bare)
    if tuple(methods) == ("filter",):
        _check_choice(space if like is None else agreed(space, like), EditSpace())
    return partition, space


def _limited(profile: Profile, like: SearchSpace) -> Profile:
    """The profile with the sites that ``like`` has as well; all others stay dense.

    This comes after measuring, so a table serves whether or not the other reading was at hand when it was filled.
    """
    space, options = agreed(profile.space, like), profile.options
    drops, merges = {f"{block.name}|drop" for block in space.blocks}, {site.switch for site in space.merges}
    left = EditSpace(
        tuple(option for option in options.ranks if option.param in space.ranks),
        {switch: drop for switch, drop in options.drops.items() if switch in drops},
        {switch: merge for switch, merge in options.merges.items() if switch in merges},
    )
    _check_choice(space, left)
    groups = {group.name for group in profile.space.analysis.groups}
    shut = groups - {group.name for group in space.analysis.groups}
    shut |= {name for option in options.ranks if option not in left.ranks for name in (option.switch, option.rank)}
    shut |= (options.drops.keys() - left.drops.keys()) | (options.merges.keys() - left.merges.keys())
    return replace(profile, space=space, options=left, shut=frozenset(shut), _seen=Seen())


def _check_choice(space: SearchSpace, options: EditSpace) -> None:
    """Something must be left to choose."""
    if not (space.analysis.groups or options.ranks or options.drops or options.merges):
        raise SluiceError(f"nothing in this model can be cut: {dict(list(space.left_alone.items())[:3])}")
