"""Rate, loss and parametrisation of the fine-tune, found by short runs on copies of the slim network.

The rate decides more than anything else about the training, and no constant serves light and deep cuts alike. Runs of
a few dozen steps, each with a whole schedule of its own, rank rates, but with a bias downwards: a larger rate spoils at
first what it wins later. So runs grow by successive halving (Jamieson and Talwalkar, AISTATS 2016), and larger rates
have a bonus:

    rung 1      s steps   all rates of the grid
    rung 2     2s steps   the best two rates; the best one with every other loss; dense weights at the rate below it
    rung 3     4s steps   the best rate, and the best other setting

1. ``s`` is such that all runs together take at most `SHARE` of the fine-tune's steps; judging comes on top, `HELD`
   forward passes a run. Rates come first: where ``s`` would be less than `WHOLE`, they alone are tried, in two rungs
   of longer runs. A short fine-tune gives up to `UTMOST` of its steps for runs of `LEAST` steps; where even these are
   too many, nothing is tried, and the rate is the middle one of the grid.
2. Every run starts from the slim network and warms up and comes to rest within its own steps. The runs of a rung take
   the same batches, each of which the teacher sees once.
3. The judge is one measure for all losses: cross-entropy with the labels; without labels the distillation; the user's
   own loss where there is one. It is taken in eval mode on the first batches of the data, over which training passes. A
   loader that shuffles deals anew each time round, so there some of their examples are trained on.
4. A run whose loss is not finite is out. A rate may be behind the one below it by a factor of `BONUS` for every
   doubling from the steps of the run to those of the fine-tune. Dense weights count as plain ones at the rate above.
5. The default setting, logits and labels on plain weights, is left only for one that is better by `HANDICAP`: short
   runs are partial to what learns fast, and distillation is behind after one epoch where it is ahead after ten. All
   margins are shares of the held-out loss or of what training took off it, whichever is less. So a rate that spoils
   what the cut left has no bonus.
6. torch's random numbers are put back afterwards, so that the fine-tune draws what it would have drawn without a trial.
   Reading the data may still move the generators of others.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from sluice.core.errors import SluiceError
from sluice.passes.graph.capture import clone
from sluice.training.recovery import AUTO, Recovery
from sluice.training.rehearse import HELD as FEW
from sluice.training.rehearse import Trainee, batches_behind, held_out_loss, train_together
from sluice.training.train import LOSSES, Data, Loss, count_batches, default_loss, split_batch

__all__ = ["Run", "Setting", "Trial", "lengths", "losses_for", "quick_rate", "try_settings"]

# Of the steps of the fine-tune. What a trial takes is missing there, where total effort is given.
SHARE = 0.15
UTMOST = 1 / 3
LEAST = 10  # fewer steps, one of them warming up, leave the optimizer no time to show what a rate does
WHOLE = 20
HELD = 8  # batches that are judged on, at most a fifth of the data
HANDICAP = 0.1
BONUS = 1.12  # what rates up to 1e-2 won on the one below from one epoch to ten, per doubling: 0.88 to 1.50
FINALISTS = 2
OWN, DEFAULT = "own loss", next(iter(LOSSES))
Widen = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is trained with; ``loss`` is a name of `losses_for`."""

    lr: float
    loss: str
    dense: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A setting, trained for ``steps`` steps, and its held-out loss; infinite if it is out."""

    setting: Setting
    steps: int
    held_out: float


@dataclass(frozen=True, slots=True)
class Trial:
    """The chosen setting, all runs in their order, and held-out losses without training: slim and dense network's.

    ``total`` are the steps of the fine-tune, 0 where the data do not say how many there are.
    """

    chosen: Setting
    total: int
    runs: tuple[Run, ...] = ()
    measure: str = ""
    before: float = math.nan
    dense: float = math.nan

    @property
    def steps(self) -> int:
        """Of all runs together."""
        return sum(run.steps for run in self.runs)


def losses_for(loss: Loss, labelled: bool) -> dict[str, Loss]:
    """The losses that apply, by name: the user's own one alone; else the default one first, which needs no labels."""
    if loss is not default_loss:
        return {OWN: loss}
    return dict(LOSSES) if labelled else {DEFAULT: default_loss}


