"""Gates and weights in training for a number of steps, on the batches that a rehearsal trains on.

    loss = task + budget.penalty()

The weights have optimizer, schedule and rate of the recovery (`sluice.training.recovery`). Gates have AdamW without
decay at a rate of `TRAVEL` over the steps, so that a logit can cross the decision within any number of them; it falls
to zero over the second half, in which the gates sharpen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sluice.core.progress import stage
from sluice.passes.gates.filter_gates import gate_parameters, other_parameters
from sluice.passes.gates.gating import Gated
from sluice.training.budget import Budget
from sluice.training.recovery import Recovery
from sluice.training.train import Loss, call, late, on_device, split_batch

__all__ = ["learn_gates"]

TRAVEL = 24.0  # the sum of the rates of all steps, before they fall
FASTEST = 0.1


def learn_gates(
    gated: Gated,
    budget: Budget,
    stream: Iterator[Any],
    steps: int,
    *,
    teacher: nn.Module,
    loss: Loss,
    recovery: Recovery,
    lr: float,
    progress: bool = True,
) -> bool:
    """Train for ``steps`` steps, in place; False as soon as a loss is not finite."""
    weights = recovery.optimizer_of(other_parameters(gated), lr)
    # A short memory of the second moment: the budget's pull changes within tens of steps.
    rate = min(FASTEST, TRAVEL / steps)
    gates = torch.optim.AdamW(gate_parameters(gated), lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(weights, recovery.factor(steps)),
        torch.optim.lr_scheduler.LambdaLR(gates, late(steps)),
    ]
    gated.train()
    with stage("gates", progress) as advance:
        for done, batch in enumerate(itertools.islice(stream, steps), 1):
            inputs, labels = on_device(split_batch(batch), gated)
            with torch.no_grad():
                taught = call(teacher.eval(), inputs)
            value = loss(call(gated, inputs), taught, labels) + budget.penalty()
            if not math.isfinite(float(value.detach())):
                return False
            for optimizer in (weights, gates):
                optimizer.zero_grad()
            value.backward()
            for optimizer, schedule in zip((weights, gates), schedules, strict=True):
                optimizer.step()
                schedule.step()
            gated.step()
            advance(done, steps)
    gated.eval()
    return True
