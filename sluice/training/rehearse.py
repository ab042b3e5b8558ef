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
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.training.train import WEIGHT_DECAY, Data, Loss, cosine, on_device, split_batch

__all__ = ["held_out_loss", "rehearse"]

HELD = 4  # batches that are not trained on


def rehearse(
    candidates: Sequence[nn.Module],
    data: Data,
    *,
    teacher: nn.Module,
    loss: Loss,
    lr: float,
    steps: int,
    progress: bool = True,
) -> list[list[float]]:
    """Held-out loss of every candidate after every round it took part in; the modules are trained in place.

    The best is the one with most rounds and, of those, the least last loss.
    """
    held = list(itertools.islice(data, HELD))
    stream = _behind(data, len(held))
    found: list[list[float]] = [[] for _ in candidates]
    alive = list(range(len(candidates)))
    while len(alive) > 1:
        _train([candidates[i] for i in alive], stream, steps, teacher=teacher, loss=loss, lr=lr, progress=progress)
        for index in alive:
            found[index].append(held_out_loss(candidates[index], held, teacher, loss))
        alive = sorted(alive, key=lambda i: found[i][-1])[: (len(alive) + 1) // 2]
        steps *= 2
    return found


def _train(
    modules: Sequence[nn.Module], stream: Iterator[Any], steps: int, *, teacher: nn.Module, loss: Loss, lr: float,
    progress: bool,
) -> None:  # fmt: skip
    """``steps`` steps of AdamW on half a cosine for all modules, each batch and the teacher's word for it read once."""
    from tqdm import tqdm

    optimizers = [torch.optim.AdamW(m.train().parameters(), lr=lr, weight_decay=WEIGHT_DECAY) for m in modules]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps)) for optimizer in optimizers]
    with tqdm(total=steps, desc=f"rehearse {len(modules)}", unit="step", disable=not progress, leave=False) as bar:
        for batch in itertools.islice(stream, steps):
            inputs, labels = on_device(split_batch(batch), teacher)
            with torch.no_grad():
                taught = teacher.eval()(*inputs)
            for module, optimizer, schedule in zip(modules, optimizers, schedules, strict=True):
                value = loss(module(*inputs), taught, labels)
                optimizer.zero_grad()
                if torch.isfinite(value):  # else the held-out loss will say so
                    value.backward()
                    optimizer.step()
                    schedule.step()
            bar.update()


def _behind(data: Data, held: int) -> Iterator[Any]:
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
