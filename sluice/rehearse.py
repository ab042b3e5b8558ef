"""Which of several plans trains best: a short training of each, on the same batches, by successive halving.

Losses of single changes (`sluice.passes.sensitivity`) add up only roughly, and how well a network recovers differs
between kinds of change: what looks dear before training may mend in a hundred steps. So the solver's best plans under
several readings of the losses are cut and trained for `steps` steps; the better half goes on for twice as many, until
one is left. What counts is the loss on batches that none was trained on. (LayerMerge chooses between solutions by a
short real fine-tuning in the same way; the halving is Jamieson and Talwalkar's, AISTATS 2016.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.train import Data, Loss, fit, on_device, split_batch

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
    held, stream = list(itertools.islice(data, HELD)), _behind(data)
    found: list[list[float]] = [[] for _ in candidates]
    alive = list(range(len(candidates)))
    while len(alive) > 1:
        batches = list(itertools.islice(stream, steps))
        for index in alive:
            fit(
                candidates[index], batches, epochs=1, teacher=teacher, loss=loss, lr=lr, progress=progress,
                name=f"rehearse {index + 1} of {len(candidates)}",
            )  # fmt: skip
            found[index].append(held_out_loss(candidates[index], held, teacher, loss))
        alive = sorted(alive, key=lambda i: found[i][-1])[: (len(alive) + 1) // 2]
        steps *= 2
    return found


def _behind(data: Data) -> Iterator[Any]:
    """What follows the held batches, over and over; all of them where nothing does."""
    while True:
        rest = iter(itertools.islice(data, HELD, None))
        first = next(rest, None)
        if first is None:
            yield from data
        else:
            yield first
            yield from rest


def held_out_loss(module: nn.Module, batches: Sequence[object], teacher: nn.Module, loss: Loss) -> float:
    """Mean loss in eval mode."""
    values = []
    with torch.no_grad():
        for batch in batches:
            inputs, labels = on_device(split_batch(batch), module)
            values.append(float(loss(module.eval()(*inputs), teacher.eval()(*inputs), labels)))
    return float(np.mean(values))
