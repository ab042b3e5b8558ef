"""One run of `benchmarks.methods`: a job's network at a budget, by one arm.

*Epochs in all*: everything that trains counts. With E in all, `sluice.compress` fine-tunes for

    ours              floor(E / (1 + rehearsal + trial)), by default a rehearsal of 0.25 and a trial of 0.15
    no-portfolio      the same with a rehearsal of 0
    gates             floor(E / (1 + rehearsal + trial + 1/3)), the third for gates that start at a plan
    progressive       the same, the third for stops on the way down
    gates-first       floor(E / 3) epochs of gates, and of the others as ours
    ours-old-defaults E, at a rate of 1e-3, without rehearsal and trial

and the others train for E, anew for every rate, loss and variant that they try (`benchmarks.methods_climb`). A further
seed of theirs begins at what the first one ended with. Files of ours are those that `compress` returns, the others' and
the dense one are what torch exports.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sluice
from benchmarks.methods_climb import Setting, climb
from benchmarks.methods_jobs import Job, Silent
from benchmarks.methods_latency import TARGET, THREADS, Shares, our_file, plain_export
from benchmarks.methods_pruning import VARIANTS, prune, search
from benchmarks.methods_results import Record, Run
from benchmarks.methods_tried import Tried
from sluice.core.errors import SluiceError
from sluice.pipeline.choose import GATES
from sluice.pipeline.figures import count_parameters
from sluice.pipeline.recipe import REHEARSAL
from sluice.pipeline.verify import ACCEPTED
from sluice.runtime.base.host import host_device
from sluice.training.recovery import RATES, Recovery
from sluice.training.train import fit
from sluice.training.trial import SHARE

__all__ = ["arguments", "perform", "widest"]

OLD_RATE = 1e-3


def perform(job: Job, run: Run, folder: Path, shares: Shares, first: Record | None = None) -> Record:
    """The record of the run; a budget out of reach is a result, every other error is raised.

    Args:
        first: of the same arm with the first seed.
    """
    torch.manual_seed(run.seed)
    started = time.perf_counter()
    peers: Mapping[str, Callable[..., Record]] = {"torch-pruning": _pruned, "thin": _thin}
    try:
        if run.arm in peers:
            found = peers[run.arm](job, run, shares, first)
        else:
            found = _compressed(job, run, folder / f"{job.name}.db", shares)
    except SluiceError as error:
        if "cannot be met" not in str(error) and "no engine within" not in str(error):
            raise
        found = Record(run, host_device(), job.evaluate(job.model), 0.0, reason=str(error))
    return replace(found, seconds=round(time.perf_counter() - started, 1))


def arguments(arm: str, epochs: int) -> dict[str, Any]:
    """Of `sluice.compress`, so that all training together takes no more than ``epochs``."""
    if arm == "ours-old-defaults":
        return {"epochs": epochs, "rehearsal": 0.0, "lr": OLD_RATE}
    first, rehearsal = (epochs // 3 if arm == "gates-first" else 0), (0.0 if arm == "no-portfolio" else REHEARSAL)
    parts = 1 + rehearsal + SHARE + (GATES if arm in ("gates", "progressive") else 0.0)
    return {
        "gate_epochs": first, "epochs": math.floor((epochs - first) / parts + 1e-9),
        "rehearsal": rehearsal, "gates": arm == "gates", "progressive": arm == "progressive",
    }  # fmt: skip


def _compressed(job: Job, run: Run, table: Path, shares: Shares) -> Record:
    # Our budgets are shares of our own dense file.
    own = run.share / shares.of_ours(our_file(job.model, job.example))
    done = sluice.compress(
        job.model, job.example, budget=f"{100 * own:.3f}%", data=job.data(run.seed), table=table, batch=job.batch,
        target=TARGET, threads=THREADS, loss=job.loss, evaluate=job.evaluate, progress=False,
        **arguments(run.arm, run.epochs),
    )  # fmt: skip
    report = done.report
    dense_ms, ms = shares.measured(done.deployed)
    told = report.recovery
    how = "" if told is None else f"{told.lr:g} {told.loss} {told.parametrisation}"
    assert report.metric_dense is not None
    return Record(
        run, report.fingerprint["device"], report.metric_dense, 0.0, report.metric_slim, dense_ms, ms,
        report.params_slim, detail=how,
        log={
            "share of our dense file": report.measured_ms and report.measured_ms / report.dense_ms,
            "promised": report.promised_ms / report.dense_ms,
            "rehearsed": [[name, round(at, 5), list(losses)] for name, at, losses in report.readings],
            "trial": [] if told is None else [[*_row(row)] for row in told.trials],
            "before": told and told.before, "dense": told and told.dense,
            "edits": {row.name: row.sites for row in report.methods},
        },
    )  # fmt: skip


def _row(row: Any) -> tuple[Any, ...]:
    return row.lr, row.loss, row.parametrisation, row.steps, row.held_out


def _pruned(job: Job, run: Run, shares: Shares, first: Record | None) -> Record:
    ratios: dict[str, float] = {}
    least = math.inf
    for variant in VARIANTS if first is None else [first.log["best"][0]]:
        ratio, seen = search(lambda r, v=variant: shares.about(prune(job, v, r)), run.share)  # type: ignore[misc]
        least = min(least, seen)
        if ratio is not None:
            ratios[variant] = ratio
    if not ratios:
        raise SluiceError(f"budget {run.budget} cannot be met by Torch-Pruning; its least share is {least:.1%}")
    made = {variant: prune(job, variant, ratio) for variant, ratio in ratios.items()}
    return _tuned(job, run, shares, first, lambda v: copy.deepcopy(made[v]), list(made), {"ratios": ratios})


def _thin(job: Job, run: Run, shares: Shares, first: Record | None) -> Record:
    """The widest network of uniform width that meets the budget, trained from random weights."""
    share = widest(job.shares, lambda s: shares.about(job.thin(s), "thin ") <= ACCEPTED * run.share)
    if share is None:
        raise SluiceError(f"budget {run.budget} cannot be met by a network of uniform width; ask for more")

    def make(variant: str) -> nn.Module:
        torch.manual_seed(run.seed)
        return job.thin(share)

    return _tuned(job, run, shares, first, make, [f"width {share:g}"], {})


def _tuned(
    job: Job, run: Run, shares: Shares, first: Record | None, make: Callable[[str], nn.Module], variants: list[str],
    log: dict[str, Any],
) -> Record:  # fmt: skip
    """The best of all that the climb trains; what was trained before a kill is not trained again."""
    tried = Tried(shares.path.parent / "tried" / f"{run.name}.json")

    def train(setting: Setting) -> float:
        def fitted(model: nn.Module) -> float:
            torch.manual_seed(run.seed)
            teacher = Silent() if setting.loss == "labels" else job.model
            try:
                fit(
                    model, job.data(run.seed), epochs=run.epochs, teacher=teacher, loss=job.losses[setting.loss],
                    recovery=Recovery(setting.rate), progress=False,
                )  # fmt: skip
            except SluiceError as error:
                if "the loss became" not in str(error):
                    raise
                return 0.0
            return job.evaluate(model)

        torch.manual_seed(run.seed)
        return tried.figure(setting, make(setting.variant), fitted)

    if first is None:
        found = climb(variants, RATES["adamw"], list(job.losses), train)
    else:
        _, rate, loss = first.log["best"]
        found = climb(variants, RATES["adamw"], [loss], train, start=rate)
    setting = max(found, key=lambda one: found[one])
    accuracy, model = found[setting], tried.best(setting, make(setting.variant)).eval()
    dense_ms, ms = shares.measured(plain_export(model, job.example))
    return Record(
        run, host_device(), job.evaluate(job.model), 0.0, accuracy, dense_ms, ms, count_parameters(model),
        detail=f"{setting.variant}, {setting.rate:g} {setting.loss}, best of {len(found)}",
        log={
            **log, "best": [setting.variant, setting.rate, setting.loss],
            "tried": [[one.variant, one.rate, one.loss, figure] for one, figure in found.items()],
        },
    )  # fmt: skip


def widest(shares: Sequence[float], fits: Callable[[float], bool]) -> float | None:
    """The first of the falling ``shares`` that fits; bisection could miss it, since times are a staircase."""
    assert list(shares) == sorted(shares, reverse=True)
    return next((share for share in shares if fits(share)), None)