def lengths(total: int, rates: int, others: int) -> tuple[int, ...]:
    """Steps of a run of every rung, of ``total`` steps of the fine-tune, by rule 1; none where nothing is tried.

    Args:
        others: settings besides the rates.
    """
    most, units = int(SHARE * total), rates + 2 * FINALISTS
    whole = most // (units + 2 * others + 4 * FINALISTS)
    if whole >= WHOLE:
        return whole, 2 * whole, 4 * whole
    short = max(most // units, LEAST)
    return (short, 2 * short) if short * units <= max(most, UTMOST * total) else ()


def try_settings(
    slim: nn.Module,
    data: Data,
    *,
    teacher: nn.Module,
    recovery: Recovery,
    loss: Loss = default_loss,
    epochs: int,
    widen: Widen | None = None,
    progress: bool = True,
) -> Trial:
    """The setting for ``epochs`` of fine-tuning; ``slim`` stays as it is. Nothing is tried where a rate is given.

    Args:
        data: re-iterable batches; one pass counts them where they have no length.
        recovery: gives the rates, the optimizer and the schedule, and the parametrisation unless that is ``"auto"``.
        widen: makes a copy of ``slim`` with dense weights; None where no weight has such a form.
    Raises:
        SluiceError: no run's loss is finite.
    """
    form = recovery.parametrisation == "dense" and widen is not None
    default = Setting(recovery.middle(), OWN if loss is not default_loss else DEFAULT, form)
    with _same_random_numbers(slim):
        batches = count_batches(data) if recovery.lr == AUTO or isinstance(data, Sized) else 0
        total = epochs * batches
        if recovery.lr != AUTO or not total:
            return Trial(default, total)
        held = list(itertools.islice(data, max(1, min(HELD, batches // 5))))
        labelled = split_batch(held[0])[1] is not None
        losses = losses_for(loss, labelled)
        settings = [replace(default, lr=rate) for rate in recovery.rates()]
        both = widen is not None and recovery.parametrisation == AUTO
        steps = lengths(total, len(settings), len(losses) - 1 + both)
        if not steps:
            return Trial(default, total)
        measure = "labels" if loss is default_loss and labelled else default.loss
        stream = batches_behind(data, len(held))
        before, dense = (held_out_loss(m, held, teacher, losses[measure]) for m in (slim, teacher))
        judge = _Judge(slim, widen, losses, losses[measure], held, stream, teacher, recovery, default, before, total)
        runs, found = list[Run](), list[Run]()
        for number, length in enumerate(steps):
            if number == 1:
                others = list(losses)[1:] if len(steps) > 2 else []
                settings = _second(judge.best(found), recovery, others, both and len(steps) > 2)
            elif number == 2:
                settings = judge.finalists(found)
            found = judge.rung(settings, length, progress=progress)
            runs += found
            if not judge.best(found):
                raise SluiceError(
                    f"training at the learning rates {sorted({s.lr for s in settings})} gives no finite loss on the "
                    "first batches of data; check the data and the loss, or give a smaller rate as lr="
                )
        return Trial(judge.best(found)[0], total, tuple(runs), measure, before, dense)


def quick_rate(
    module: nn.Module, data: Data, *, teacher: nn.Module, loss: Loss, recovery: Recovery, steps: int,
    progress: bool = True,
) -> float:  # fmt: skip
    """The rate for runs of ``steps`` steps, of the middle three of the grid, by one run with each.

    No constant would do: after one epoch of a deep cut 1e-2 is right, of a light cut it spoils what 1e-3 leaves.
    """
    if recovery.lr != AUTO:
        return float(recovery.lr)
    with _same_random_numbers(module):
        held = list(itertools.islice(data, FEW))
        default, stream = Setting(recovery.middle(), OWN), batches_behind(data, len(held))
        before = held_out_loss(module, held, teacher, loss)
        judge = _Judge(module, None, {OWN: loss}, loss, held, stream, teacher, recovery, default, before, steps)
        settings = [replace(default, lr=rate) for rate in recovery.rates()[1:-1]]
        return judge.best(judge.rung(settings, steps, progress=progress))[0].lr


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    """Trains copies of ``slim`` and compares them; ``default`` but for its rate is the setting without a handicap.

    ``before`` is the held-out loss without training, ``total`` are the steps of the training to come.
    """

    slim: nn.Module
    widen: Widen | None
    losses: Mapping[str, Loss]
    measure: Loss
    held: Sequence[object]
    stream: Iterator[object]
    teacher: nn.Module
    recovery: Recovery
    default: Setting
    before: float
    total: int

    def rung(self, settings: Sequence[Setting], steps: int, *, progress: bool) -> list[Run]:
        trainees = [
            Trainee(self._copy(s.dense, steps), self.losses[s.loss], self.recovery, s.lr, steps) for s in settings
        ]
        name = f"try {len(settings)}"
        train_together(trainees, self.stream, steps, teacher=self.teacher, name=name, progress=progress)
        figures = [
            held_out_loss(t.module, self.held, self.teacher, self.measure) if t.finite else math.inf for t in trainees
        ]
        return [Run(setting, steps, figure) for setting, figure in zip(settings, figures, strict=True)]

    def best(self, runs: Sequence[Run]) -> list[Setting]:
        """The settings of the runs, the best first; those that are not finite are left out."""
        return [run.setting for run in sorted(filter(_finite, runs), key=self._figure)]

    def finalists(self, rung: Sequence[Run]) -> list[Setting]:
        """The best setting of a rung, and the best one that differs in more than its rate, if there is any."""
        first, *rest = self.best(rung)
        others = [setting for setting in rest if replace(setting, lr=first.lr) != first]
        return [first, *(others or rest)[: FINALISTS - 1]]

    def _figure(self, run: Run) -> float:
        """The held-out loss under rules 4 and 5."""
        rates = self.recovery.rates()
        step = min(rates.index(run.setting.lr) + run.setting.dense, len(rates) - 1)
        lead = step * math.log2(max(1.0, self.total / run.steps))
        handicap = 1.0 if _but_rate(run, self.default) else 1.0 + HANDICAP
        scale = min(abs(run.held_out), max(0.0, self.before - run.held_out))
        return run.held_out + scale * (BONUS**-lead * handicap - 1.0)

    def _copy(self, dense: bool, steps: int) -> nn.Module:
        if dense and self.widen is not None:
            made = self.widen()
        else:
            made = clone(self.slim) if isinstance(self.slim, fx.GraphModule) else copy.deepcopy(self.slim)
        for module in made.modules():  # a short run must forget the statistics of the dense network all the same
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
                module.momentum = max(module.momentum, min(1.0, 3 / steps))
        return made


def _second(best: Sequence[Setting], recovery: Recovery, losses: Sequence[str], both: bool) -> list[Setting]:
    """The settings of rung 2. Dense weights do best at a smaller rate, since three factors move at once."""
    rates, leader = recovery.rates(), best[0]
    found = [*best[:FINALISTS], *(replace(leader, loss=name) for name in losses)]
    below = rates[max(0, rates.index(leader.lr) - 1)]
    return [*found, replace(leader, lr=below, dense=True)] if both else found


def _finite(run: Run) -> bool:
    return math.isfinite(run.held_out)


def _but_rate(run: Run, setting: Setting) -> bool:
    """Whether the run has this setting, at any rate."""
    return replace(run.setting, lr=setting.lr) == setting


def _same_random_numbers(module: nn.Module) -> AbstractContextManager[None]:
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=list(devices))
