"""Which of several plans trains best: a short training of each, on the same batches, by successive halving.

Losses of single changes (`sluice.importance.sensitivity`) add up only roughly, and a network recovers better from some
kinds of change than from others: a change with a high loss before training may mend in a hundred steps. So the solver's
plans of several scenarios are cut and trained for `steps` steps; the better half goes on for twice as many, until one
is left. (LayerMerge chooses between solutions by a short real fine-tuning in the same way; the halving is Jamieson and
Talwalkar's, AISTATS 2016.)

1. All candidates take every step together, so that any loader may give a batch once, and nobody keeps it.
2. The loss that counts is that on the first batches of the data, in eval mode; training passes over these batches when
   the data comes round again. A loader that shuffles deals anew each time round, so there some of their examples are
   trained on.
3. A candidate whose loss is not finite is out.
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

from sluice.training.recovery import Recovery
from sluice.training.train import Data, Loss, on_device, split_batch

__all__ = ["Trainee", "batches_behind", "held_out_loss", "rehearse", "train_together"]

HELD = 4  # batches that are not trained on


def rehearse(
    candidates: Sequence[nn.Module],
    data: Data,
    *,
    teacher: nn.Module,
    loss: Loss,
    lr: float,
    recovery: Recovery | None = None,
    steps: int,
    progress: bool = True,
) -> list[list[float]]:
    """Held-out loss of every candidate after every round it took part in; the modules are trained in place.

    The best is the one with most rounds and, of those, the least last loss.

    Args:
        lr: peak rate of every round.
        recovery: its optimizer and its schedule, over each round anew; AdamW if not given.
        steps: of the first round.
    """
    recovery = recovery if recovery is not None else Recovery()
    held = list(itertools.islice(data, HELD))
    stream = batches_behind(data, len(held))
    found: list[list[float]] = [[] for _ in candidates]
    alive = list(range(len(candidates)))
    while len(alive) > 1:
        trainees = [Trainee(candidates[i], loss, recovery, lr, steps) for i in alive]
        train_together(trainees, stream, steps, teacher=teacher, name=f"rehearse {len(alive)}", progress=progress)
        for index in alive:
            found[index].append(held_out_loss(candidates[index], held, teacher, loss))
        alive = sorted(alive, key=lambda i: found[i][-1])[: (len(alive) + 1) // 2]
        steps *= 2
    return found


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

    def step(self, inputs: tuple[Any, ...], taught: Any, labels: Any) -> None:
        value = self.loss(self.module(*inputs), taught, labels)
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
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, unit="step", disable=not progress, leave=False) as bar:
        for batch in itertools.islice(stream, steps):
            inputs, labels = on_device(split_batch(batch), teacher)
            with torch.no_grad():
                taught = teacher.eval()(*inputs)
            for trainee in trainees:
                trainee.step(inputs, taught, labels)
            bar.update()


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
            values.append(float(loss(module.eval()(*inputs), teacher.eval()(*inputs), labels)))
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else math.inf
