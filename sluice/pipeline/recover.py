"""Recovery: the slim network is refitted or trained after the cut, at the rate that is given or that a trial finds.

The network is trained in the form in which it is cut, runs unmerged. Dense weights (`sluice.training.trial`, rung 2)
are merged at the end, so what comes out has the parameters of the plan in any case.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

from torch import fx, nn

from sluice.artifacts.report_recovery import RecoveryRow, TrialRow
from sluice.core.plan import Plan
from sluice.pipeline.kept_stages import trial_once
from sluice.pipeline.recipe import Recipe
from sluice.training.compensate import compensate
from sluice.training.dense_parametrisation import merge_dense, narrowed, widened
from sluice.training.rehearse import HELD, held_out_loss
from sluice.training.train import fit
from sluice.training.trial import Setting, Trial, losses_for, try_settings

__all__ = ["recover"]


def recover(
    slim: fx.GraphModule, plan: Plan, recipe: Recipe, *, dense: fx.GraphModule, teacher: nn.Module,
    foreseen: float | None = None,
) -> RecoveryRow | None:  # fmt: skip
    """Refit and train ``slim`` in place as the recipe says; None where there is no data, or nothing to do.

    Args:
        dense: the network that was cut by ``plan``, with the weights it was cut with.
        teacher: gives the logits.
        foreseen: the loss that a rehearsal forecast; what it is in the end is told beside it.
    Raises:
        SluiceError: the loss is not finite.
    """
    data, recovery = recipe.data, recipe.recovery
    if data is None:
        return None
    wanted = recovery.compensate if recovery.compensate is not None else not recipe.epochs
    refitted = compensate(slim, dense, plan, data) if wanted else 0
    if not recipe.epochs:
        return RecoveryRow(0.0, "", "plain", 0, refitted=refitted) if refitted else None
    widen = partial(widened, slim, dense, plan) if narrowed(slim, dense) else None
    trial = trial_once(
        recipe.stages,
        lambda: try_settings(
            slim, data, teacher=teacher, recovery=recovery, loss=recipe.loss, epochs=recipe.epochs, widen=widen,
            progress=recipe.progress,
        ),
    )  # fmt: skip
    chosen = trial.chosen
    wide = widen() if widen is not None and chosen.dense else slim
    fit(
        wide, data, epochs=recipe.epochs, teacher=teacher, loss=losses_for(recipe.loss, labelled=True)[chosen.loss],
        recovery=replace(recovery, lr=chosen.lr), progress=recipe.progress, name="fine-tune",
        stages=recipe.stages,
    )  # fmt: skip
    if wide is not slim:
        merge_dense(wide, slim)
    ended = None
    if foreseen is not None:
        held = list(itertools.islice(data, HELD))
        ended = _finite(held_out_loss(slim, held, teacher, recipe.loss))
    return replace(_row(trial), refitted=refitted, foreseen=foreseen, ended=ended)


def _row(trial: Trial) -> RecoveryRow:
    runs = tuple(TrialRow(*_words(run.setting), run.steps, _finite(run.held_out)) for run in trial.runs)
    before, dense = (_finite(value) for value in (trial.before, trial.dense))
    return RecoveryRow(*_words(trial.chosen), trial.total, runs, trial.measure, before, dense)


def _words(setting: Setting) -> tuple[float, str, str]:
    return setting.lr, setting.loss, "dense" if setting.dense else "plain"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
