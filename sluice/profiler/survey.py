"""Measure what a latency model is assembled from: staircases, pieces, joints, alternatives; all of it or a share."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from sluice.latency import LatencyModel
from sluice.passes.options import Options
from sluice.profiler.alternatives import find_alternatives
from sluice.profiler.assemble import assemble
from sluice.profiler.calibrate import measure_engines, missing_plans, model_key
from sluice.profiler.pieces import Dissection
from sluice.profiler.progress import Progress, silent
from sluice.profiler.shards import WHOLE, Shard, share_of
from sluice.profiler.sweep import Bench, Staircase, explore, joint_points, piece_points
from sluice.profiler.variants import Alternatives
from sluice.runtime.runner import Clock, Runner, Session

__all__ = ["Survey", "measure_engine_share", "survey", "survey_of_known"]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What the table knows of a network, found by measuring what it did not know."""

    dissection: Dissection
    stairs: dict[str, Staircase]
    alternatives: Alternatives

    def latency(self, bench: Bench) -> LatencyModel:
        """The model, not calibrated; only of a survey of the whole."""
        return assemble(self.dissection, self.stairs, bench.table, self.alternatives)


def survey(
    dissection: Dissection,
    bench: Bench,
    progress: Progress,
    *,
    batch: int,
    methods: Sequence[str],
    exclude: Sequence[str],
    shard: Shard = WHOLE,
) -> Survey:
    """Measure what is missing of the shard's share; groups of which it has none stay at their size."""
    share = share_of(dissection, shard, methods)
    with progress("staircases") as advance:
        explored = explore(dissection, replace(bench, progress=advance), share.groups)
    stairs = {group: explored.get(group, Staircase({}, (size,))) for group, size in dissection.dense.items()}
    with progress("pieces") as advance:
        points = [(piece, at) for piece, at in piece_points(dissection, stairs) if share.has(piece)]
        replace(bench, progress=advance).pieces(dissection, points)
    with progress("joints") as advance:
        joints = [(joint, at) for joint, at in joint_points(dissection, stairs) if share.has(joint.producer)]
        replace(bench, progress=advance).joints(dissection, joints)
    with progress("alternatives") as advance:
        alternatives = Alternatives(Options())
        if set(methods) - {"filter"}:
            own, dense = replace(bench, progress=advance), dissection.dense
            # What takes a layer's place is compared with the dense layers, whoever has those.
            every = [(piece, tuple(int(e.at(dense)) for e in piece.extents)) for piece in dissection.pieces]
            own.pieces(dissection, every)
            left_out = (*exclude, *map(glob.escape, share.foreign))
            alternatives = find_alternatives(dissection, stairs, own, batch, methods, left_out)
    return Survey(dissection, stairs, alternatives)


def survey_of_known(
    dissection: Dissection, bench: Bench, *, batch: int, methods: Sequence[str], exclude: Sequence[str]
) -> Survey | None:
    """The survey of the whole if the table holds all of it, else None; nothing is measured."""
    try:
        return survey(
            dissection, replace(bench, runner=_Closed(bench.runner)), silent, batch=batch, methods=methods,
            exclude=exclude,
        )  # fmt: skip
    except _Unknown:
        return None


def measure_engine_share(known: Survey, bench: Bench, shard: Shard, seed: int) -> int:
    """Measure the shard's engines of those that a calibration needs; how many were missing (rule 4 of shards)."""
    model = known.latency(bench)
    key = model_key(known.dissection, model)
    there = [widths for widths, _ in bench.table.engines(key)]
    # All shards draw the same list, whatever they have measured since.
    rng = np.random.default_rng(seed)
    plans = missing_plans(known.dissection, model, known.alternatives, [], rng)
    own = [plan for k, plan in enumerate(plans) if shard.takes(k) and plan not in there]
    measure_engines(known.dissection, bench, own, known.alternatives.options, record=key)
    return len(own)


class _Unknown(Exception):
    """A point that would have to be measured."""


@dataclass(frozen=True, slots=True)
class _Closed:
    """A runner that builds nothing."""

    runner: Runner

    @property
    def clock(self) -> Clock:
        return self.runner.clock

    @property
    def device(self) -> str:
        return self.runner.device

    @property
    def version(self) -> str:
        return self.runner.version

    def build(
        self,
        model: onnx.ModelProto | bytes | str | os.PathLike[str],
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> Session:
        raise _Unknown
