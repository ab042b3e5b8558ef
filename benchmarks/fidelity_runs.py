"""How one run of `benchmarks.fidelity` is done: profile, draw, build, measure.

1. The weights are random, since the time of a network does not depend on them; CREPE's are not read either.
2. The profile is that of `sluice profile`: the dense network, the plans of some budgets, and their engines. Fresh plans
   are then drawn from all edits on offer. What they use is measured, as for every plan that is promised. Then their
   whole engines are built and measured, interleaved. A few of the calibration's engines take their turns with them and
   show how much slower the machine has become (`sluice.profiler.sweep.engine_times`, 2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.fidelity_results import Outcome, Record, Run
from examples.crepe.model import FRAME, Crepe
from sluice import models
from sluice.core.deployment import Deployment
from sluice.passes.cut.export import to_onnx
from sluice.profiler.need import walk
from sluice.profiler.pieces.engine import with_ranks_in_reach
from sluice.profiler.profile import profile_onnx
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import measure_engines
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import make_reference_engine
from sluice.solver.options import chosen_edits
from sluice.solver.random_configurations import random_configuration

__all__ = ["NETWORKS", "Network", "perform"]


@dataclass(frozen=True, slots=True)
class Network:
    """A network and the shape of one example of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def export(self) -> onnx.ModelProto:
        torch.manual_seed(0)
        return to_onnx(self.make().eval(), (torch.randn(2, *self.shape),))


NETWORKS: Mapping[str, Network] = {
    "resnet20": Network(models.resnet20, models.EXAMPLE_SHAPES["resnet20"]),
    "resnet1d": Network(models.resnet1d, models.EXAMPLE_SHAPES["resnet1d"]),
    "se_resnet": Network(models.se_resnet, models.EXAMPLE_SHAPES["se_resnet"]),
    "densenet": Network(models.densenet, models.EXAMPLE_SHAPES["densenet"]),
    "mobilenet_v2": Network(models.mobilenet_v2, models.EXAMPLE_SHAPES["mobilenet_v2"]),
    "vgg16_bn": Network(models.vgg16_bn, models.EXAMPLE_SHAPES["vgg16_bn"]),
    "crepe_tiny": Network(Crepe, (FRAME,)),
    "resnet50": Network(models.resnet50, models.EXAMPLE_SHAPES["resnet50"]),
}


def perform(run: Run, folder: Path) -> Record:
    """Promised and measured milliseconds of the run's plans; ``folder`` holds the latency tables.

    Raises:
        SluiceError: the table there is of another device or runtime, or nothing in the network can be cut.
    """
    dense, table = NETWORKS[run.network].export(), folder / run.table
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    deployment = Deployment(batch=run.batch, threads=run.threads)
    profile = profile_onnx(dense, table, deployment=deployment, methods=run.methods)
    walk(profile, run.methods)
    seconds = time.perf_counter() - started
    rng = np.random.default_rng(run.seed)
    latency, options = profile.latency, profile.options
    drawn = [
        with_ranks_in_reach(profile.partition, latency, random_configuration(latency, rng), options)
        for _ in range(run.plans)
    ]
    profile.ask(drawn)
    latency, runner = profile.latency, profile.runner()
    with LatencyTable.open(table) as opened:
        bench = Bench(opened, runner, make_reference_engine(opened, runner, rng), rng)
        known = opened.engines(profile.model_key)
        measured = measure_engines(profile.partition, bench, drawn, options, known=known)
    outcomes = []
    for configuration, ms in zip(drawn, measured, strict=True):
        edits = chosen_edits(options, configuration)
        counts = (len(edits.factorizations), len(edits.drops), len(edits.merges))
        outcomes.append(Outcome(latency.ms(configuration), ms, *counts))
    there, cover = profile.fingerprint, profile.coverage
    counts = (cover.points, cover.complete, cover.disturbed)
    return Record(run, there.device, there.runtime_version, round(seconds, 1), *counts, tuple(outcomes))
