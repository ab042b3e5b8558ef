"""Losses by name, and losses of the user's.

A loss is a function of (outputs, teacher's outputs, labels or None), or of (outputs, labels), to a scalar. The ready
ones compare the outputs with the labels, and with the teacher's outputs where there are no labels:

    cross-entropy   of classes on axis 1, as of (N, C, H, W) with labels (N, H, W): -log softmax(outputs)[label];
                    without labels KL(softmax(teacher) || softmax(outputs)), both in the mean over N, H and W
    bce             of logits: -y log p - (1 - y) log(1 - p), p = sigmoid(outputs); y = sigmoid(teacher) without labels
    mse             (outputs - target)^2
    cosine          1 - cos(outputs, target) along the last axis
    logits          distillation along the last axis from the teacher alone (`sluice.training.distill`)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.training.train import Loss, default_loss, teacher_loss

__all__ = ["READY", "loss_of"]

SIGNATURE = "loss(outputs, taught, labels) or loss(outputs, labels), a scalar tensor"


def loss_of(loss: object) -> Loss:
    """The loss that an argument means: a function of three or two arguments, or a name of `READY`.

    Raises:
        SluiceError: it is neither.
    """
    if loss is None:
        return default_loss
    if isinstance(loss, str):
        if loss not in READY:
            raise SluiceError(
                f"there is no loss {loss!r}; choose one of {', '.join(READY)}, or give a function {SIGNATURE}"
            )
        return READY[loss]
    if isinstance(loss, type) or not callable(loss):
        raise SluiceError(f"loss={loss!r} is no function; give {SIGNATURE}")
    if _takes(loss, 3):
        return loss
    if not _takes(loss, 2):
        raise SluiceError(f"loss={loss!r} takes neither two nor three arguments; give {SIGNATURE}")

    def with_labels(outputs: Any, taught: Any, labels: Any) -> Tensor:
        found: Tensor = loss(outputs, taught if labels is None else labels)
        return found

    return with_labels


def cross_entropy(outputs: Any, taught: Any, labels: Any) -> Tensor:
    logits = _tensor(outputs)
    if labels is not None:
        return F.cross_entropy(logits, labels)
    positions = max(1, logits[:, :1].numel())
    soft = F.kl_div(F.log_softmax(logits, 1), F.log_softmax(taught, 1), reduction="sum", log_target=True)
    return soft / positions


def binary_cross_entropy(outputs: Any, taught: Any, labels: Any) -> Tensor:
    logits = _tensor(outputs)
    target = taught.sigmoid() if labels is None else labels
    return F.binary_cross_entropy_with_logits(logits, _as(target, logits).to(logits.dtype))


def mean_squared_error(outputs: Any, taught: Any, labels: Any) -> Tensor:
    found = _tensor(outputs)
    return F.mse_loss(found, _as(taught if labels is None else labels, found).to(found.dtype))


def cosine_distance(outputs: Any, taught: Any, labels: Any) -> Tensor:
    found = _tensor(outputs)
    target = _as(taught if labels is None else labels, found).to(found.dtype)
    return (1.0 - F.cosine_similarity(found, target, dim=-1)).mean()


READY: Mapping[str, Loss] = {
    "cross-entropy": cross_entropy, "bce": binary_cross_entropy, "mse": mean_squared_error, "cosine": cosine_distance,
    "logits": teacher_loss,
}  # fmt: skip


def _tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise SluiceError(f"the model returns {type(outputs).__name__}, no tensor; give a function {SIGNATURE}")
    return outputs


def _as(target: Tensor, outputs: Tensor) -> Tensor:
    """The target in the shape of the outputs; nothing is broadcast, (N,) stands for (N, 1)."""
    if target.shape != outputs.shape and (*target.shape, 1) == tuple(outputs.shape):
        target = target.unsqueeze(-1)
    if target.shape != outputs.shape:
        raise SluiceError(
            f"labels have shape {tuple(target.shape)}, the outputs {tuple(outputs.shape)}; give labels of that shape"
        )
    return target


def _takes(loss: Any, count: int) -> bool:
    called = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        inspect.signature(called).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a function in C, whose signature is not known
        return count == 3
    return True
