"""Which of several plans trains best: a short training of each, on the same batches, by successive halving.

Losses of single changes (`sluice.importance.sensitivity`) add up only roughly, and a network recovers better from some
kinds of change than from others: a change with a high loss before training may mend in a hundred steps. So plans of
equal milliseconds are cut and trained for a few steps; the better half goes on for twice as many, until one is left.
(LayerMerge chooses between solutions by a short real fine-tuning in the same way; the halving is Jamieson and
Talwalkar's, AISTATS 2016.)

1. All candidates take every step together, so that any loader may give a batch once, and nobody keeps it.
2. The loss that counts is that on the first batches of the data, in eval mode; training passes over these batches when
   the data comes round again. A loader that shuffles deals anew each time round, so there some of their examples are
   trained on.
3. A candidate whose loss is not finite is out.
4. *Forecast*. What a plan keeps of the function shows in its first losses, what it can learn again in their slope. With
   ``a`` and ``b`` the last two losses, after m and n steps in all, candidates are ranked by the power law through both,

       L(N) = b (b / a)^(log(N / n) / log(n / m)),    N = steps of the fine-tune to come

   and after the first round, without a slope, by their loss. Over 24 plans of equal milliseconds, each trained to the
   end, the ratio b / a of two epochs to one ordered final accuracy by a rank correlation of 0.5 and 0.9 on two
   networks, the loss after one epoch by -0.2 and 0.8.
5. *Strata*. The first round is partial to changes that keep the function. So the best candidate of every stratum, for
   which the caller gives a name, goes through it, if its loss is not ``far`` times the least: a light cut by widths
   then has rivals of its own kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.core.progress import stage
from sluice.training.recovery import Recovery
from sluice.training.train import Data, Given, Loss, call, on_device, split_batch

__all__ = [
    "Trainee",
    "batches_behind",
    "forecast",
    "held_out_loss",
    "power_law",
    "rehearsal_cost",
    "rehearse",
    "train_together",
]

HELD = 4  # batches that are not trained on
FAR = 4.0


def rehearse(
    candidates: Sequence[nn.Module],
    data: Data,
    *,
    teacher: nn.Module,
    loss: Loss,
    lr: float,
    recovery: Recovery | None = None,
    steps: int,
    total: int = 0,
    strata: Sequence[object] = (),
    far: float = FAR,
    progress: bool = True,
) -> list[list[float]]:
    """Held-out loss of every candidate after every round it took part in; the modules are trained in place.

    The best is the one with most rounds and, of those, the least `forecast`.

    Args:
        lr: peak rate of every round.
        recovery: its optimizer and its schedule, over each round anew; AdamW if not given.
        steps: of the first round.
        total: of the fine-tune to come (rule 4); 0 ranks by the last losses.
        strata: of the candidates, in order (rule 5); none where they do not count.
        far: times the least loss, beyond which the best of a stratum is out (rule 5).
    """
    recovery = recovery if recovery is not None else Recovery()
    held = list(itertools.islice(data, HELD))
    stream = batches_behind(data, len(held))
    found: list[list[float]] = [[] for _ in candidates]
    alive, first = list(range(len(candidates))), steps
    while len(alive) > 1:
        trainees = [Trainee(candidates[i], loss, recovery, lr, steps) for i in alive]
        train_together(trainees, stream, steps, teacher=teacher, name=f"rehearse {len(alive)}", progress=progress)
        for index in alive:
            found[index].append(held_out_loss(candidates[index], held, teacher, loss))
        order = sorted(alive, key=lambda i: forecast(found[i], first, total))
        kept = order[: (len(alive) + 1) // 2]
        if steps == first and strata:
            leaders = {strata[i]: i for i in reversed(order) if _near(found[i], found[order[0]], far)}
            others = [i for i in order if i not in leaders.values()]
            through = {*leaders.values(), *others[: max(0, len(kept) - len(leaders))]}
            kept = [i for i in order if i in through]
        alive, steps = kept, 2 * steps
    return found


def _near(losses: Sequence[float], least: Sequence[float], far: float) -> bool:
    """Rule 5, by the last losses."""
    return math.isfinite(losses[-1]) and losses[-1] <= far * abs(least[-1])


def forecast(losses: Sequence[float], first: int, total: int) -> float:
    """The loss after ``total`` steps by rule 4, from those after ``first``, 3, 7, 15 ... times ``first`` steps."""
    if len(losses) < 2 or total <= 0:
        return losses[-1]
    before, now = ((2**k - 1) * first for k in (len(losses) - 1, len(losses)))
    return power_law((before, losses[-2]), (now, losses[-1]), total)


def power_law(before: tuple[int, float], now: tuple[int, float], total: int) -> float:
    """The loss after ``total`` steps, from two of ``(steps, loss)``, by rule 4; the last one where it does not fall."""
    (m, a), (n, b) = before, now
    if not 0.0 < b < a:
        return b
    found: float = b * (b / a) ** (math.log(max(1.0, total / n)) / math.log(n / m))
    return found


def rehearsal_cost(candidates: int, strata: int) -> int:
    """Steps of a rehearsal in units of those of a candidate's first round; ``strata`` at most go through it."""
    cost, length, alive = 0, 1, candidates
    while alive > 1:
        cost, alive = cost + length * alive, (alive + 1) // 2
        if length == 1:
            alive = max(alive, min(strata, candidates))
        length *= 2
    return cost


@dataclass(slots=True, eq=False)
class Trainee:
    """A module in training for ``steps`` steps; ``finite`` until a loss of its training is not."""

    module: nn.Module
    loss: Loss
    recovery: Recovery
    lr: float
    steps: int
    optimizer: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    finite: bool = True

    def __post_init__(self) -> None:
        self.optimizer = self.recovery.optimizer_of(list(self.module.train().parameters()), self.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.recovery.factor(self.steps))

    def step(self, inputs: Given, taught: Any, labels: Any) -> None:
        value = self.loss(call(self.module, inputs), taught, labels)
        self.optimizer.zero_grad()
        if not torch.isfinite(value):  # the held-out loss will say so as well, unless it was one batch alone
            self.finite = False
            return
        value.backward()
        self.optimizer.step()
        self.schedule.step()


def train_together(
    trainees: Sequence[Trainee], stream: Iterator[Any], steps: int, *, teacher: nn.Module, name: str, progress: bool
) -> None:
    """``steps`` steps of all, each batch and the teacher's word for it read once."""
    with stage(name, progress) as advance:
        for done, batch in enumerate(itertools.islice(stream, steps), 1):
            inputs, labels = on_device(split_batch(batch), teacher)
            with torch.no_grad():
                taught = call(teacher.eval(), inputs)
            for trainee in trainees:
                trainee.step(inputs, taught, labels)
            advance(done, steps)


def batches_behind(data: Data, held: int) -> Iterator[Any]:
    """The batches behind the first ``held``, for ever; all of them where there are no others."""
    while True:
        some = False
        for batch in itertools.islice(data, held, None):
            some = True
            yield batch
        if not some:
            held = 0


def held_out_loss(module: nn.Module, batches: Sequence[object], teacher: nn.Module, loss: Loss) -> float:
    """Mean loss in eval mode; infinite where it is not finite."""
    values = []
    with torch.no_grad():
        for batch in batches:
            inputs, labels = on_device(split_batch(batch), module)
            values.append(float(loss(call(module.eval(), inputs), call(teacher.eval(), inputs), labels)))
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else math.inf
