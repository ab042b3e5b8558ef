"""The built-in training loop, for both stages: learn the gates, then fine-tune what is left.

``loss = task + budget.penalty()`` in the first stage, ``task`` in the second. The task is logit distillation from the
dense network (`sluice.distill`) mixed with the labels where there are some. AdamW, learning rate on half a cosine;
gate logits have a learning rate of their own and no weight decay. Any other loop serves as well: the only calls a
loop owes are ``budget.penalty()`` in the loss and ``gated.step()`` after the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from sluice.budget import Budget
from sluice.distill import logit_distillation
from sluice.errors import SluiceError
from sluice.gates import gate_parameters, other_parameters

__all__ = ["Data", "Loss", "fit"]

# Batches of (inputs, labels) or of inputs alone; iterated once per epoch.
Data = Iterable[Any]
# (model outputs, teacher outputs, labels or None) -> scalar
Loss = Callable[[Any, Any, Any], Tensor]
GATE_LR = 0.05


def default_loss(outputs: Any, taught: Any, labels: Any) -> Tensor:
    """Logit distillation at temperature 4, with a tenth of cross-entropy where there are labels."""
    if not isinstance(outputs, Tensor):
        raise SluiceError(f"the model returns {type(outputs).__name__}, not logits; pass loss=(outputs, taught, labels)")
    return logit_distillation(outputs, taught, labels)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], Any]:
    """(arguments of the model, labels or None) of a batch from a data loader."""
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), labels
    raise SluiceError(f"a batch of data is {type(batch).__name__}; make it inputs, or a pair (inputs, labels)")


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    teacher: nn.Module,
    budget: Budget | None = None,
    loss: Loss = default_loss,
    lr: float = 1e-3,
    gate_lr: float = GATE_LR,
    weight_decay: float = 1e-2,
    progress: bool = True,
    name: str = "train",
) -> nn.Module:
    """Train ``model`` in place.

    Args:
        data: re-iterable batches.
        teacher: the dense network; kept in eval mode, not trained.
        budget: adds its penalty, and steps the gates of ``model``.
    Raises:
        SluiceError: the loss is not finite, or there is no data.
    """
    from tqdm import tqdm

    total = epochs * len(data) if isinstance(data, Sized) else None
    if total == 0:
        raise SluiceError(f"cannot train: {epochs} epochs over no batches; give data with at least one batch")
    groups: list[dict[str, Any]] = [{"params": other_parameters(model), "lr": lr, "weight_decay": weight_decay}]
    if budget is not None:
        groups.append({"params": gate_parameters(model), "lr": gate_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    shape = [cosine, constant][: len(groups)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [f(total) for f in shape])
    teacher.eval()
    model.train()
    with tqdm(total=total, desc=name, unit="step", disable=not progress, leave=False) as bar:
        for _ in range(epochs):
            for batch in data:
                inputs, labels = split_batch(batch)
                with torch.no_grad():
                    taught = teacher(*inputs)
                value = loss(model(*inputs), taught, labels)
                if budget is not None:
                    value = value + budget.penalty()
                number = float(value.detach())
                if not math.isfinite(number):
                    raise SluiceError(f"the loss became {number} at step {bar.n}; lower the learning rate lr={lr:g}")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                if budget is not None:
                    model.step()  # type: ignore[operator]
                bar.update()
                bar.set_postfix(loss=f"{number:.4f}", refresh=False)
    return model.eval()


def cosine(total: int | None) -> Callable[[int], float]:
    """Half a cosine from 1 to 0 over ``total`` steps; 1 throughout where the length is unknown."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))) if total else 1.0


def constant(_: int | None) -> Callable[[int], float]:
    return lambda step: 1.0


