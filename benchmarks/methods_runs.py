"""One run of `benchmarks.methods`: compress a job's network by one method, or train its control.

The control is the widest network of the job's scale whose engine, measured in turns with the dense one, meets the
budget; it is found before training, since latency does not depend on the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

import sluice
from benchmarks.methods_jobs import Job
from benchmarks.methods_results import Record, Run
from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import finalize, to_onnx
from sluice.pipeline.figures import count_parameters
from sluice.pipeline.verify import ACCEPTED
from sluice.profiler.timing.measure import measure
from sluice.runtime.base.host import host_device
from sluice.runtime.targets import make_runner
from sluice.training.train import LR, fit

__all__ = ["pair_ms", "perform", "widest"]

TARGET, THREADS = "ort-cpu", 1
TURNS = 3
PARTS: dict[str, tuple[str, ...]] = {
    "filter": ("filter",),
    "rank": ("rank",),
    "block": ("block",),
    "merge": ("merge",),
    "bsr": ("bsr",),
    "joint": ("filter", "rank", "block", "merge"),
}


def perform(job: Job, run: Run, folder: Path) -> Record:
    """The record of the run; a budget out of reach is a result, every other error is raised."""
    torch.manual_seed(run.seed)
    started = time.perf_counter()
    try:
        return thin(job, run) if run.method == "thin" else compressed(job, run, folder / f"{job.name}.db")
    except SluiceError as error:
        if "cannot be met" not in str(error) and "no engine within" not in str(error):
            raise
        seconds = time.perf_counter() - started
        return Record(run, host_device(), job.evaluate(job.model), round(seconds, 1), reason=str(error))


def compressed(job: Job, run: Run, table: Path) -> Record:
    """The run of `sluice.compress`, decided in one shot from scores, then fine-tuned as the others are."""
    report = sluice.compress(
        job.model,
        job.example,
        budget=run.budget,
        data=job.data(run.seed),
        methods=PARTS[run.method],
        table=table,
        batch=job.batch,
        target=TARGET,
        threads=THREADS,
        gate_epochs=0,
        epochs=run.epochs,
        lr=LR,
        loss=job.loss,
        evaluate=job.evaluate,
    ).report
    assert report.metric_dense is not None
    return Record(
        run,
        report.fingerprint["device"],
        report.metric_dense,
        round(report.seconds, 1),
        report.metric_slim,
        report.dense_ms,
        report.budget_ms,
        report.measured_ms,
        report.params_slim,
    )


def thin(job: Job, run: Run) -> Record:
    """The uniformly thinner network, from random weights: the dense recipe, then the fine-tuning of the others."""
    started, budget = time.perf_counter(), BudgetSpec.parse(run.budget)
    dense = _engine(job, job.model)

    def ms(model: nn.Module) -> tuple[float, float]:
        return pair_ms(dense, _engine(job, model), job.batch)

    def fits(share: float) -> bool:
        dense_ms, slim_ms = ms(job.thin(share).eval())
        return slim_ms <= ACCEPTED * budget.ms(dense_ms)

    share = widest(job.shares, fits)
    if share is None:
        raise SluiceError(f"budget {run.budget} cannot be met by a network of uniform width; ask for more")
    model = job.scratch(job.thin(share), run.seed)
    fit(model, job.data(run.seed), epochs=run.epochs, teacher=job.model, loss=job.loss, name="fine-tune")
    dense_ms, slim_ms = ms(model)
    return Record(
        run,
        host_device(),
        job.evaluate(job.model),
        round(time.perf_counter() - started, 1),
        job.evaluate(model),
        dense_ms,
        budget.ms(dense_ms),
        slim_ms,
        count_parameters(model),
        detail=f"width {share:g}, {job.dense_epochs} + {run.epochs} epochs",
    )


def widest(shares: Sequence[float], fits: Callable[[float], bool]) -> float | None:
    """The first of the falling ``shares`` that fits; bisection could miss it, since times are a staircase."""
    assert list(shares) == sorted(shares, reverse=True)
    return next((share for share in shares if fits(share)), None)


def pair_ms(dense: onnx.ModelProto, slim: onnx.ModelProto, batch: int) -> tuple[float, float]:
    """Milliseconds of both engines, measured in turns; of some such runs the one with the median ratio."""
    runner, rng, runs = make_runner(TARGET, THREADS), np.random.default_rng(0), []
    for _ in range(TURNS):
        sessions = [runner.build(model, batch=batch) for model in (dense, slim)]
        runs.append(measure(sessions, min_bursts=60, max_bursts=160, target_spread=0.015, rng=rng))
    first, second = sorted(runs, key=lambda pair: pair[1].ms / pair[0].ms)[TURNS // 2]
    return first.ms, second.ms


def _engine(job: Job, model: nn.Module) -> onnx.ModelProto:
    return finalize(to_onnx(model, job.example))
