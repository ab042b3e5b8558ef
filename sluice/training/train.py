"""The built-in training loop, for both stages: learn the gates, then fine-tune the slim network.

``loss = task + budget.penalty()`` in the first stage, ``task`` in the second. The task is logit distillation from the
dense network (`sluice.training.distill`) mixed with the labels where there are some. In the second stage optimizer and
schedule are those of `sluice.training.recovery`. In the first they are AdamW and half a cosine; gate logits have a
learning rate of their own and no weight decay. Any other loop serves as well: the only calls that a loop must make are
``budget.penalty()`` in the loss and ``gated.step()`` after the optimizer's step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError
from sluice.core.progress import show_figure, stage
from sluice.passes.gates.filter_gates import gate_parameters, other_parameters
from sluice.training.budget import Budget
from sluice.training.distill import logit_distillation
from sluice.training.epochs import find_epoch, keep_epoch
from sluice.training.recovery import AUTO, WEIGHT_DECAY, Rate, Recovery, cosine
from sluice.training.stages import NOTHING, Stages

__all__ = [
    "LOSSES",
    "Data",
    "Given",
    "Loss",
    "call",
    "count_batches",
    "count_rows",
    "default_loss",
    "fit",
    "in_order",
    "on_device",
    "split_batch",
    "teacher_loss",
]

# Batches of (inputs, labels) or of inputs alone; iterated once per epoch. Inputs are as example inputs: a tensor, a
# tuple of positional or a mapping of keyword arguments.
Data = Iterable[Any]
Given = tuple[Any, ...] | Mapping[str, Any]
# (model outputs, teacher outputs, labels or None) -> scalar
Loss = Callable[[Any, Any, Any], Tensor]
GATE_LR = 0.02
LR = 1e-3  # of everything but the gates, while these are trained, and where nothing else is said


def default_loss(outputs: Any, taught: Any, labels: Any) -> Tensor:
    """Logit distillation at temperature 4, with a tenth of cross-entropy where there are labels."""
    return logit_distillation(_logits(outputs), taught, labels)


def label_loss(outputs: Any, taught: Any, labels: Any) -> Tensor:
    """Cross-entropy with the labels, class indices."""
    return logit_distillation(_logits(outputs), taught, labels, alpha=0.0)


def teacher_loss(outputs: Any, taught: Any, labels: Any) -> Tensor:
    """Logit distillation at temperature 4 alone."""
    return logit_distillation(_logits(outputs), taught)


# The losses of networks that return logits, by their names in reports.
LOSSES: Mapping[str, Loss] = {"default loss": default_loss, "labels": label_loss, "logits": teacher_loss}


def _logits(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise SluiceError(
            f"the model returns {type(outputs).__name__}, not logits; pass loss=(outputs, taught, labels)"
        )
    return outputs


def split_batch(batch: Any) -> tuple[Given, Any]:
    """(arguments of the model, labels or None) of a batch from a data loader."""
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, Mapping):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Mapping):
            return inputs, labels
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), labels
    raise SluiceError(f"a batch of data is {type(batch).__name__}; make it inputs, or a pair (inputs, labels)")


def call(model: nn.Module, inputs: Given) -> Any:
    """The outputs for the inputs of a batch; a mapping is one argument where the model knows no such keywords."""
    args, kwargs = _arguments(model, inputs)
    return model(*args, **kwargs)


def in_order(model: nn.Module, inputs: Given) -> tuple[Any, ...]:
    """The inputs of a batch in the order of the arguments of a captured network."""
    args, kwargs = _arguments(model, inputs)
    return inspect.signature(model.forward).bind(*args, **kwargs).args


def count_rows(inputs: Given) -> int:
    """The examples of a batch: the entries along axis 0 of its first tensor."""
    return next(len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim)


def _arguments(model: nn.Module, inputs: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(inputs, Mapping):
        return inputs, {}
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError:
        return (inputs,), {}
    return (), dict(inputs)


def count_batches(data: Data) -> int:
    """Batches of one pass, which counts them where they have no length; 0 where they can be read only once."""
    if isinstance(data, Sized):
        return len(data)
    return 0 if iter(data) is data else sum(1 for _ in data)


def on_device(values: Any, model: nn.Module) -> Any:
    """Tensors moved to where the model is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    teacher: nn.Module,
    budget: Budget | None = None,
    loss: Loss = default_loss,
    lr: Rate = LR,
    recovery: Recovery | None = None,
    gate_lr: float = GATE_LR,
    progress: bool = True,
    name: str = "train",
    stages: Stages = NOTHING,
) -> nn.Module:
    """Train ``model`` in place.

    Args:
        data: re-iterable batches.
        teacher: the dense network; kept in eval mode, not trained.
        budget: adds its penalty, and steps the gates of ``model``.
        lr: of the weights, for AdamW on half a cosine; ``"auto"`` stands for 1e-3, since nothing is tried here.
        recovery: in place of ``lr``, without a budget: rate, a number, optimizer and schedule.
        stages: without a budget, where every epoch is kept under ``name``, and those that were done are found.
    Raises:
        SluiceError: the loss is not finite, or there is no data.
    """
    total = epochs * len(data) if isinstance(data, Sized) else None
    if total == 0:
        raise SluiceError(f"cannot train: {epochs} epochs over no batches; give data with at least one batch")
    recovery = recovery if recovery is not None else Recovery(lr, warmup=0.0)
    rate = LR if recovery.lr == AUTO else float(recovery.lr)
    if budget is None:
        optimizer = recovery.optimizer_of(other_parameters(model), rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recovery.factor(total))
    else:
        weights = {"params": other_parameters(model), "lr": rate, "weight_decay": WEIGHT_DECAY}
        # A short memory of the second moment: the budget's pull changes within tens of steps.
        gates = {"params": gate_parameters(model), "lr": gate_lr, "weight_decay": 0.0, "betas": (0.9, 0.99)}
        optimizer = torch.optim.AdamW([weights, gates])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [cosine(total), late(total)])
    teacher.eval()
    model.train()
    first, done = find_epoch(stages, name, model, optimizer, schedule) if budget is None else (0, 0)
    with stage(name, progress) as advance:
        for epoch in range(first, epochs):
            before = done
            for batch in data:
                inputs, labels = on_device(split_batch(batch), model)
                with torch.no_grad():
                    taught = call(teacher, inputs)
                value = loss(call(model, inputs), taught, labels)
                if budget is not None:
                    value = value + budget.penalty()
                number = float(value.detach())
                if not math.isfinite(number):
                    raise SluiceError(f"the loss became {number} at step {done}; lower the learning rate lr={rate:g}")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                if budget is not None:
                    model.step()  # type: ignore[operator]
                done += 1
                advance(*((1, 1) if total is None else (done, total)))
                show_figure(advance, f"loss {number:.4f}")
            if done == before:
                raise SluiceError(f"epoch {epoch + 1} had no batches; give data that can be read again, as a list can")
            if budget is None:
                keep_epoch(stages, name, model, optimizer, epochs=epoch + 1, steps=done)
    return model.eval()


def late(total: int | None) -> Callable[[int], float]:
    """1 over the first half, then falling linearly to 0: sharper gates answer the same step with a larger jump."""
    return lambda step: min(1.0, 2.0 * (1.0 - min(1.0, step / total))) if total else 1.0
