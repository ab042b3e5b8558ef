"""Profile one network on this device: partition, explore, measure, join, calibrate.

A point that the table holds is not measured again, so a second call, another network with equal pieces or a run after a
kill costs only the points that are missing. This needs only numpy, onnx, onnx-graphsurgeon and a runtime.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.core.address import target_at
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.progress import Progress, progress_of, silent
from sluice.passes.precision.to_precision import to_precision
from sluice.passes.search_space import SearchSpace, agreed, called_like, find_search_space, read_onnx
from sluice.profiler.fit.calibrate import calibrate
from sluice.profiler.pieces.partition import Partition, partition_static, static_at, with_small
from sluice.profiler.survey import Unknown, closed_bench, measure_engine_share, survey, survey_of_known
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.shards import Shard
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN
from sluice.profiler.timing import timing_cache
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY
from sluice.profiler.timing.reference_engine import make_reference_engine, reference_model
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


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A calibrated latency model, the fingerprint of its times, and the partition of its graph.

    ``points`` of its pieces are in the table, of ``grid`` that there are at all widths and ranks; ``disturbed`` of them
    were measured on a machine that was never quiet. ``moved`` is the factor by which the table's times were multiplied
    when it was opened, as another host had begun it (`sluice.profiler.timing.reference_engine`). ``address``: where
    the target is, if not here.
    """

    latency: LatencyModel
    partition: Partition
    space: SearchSpace
    fingerprint: Fingerprint
    target: str
    reference_ms: float
    options: EditSpace = field(default_factory=EditSpace)
    timing_cache: bytes | None = None
    points: int = 0
    grid: int = 0
    disturbed: int = 0
    moved: float = 1.0
    address: str = ""

    def reference(self, runner: Runner) -> ReferenceEngine:
        """The reference engine that makes times of different moments comparable."""
        return ReferenceEngine(runner.build(reference_model()), self.reference_ms)

    def runner(self) -> Runner:
        runner = make_runner(target_at(self.target, self.address), self.fingerprint.threads)
        timing_cache.restore(runner, self.timing_cache)
        return runner

    def engine(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """An fp32 network as its engine is timed: in the profile's precision."""
        return to_precision(model, self.fingerprint.precision, target=self.target)


def fingerprint_here(deployment: Deployment) -> Fingerprint:
    """What a table measured now, on this machine or at the address of the target, must carry.

    Raises:
        SluiceError: the target is not here, or not there.
    """
    d = deployment
    runner = make_runner(d.place, d.threads)
    return Fingerprint(runner.device, d.target, runner.version, d.threads, d.precision, d.batch, runner.clock)


def measured_elsewhere(table: str | os.PathLike[str], deployment: Deployment) -> bool:
    """Whether there is a table for this deployment that another device, or another version of its runtime, filled."""
    if not os.path.exists(table):
        return False
    with LatencyTable.open(table) as opened:
        there = opened.fingerprint
    d = deployment
    if (there.runtime, there.batch, there.threads, there.precision) != (d.target, d.batch, d.threads, d.precision):
        return False
    try:
        return there != fingerprint_here(deployment)
    except SluiceError:
        return True


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


def profile_onnx(
    model: onnx.ModelProto,
    table: str | os.PathLike[str] = ":memory:",
    *,
    deployment: Deployment,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    like: SearchSpace | None = None,
    seed: int = 0,
    progress: bool | Progress = True,
) -> Profile:
    """Measure the points of ``model`` that ``table`` lacks, and return the calibrated latency model.

    Args:
        model: dense ONNX whose initialisers carry parameter names.
        table: SQLite file, made if it does not exist; refused if it belongs to another device or setting.
        deployment: what is measured; ``model`` itself is fp32 in any case.
        methods: what may be chosen, of ``filter``, ``rank``, ``block``, ``merge``.
        like: another reading of the same network, to whose sites the choice is limited.
        progress: True for bars with the time left, on standard error; or a way of one's own.
    Raises:
        SluiceError: nothing can be cut; the table is foreign, damaged or cannot be written.
    """
    methods, show = check_methods(methods), progress_of(progress)
    fingerprint = fingerprint_here(deployment)
    partition, space = _partition(model, fingerprint, exclude, methods, like)

    def lacks() -> bool:
        try:
            profile_known(model, table, exclude=exclude, methods=methods, like=like)
        except SluiceError:
            return True
        return False

    with _bench(table, fingerprint, deployment.place, seed, lacks) as bench:
        found = survey(partition, bench, show, methods=methods, space=space)
        _check_choice(space, found.alternatives.options)
        with show("engines") as advance:
            own = replace(bench, progress=advance)
            latency = calibrate(partition, found.latency(bench), own, found.alternatives, seed=seed)
        cache, counts = bench.table.get_blob(timing_cache.NAME), found.coverage(bench.table)
    done = Profile(
        latency,
        partition,
        space,
        fingerprint,
        deployment.target,
        bench.reference.ms,
        found.alternatives.options,
        cache,
        *counts,
        bench.reference.moved,
        deployment.address,
    )
    return done if like is None else _limited(done, like)


def profile_known(
    model: onnx.ModelProto,
    table: str | os.PathLike[str],
    *,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    like: SearchSpace | None = None,
) -> Profile:
    """The profile of a network whose points are all in ``table``, of whatever device; arguments as above.

    Raises:
        SluiceError: the table cannot be read, or lacks a point of this network.
    """
    methods = check_methods(methods)
    with LatencyTable.open(table) as opened:
        there, bench = opened.fingerprint, closed_bench(opened)
        partition, space = _partition(model, there, exclude, methods, like)
        try:
            found = survey(partition, bench, silent, methods=methods, space=space)
            _check_choice(space, found.alternatives.options)
            latency = calibrate(partition, found.latency(bench), bench, found.alternatives)
        except Unknown:
            raise SluiceError(
                f"{opened.path} was measured on {there.device!r} and lacks points of this network; profile it there, "
                f"with a job that `sluice profile --pack --table` makes"
            ) from None
        cache, options = opened.get_blob(timing_cache.NAME), found.alternatives.options
        reference, counts = opened.get(REFERENCE_KEY, ()), found.coverage(opened)
    reference_ms = reference.ms if reference is not None else math.nan
    done = Profile(latency, partition, space, there, there.runtime, reference_ms, options, cache, *counts)
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
    """Measure one shard's share of the points that ``table`` lacks (`sluice.profiler.sweep.shards`).

    Arguments are those of `profile_onnx`. Engines are measured only where the table holds all points, as the merged
    table of all shards does.
    """
    methods, show = check_methods(methods), progress_of(progress)
    fingerprint = fingerprint_here(deployment)
    partition, space = _partition(model, fingerprint, exclude, methods, None)
    with _bench(table, fingerprint, deployment.place, seed) as bench:
        before = len(bench.table)
        survey(partition, bench, show, methods=methods, space=space, shard=shard)
        points, engines = len(bench.table) - before, 0
        disturbed, _ = bench.table.beyond(UNCERTAIN, REFERENCE_KEY)
        known = survey_of_known(partition, bench.table, methods=methods, space=space)
        if known is not None:
            with show("engines") as advance:
                engines = measure_engine_share(known, replace(bench, progress=advance), shard, seed)
    return ShardDone(shard, points, engines, known is not None, disturbed, bench.reference.moved)


@contextmanager
def _bench(
    table: str | os.PathLike[str],
    fingerprint: Fingerprint,
    place: str,
    seed: int,
    lacks: Callable[[], bool] = lambda: True,
) -> Iterator[Bench]:
    """The table, opened or made, and its runner, with its timing cache and the reference engine.

    A table that lacks nothing stays in the time of the host that filled it.
    """
    rng, runner = np.random.default_rng(seed), make_runner(place, fingerprint.threads)
    with LatencyTable.open_or_create(table, fingerprint) as opened:
        timing_cache.restore(runner, opened.get_blob(timing_cache.NAME))
        yield Bench(opened, runner, make_reference_engine(opened, runner, rng, lacks=lacks), rng)


def _partition(
    model: onnx.ModelProto,
    fingerprint: Fingerprint,
    exclude: Sequence[str],
    methods: Sequence[str],
    like: SearchSpace | None,
) -> tuple[Partition, SearchSpace]:
    """The network at the batch of the deployment, its pieces, and what it can become."""
    static = static_at(model, fingerprint.batch)
    space = find_search_space(read_onnx(static), exclude)
    if like is not None:
        space = called_like(space, like)
    partition = partition_static(static, space.analysis, fingerprint.batch)
    # Less work takes no less time where a small batch leaves an accelerator idle, or threads wait for each other.
    if fingerprint.runtime == "ort-cpu" and fingerprint.threads == 1:
        partition = with_small(partition, model)
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
    return replace(profile, space=space, options=left, latency=profile.latency.pinned(shut))


def _check_choice(space: SearchSpace, options: EditSpace) -> None:
    """Something must be left to choose."""
    if not (space.analysis.groups or options.ranks or options.drops or options.merges):
        raise SluiceError(f"nothing in this model can be cut: {dict(list(space.left_alone.items())[:3])}")
