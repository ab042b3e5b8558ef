"""Whole engines in configurations of a network: which of them are measured, and how.

1. Engines are timed in turns, as many at once as memory allows. Other tenants' use of the caches makes one ten seconds
   differ from the next by up to 5%, which must not tell engines apart. Engines are timed in passes, until nine in ten
   of them were seen twice near their lowest (`AGREE`) in passes in which the machine was quiet, or there were `PASSES`.
   The figure is each engine's lowest of quiet passes, or else of all, since noise only ever adds. From one pass to the
   next an engine differs by 0.3% on a quiet host (ResNet-20), by 1 to 2.5% on a busy one (MobileNetV2). Fewer than
   `FEWEST` engines have one pass: they are the dense one, or are measured again when a plan is verified.
2. Where engines of the network are known already, up to `REFERENCES` of them take their turns with the new ones, as
   memory allows. The new figures are given in the time of the known engines: times the median of ``known / now``. Known
   engines serve like the reference engine, but a tenant slows them by the same factor as the new ones, since they are
   of the same network. Each of them is known to a percent or two, hence many: with six, 40 plans of ResNet-20 took 1.5%
   longer than promised in the median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sluice.core.latency import LatencyModel
from sluice.core.weight_bytes import bytes_of_weights
from sluice.profiler.pieces.engine import build_engine, with_ranks_in_reach
from sluice.profiler.pieces.levels import evenly
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.sweep.bench import BURSTS, Bench
from sluice.profiler.table.measurement import Measurement, best_of
from sluice.runtime.base.runner import Session
from sluice.solver.options import EditSpace
from sluice.solver.random_configurations import random_configuration

__all__ = ["measure_engines", "missing_plans"]

ENGINES = 24  # of a complete table
FEWEST = 4  # engines that say how much slower the machine is by now
AGREE, PASSES = 0.015, 3
REFERENCES = 16
OF_PLANS = 1
AT_ONCE = 2**30  # bytes of weights and of `_working_bytes`; a runtime takes two to three times as much


def missing_plans(
    partition: Partition, model: LatencyModel, options: EditSpace, known: Sequence[Mapping[str, int]], seed: int
) -> list[dict[str, int]]:
    """Random plans that make ``known`` up to `ENGINES` different ones, if there are so many.

    The same after a kill, and for all shards: from ``seed`` on, numbers that nothing else draws.
    """
    rng = np.random.default_rng([seed, OF_PLANS])
    seen = {tuple(sorted(widths.items())) for widths in known}
    plans: list[dict[str, int]] = []
    for _ in range(20 * ENGINES):
        if len(seen) >= ENGINES:
            break
        plan = with_ranks_in_reach(partition, model, random_configuration(model, rng), options)
        if (identity := tuple(sorted(plan.items()))) not in seen:
            seen.add(identity)
            plans.append(plan)
    return plans


def measure_engines(
    partition: Partition,
    bench: Bench,
    plans: Sequence[Mapping[str, int]],
    options: EditSpace | None = None,
    *,
    known: Sequence[tuple[Mapping[str, int], Measurement]] = (),
    record: str = "",
) -> list[float]:
    """Milliseconds of whole engines (rule 1), in the time of those that are ``known`` (2).

    They are kept in the table under the key ``record``, if there is one.
    """
    if not plans:  # a complete table is only read
        return []
    found: list[Measurement] = []
    working = _working_bytes(partition)
    room = AT_ONCE // (bytes_of_weights(partition.model) + working)
    known = evenly(sorted(known, key=lambda engine: engine[1].ms), min(REFERENCES, max(FEWEST, room)))
    references = [bench.session(build_engine(partition, plan, options), part=False) for plan, _ in known]
    while len(found) < len(plans):
        sessions: list[Session] = []
        size = 0
        for plan in plans[len(found) :]:
            engine = build_engine(partition, plan, options)
            size += bytes_of_weights(engine) + working
            if sessions and size > AT_ONCE:
                break
            sessions.append(bench.session(engine, part=False))
        now = _passes(bench, [*references, *sessions])
        ratios = [there.ms / m.ms for (_, there), m in zip(known, now, strict=False)]
        scale = float(np.median(ratios)) if known else 1.0
        found += [replace(m, ms=scale * m.ms) for m in now[len(known) :]]
        bench.keep(())
        bench.progress(len(found), len(plans))
    if record:
        bench.table.put_engines(record, zip(plans, found, strict=True))
    return [m.ms for m in found]


def _passes(bench: Bench, sessions: Sequence[Session]) -> list[Measurement]:
    """Rule 1."""
    passes: list[tuple[Measurement, ...]] = []
    agreed = False
    while not agreed and len(passes) < (PASSES if len(sessions) >= FEWEST else 1):
        passes.append(bench.time(sessions, BURSTS))
        quiet = [[m.ms for m in found] for found in passes if not all(m.uncertain for m in found)]
        lowest = np.sort(quiet, axis=0)[:2]
        agreed = len(lowest) > 1 and float(np.quantile(lowest[1] / lowest[0], 0.9)) <= 1.0 + AGREE
    return [best_of(tries) for tries in zip(*passes, strict=True)]


def _working_bytes(partition: Partition) -> int:
    """The least bytes of an engine beside its weights: inputs and outputs of one node, where they are largest."""
    shapes = partition.analysis.shapes
    moving = shapes.keys() - partition.analysis.tensors.keys()
    tensors = [{*node.input, *node.output} & moving for node in partition.model.graph.node]
    return 4 * max(sum(math.prod(shapes[name]) for name in names) for names in tensors)
