"""The user's batches, checked: the first one before anything is measured, later ones as they come.

1. Before: the model runs on the first batch, and the loss is a finite scalar with a gradient, the teacher being the
   model with every output moved by a tenth of the way to its neighbour (an untouched copy learns nothing from itself;
   noise would leave the range of probabilities, or their sum).
2. The default loss is of class logits: ``(N, classes)`` with two classes or more, or ``(..., classes)`` with labels
   ``(...)``, integers below the number of classes. Of other outputs without labels it would take a softmax over an axis
   that need not hold classes, so these are refused.
3. Later: a loader that raises, and a batch with shapes or types not seen before that does not run, end in one sentence
   that names the batch, counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError, first_line
from sluice.passes.graph.preflight_torch import copied
from sluice.training.train import Data, Loss, call, default_loss, on_device, split_batch

__all__ = ["check_data", "checked"]

DISTURBED = 0.1
IGNORED = -100  # the label that cross-entropy leaves out
ADVICE = "give batches (inputs, labels) as they need"


def check_data(model: nn.Module, data: Data, *, loss: Loss | None = None) -> None:
    """Rules 1 and 2, on a copy of ``model``, so that a misfit is said before hours of work.

    Args:
        loss: None if nothing is trained.
    Raises:
        SluiceError: there is no batch, it can be read only once, the model or the loss refuses it, or there is nothing
            to train.
    """
    if loss is not None and not any(p.requires_grad for p in model.parameters()):
        raise SluiceError("no parameter of the model requires a gradient, so it cannot be trained; unfreeze some")
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise SluiceError(f"data is a {type(data).__name__}; give batches, a list or a DataLoader of (inputs, labels)")
    if iter(data) is data:
        raise SluiceError(f"data is a {type(data).__name__}, which can be read only once; give a list or a DataLoader")
    first = next(iter(_told(data)), None)
    if first is None:
        raise SluiceError("data has no batches; give at least one")
    _try(copied(model), first, "the first batch of data", loss)


def checked(model: nn.Module, data: Data, loss: Loss | None) -> Data:
    """The same batches, whose faults are told as rule 3 says."""
    return _SizedBatches(model, data, loss) if isinstance(data, Sized) else _Batches(model, data, loss)


class _Batches:
    def __init__(self, model: nn.Module, data: Data, loss: Loss | None) -> None:
        self._model, self._data, self._loss = model, data, loss
        self._seen: set[str] = set()
        self._classes = 0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(_told(self._data)):
            where = f"batch {number} of data"
            form = pytree.tree_map(_form, split_batch(batch))
            key = repr(form)
            if key not in self._seen:
                outputs = _try(copied(self._model), batch, where, self._loss, gradient=False)
                self._classes = outputs.shape[-1] if self._loss is default_loss else 0
                self._seen.add(key)
            elif self._classes:
                _check_classes(split_batch(batch)[1], self._classes, where)
            yield batch


class _SizedBatches(_Batches):
    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]


def _told(data: Data) -> Iterator[Any]:
    """The batches; what the loader raises is told with the number of the batch."""
    batches, number = None, 0
    while True:
        try:
            batches = iter(data) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        except SluiceError:
            raise
        except Exception as error:
            raise SluiceError(
                f"data raised {type(error).__name__} at batch {number}: {first_line(error)}; mend the loader"
            ) from error
        yield batch
        number += 1


def _form(value: Any) -> Any:
    """Sizes but for that of the batch, and type."""
    return (tuple(value.shape[1:]), str(value.dtype)) if isinstance(value, Tensor) else type(value).__name__


def _try(model: nn.Module, batch: Any, where: str, loss: Loss | None, gradient: bool = True) -> Any:
    """Rules 1 and 2 for one batch; ``model`` is a copy. Its outputs."""
    inputs, known = split_batch(batch)
    step = "model does not run"
    try:
        with torch.set_grad_enabled(gradient and loss is not None), torch.backends.cudnn.flags(enabled=False):
            outputs = call(model, on_device(inputs, model))
            if loss is None:
                return outputs
            step = "loss cannot be taken"
            labels = on_device(known, model)
            if loss is default_loss:
                _check_logits(outputs, labels, where)
            value = loss(outputs, pytree.tree_map_only(Tensor, _disturbed, outputs), labels)
            _check_scalar(value, where)
            if gradient:
                step = "loss has no gradient"
                _check_gradient(model, value)
        return outputs
    except SluiceError:
        raise
    except Exception as error:
        named = inputs.items() if isinstance(inputs, Mapping) else (("", x) for x in inputs)
        shapes = ", ".join(
            f"{name} {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}".strip() for name, x in named
        )
        raise SluiceError(f"the {step} on {where} {shapes}: {first_line(error)}; {ADVICE}") from error


def _disturbed(outputs: Tensor) -> Tensor:
    """A mean of two permutations of the outputs, along the last axis that has two values or more: in every range that
    they are in, and with their sums. Outputs that are all alike get noise."""
    outputs = outputs.detach()
    if not outputs.is_floating_point():
        return outputs
    axis = next((k for k in range(outputs.ndim - 1, -1, -1) if outputs.shape[k] > 1), None)
    if axis is not None:
        moved = outputs + DISTURBED * (outputs.roll(1, axis) - outputs)
        if not moved.equal(outputs):
            return moved
    return outputs + DISTURBED * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)


def _check_logits(outputs: Any, labels: Any, where: str) -> None:
    """Rule 2."""
    how = (
        "give a loss for these outputs, loss= (--loss): cross-entropy (of (N, C, H, W)), bce, mse, cosine, logits (the "
        "last axis holds classes), or a function of (outputs, taught, labels)"
    )
    if not isinstance(outputs, Tensor):
        raise SluiceError(
            f"the model returns {type(outputs).__name__}, not logits, which the default loss is of; {how}"
        )
    shape = tuple(outputs.shape)
    if outputs.ndim < 2 or shape[-1] < 2 or not outputs.is_floating_point():
        raise SluiceError(f"the model's outputs {shape} are no logits of classes, which the default loss is of; {how}")
    if labels is None:
        if outputs.ndim > 2:
            raise SluiceError(
                f"without labels, nothing says on which axis of the outputs {shape} the classes lie; {how}"
            )
        return
    if not isinstance(labels, Tensor) or tuple(labels.shape) != shape[:-1]:
        given = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise SluiceError(
            f"labels of {where} are {given}, where the default loss takes class indices of shape {shape[:-1]}; {how}"
        )
    _check_classes(labels, shape[-1], where)


def _check_classes(labels: Any, count: int, where: str) -> None:
    if not isinstance(labels, Tensor):
        return
    if labels.dtype not in (torch.int64, torch.uint8):
        raise SluiceError(f"labels of {where} are {labels.dtype}; give class indices as torch.int64, or another loss=")
    own = labels[labels != IGNORED]
    if own.numel() and (int(own.min()) < 0 or int(own.max()) >= count):
        raise SluiceError(
            f"labels of {where} go from {int(own.min())} to {int(own.max())}; give those of 0 to {count - 1}"
        )


def _check_scalar(value: Any, where: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SluiceError(f"the loss returns {found} on {where}, no scalar; let it return a mean, a tensor of shape ()")
    if not math.isfinite(float(value.detach())):
        raise SluiceError(
            f"the loss is {float(value.detach())} on {where}; take out what is no number there, or mend it"
        )


def _check_gradient(model: nn.Module, value: Tensor) -> None:
    asked = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, asked, allow_unused=True) if value.requires_grad else ()
    if not any(g is not None and bool((g != 0).any()) for g in found):
        raise SluiceError(
            "the loss has no gradient in any parameter, so nothing would be trained; compute it from the outputs with "
            "operators of torch, and without .detach(), .item() or argmax"
        )
