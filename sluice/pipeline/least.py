"""The least latency at which a figure of merit drops by no more than is allowed.

One table and one set of prices serve all budgets, which are shares of the dense latency at equal ratios. With ``l`` the
least share that plans reach (over `sluice.pipeline.verify.AIM`, so that there is an engine for it),

    b(k) = l^(k / K),    k = 0 (the dense network) ... K = 2^SHORT - 1

1. *Short trainings* find the last ``k`` whose network is expected to keep the figure, by bisection: `SHORT` networks,
   whatever they show. Each is planned by the prices, verified on its engine, and trained for a tenth of the steps of
   the fine-tune and then for two tenths, both with a whole schedule. The figure is evaluated after both. What it is
   below the dense one is read at the end of the fine-tune by a power law (`sluice.training.rehearse`, rule 4).
2. *Fine-tunes*, `FULL` at the most, go the whole way, rehearsal included, the first at the ``k`` of rule 1. What its
   network loses beyond the forecast is added to all forecasts, between which the drop is linear in ``k``. If it keeps
   the figure, the next one is at the last ``k`` before which all are then expected to keep it, if not, at the nearest
   larger budget that is expected to, at ``k = 1`` where none is. Between what was kept and what was missed, that is: so
   a figure that rises and falls with the budget costs no more.
3. A budget without an engine, a training that fails and a figure that is no number have missed.
4. The fastest network that was fine-tuned and keeps the figure is the result; if none does, the one that loses least,
   and the report says so.

With ``E`` epochs of fine-tuning, short trainings take at most ``SHORT * 3/10 E``, and trials of their rates at most a
third as much again, 2 E in all. A fine-tune takes E, its trial mostly 0.15 E and its rehearsal the share that the user
gives, with the usual 0.25 therefore 2.8 E for two.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from torch import fx

from sluice.artifacts.report_least import CurveRow, LeastRow
from sluice.artifacts.result import Compressed
from sluice.core.budget_spec import AllowedDrop, Bound, BudgetSpec
from sluice.core.errors import SluiceError
from sluice.core.progress import stage
from sluice.pipeline.plain import counted_from
from sluice.pipeline.prepare import Prepared, trainable
from sluice.pipeline.recipe import Recipe
from sluice.pipeline.recover import recover
from sluice.pipeline.verify import AIM, first_verified
from sluice.training.rehearse import forecast
from sluice.training.stages import NOTHING
from sluice.training.train import Data, count_batches

__all__ = ["check_least", "find_least", "search", "shares"]

SHORT = 5
FULL = 2
PART = 10  # of the steps of the fine-tune, the first part of a short training; the second is twice as long

Made = TypeVar("Made")


def check_least(asked: AllowedDrop, recipe: Recipe) -> None:
    """Raises `SluiceError` where the recipe lacks a figure of merit, or trains gates, which serve one budget."""
    if recipe.evaluate is None:
        raise SluiceError(
            f"a drop of {asked.amount:g} is allowed, but of no figure; give evaluate= (--evaluate), a function from a "
            "module to a number that is higher the better"
        )
    if recipe.gate_epochs:
        raise SluiceError(
            f"gate_epochs={recipe.gate_epochs} trains gates for one budget, and the least latency is sought among "
            "several; leave it at 0"
        )


def find_least(
    ready: Prepared, asked: AllowedDrop, recipe: Recipe, finish: Callable[..., Compressed],
    *, out: str | os.PathLike[str] | None,
) -> Compressed:  # fmt: skip
    """The network of rule 4; its report holds the curve.

    Args:
        finish: carries out a budget, ``(budget, out=folder or None)``.
    Raises:
        SluiceError: no plan is faster than the dense network, its figure is no number, or no fine-tune came to an end.
    """
    assert recipe.evaluate is not None
    dense_ms = ready.measured.latency.dense_ms()
    least = ready.problem.least_from(0.0) / dense_ms / AIM
    if least >= 1.0:
        raise SluiceError(
            f"no plan is faster than the dense network ({dense_ms:.4g} ms) by more than {1 - AIM:.1%}, so there is no "
            f"latency to seek; allow more methods= than {list(ready.methods)}, or exclude fewer layers"
        )
    dense = float(recipe.evaluate(ready.teacher)) if ready.metric is None else ready.metric
    if not math.isfinite(dense):
        raise SluiceError(f"evaluate gives {dense} for the dense network; let it return a number, higher the better")
    captured = ready.captured()
    file = ready.dense_onnx(captured)

    def try_briefly(share: float) -> CurveRow:
        return _short(ready, share, dense, recipe, captured, file)

    def train(share: float) -> tuple[Compressed | None, CurveRow]:
        try:
            done = finish(_budget(share), out=out)
        except SluiceError as error:
            return None, CurveRow(share, full=True, reason=str(error))
        report = done.report
        measured = None if report.measured_ms is None else report.measured_ms / report.dense_ms
        metric = report.metric_slim if report.fingerprint["precision"] == "fp32" else report.metric_deployed
        promised = report.promised_ms / report.dense_ms
        return done, CurveRow(share, promised, measured, metric, epochs=recipe.epochs, full=True)

    done, curve = search(LeastRow(asked.amount, dense), shares(least), try_briefly, train)
    if done is None:
        raise SluiceError(curve.tried[-1].reason)
    done = replace(done, report=replace(done.report, least=curve))
    if out is not None:
        done.save(out)
    return done


def shares(least: float) -> tuple[float, ...]:
    """``b`` for every ``k``."""
    count = 2**SHORT - 1
    return tuple(least ** (k / count) for k in range(count + 1))


def search(
    curve: LeastRow,
    budgets: Sequence[float],
    try_briefly: Callable[[float], CurveRow],
    train: Callable[[float], tuple[Made | None, CurveRow]],
) -> tuple[Made | None, LeastRow]:
    """What was settled on, None if no fine-tune came to an end, and the curve with all that was tried.

    Args:
        budgets: falling, the first that of the dense network.
        try_briefly: rule 1 for one budget.
        train: what a fine-tune at a budget made, and its row.
    """
    tried: list[CurveRow] = []
    expected = {0: 0.0}
    kept, missed = 0, len(budgets)
    while missed - kept > 1:
        middle = (kept + missed) // 2
        tried.append(try_briefly(budgets[middle]))
        expected[middle] = curve.lost(tried[-1].forecast)
        kept, missed = (middle, missed) if curve.keeps(tried[-1].forecast) else (kept, middle)
    made: dict[CurveRow, Made] = {}
    at: int | None = max(1, kept)
    kept, missed = 0, len(budgets)
    for _ in range(FULL):
        if at is None:
            break
        found, row = train(budgets[at])
        tried.append(row)
        if found is not None:
            made[row] = found
        kept, missed = (at, missed) if curve.keeps(row.metric) else (kept, at)
        at = _next(curve, expected, row.metric, at, kept, missed)
    curve = replace(curve, tried=tuple(tried))
    settled = curve.settled()
    return None if settled is None else made[settled], curve


def _next(
    curve: LeastRow, expected: dict[int, float], metric: float | None, at: int, kept: int, missed: int
) -> int | None:
    """Where the next fine-tune is, after one at ``at`` that gave ``metric`` (rule 2); None where none is worth it."""
    known = sorted(k for k, drop in expected.items() if math.isfinite(drop))
    drops, lost = [expected[k] for k in known], curve.lost(metric)
    beyond = lost - float(np.interp(at, known, drops)) if math.isfinite(lost) else 0.0

    def likely(k: int) -> bool:
        return k <= known[-1] and curve.keeps(curve.dense - float(np.interp(k, known, drops)) - beyond)

    if at == kept:
        return max(itertools.takewhile(likely, range(at + 1, missed)), default=None)
    between = range(at - 1, kept, -1)
    return next(filter(likely, between), between[-1] if between else None)


def _short(
    ready: Prepared, share: float, dense: float, recipe: Recipe, captured: fx.GraphModule, file: onnx.ModelProto
) -> CurveRow:
    """Rule 1 for one budget; rule 3 where it fails."""
    recipe = replace(recipe, stages=NOTHING)
    assert recipe.evaluate is not None and recipe.data is not None
    total, each = recipe.steps(), count_batches(recipe.data)
    first = max(1, total // PART) if total else 0
    parts = (first, 2 * first) if first and 3 * first <= total else (first,)
    found: list[float] = []
    try:
        with stage(f"try {share:.1%} of the dense latency", recipe.progress) as advance:
            asked = counted_from(ready.plain, _budget(share))
            verified = first_verified([ready.problem], asked, file, advance)
        slim = trainable(captured, verified.plan)
        for number, steps in enumerate(parts):
            part = replace(recipe, data=_Steps(recipe.data, steps), epochs=1) if steps else recipe
            if number:  # what was trained is not refitted
                part = replace(part, recovery=replace(recipe.recovery, compensate=False))
            recover(slim, verified.plan, part, dense=captured, teacher=ready.teacher)
            found.append(float(recipe.evaluate(slim.eval())))
    except SluiceError as error:
        return CurveRow(share, reason=str(error))
    times, numbers = verified.times, all(map(math.isfinite, found))
    ahead = dense - forecast([dense - metric for metric in found], first, total) if numbers else None
    return CurveRow(
        share, verified.choice.promised_ms / ready.measured.latency.dense_ms(), times.slim_ms / times.dense_ms,
        found[-1] if numbers else None, ahead, sum(parts) / each,
    )  # fmt: skip


def _budget(share: float) -> BudgetSpec:
    return BudgetSpec((("latency_ms", Bound(100 * share, "%")),))


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """``count`` batches of data in one pass, which goes through the data as often as that takes."""

    data: Data
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(itertools.chain.from_iterable(itertools.repeat(self.data)), self.count)
