"""ONNX recurrent layers in torch.

1. Gates come in another order: ONNX has input, output, forget, cell (LSTM) and update, reset, hidden (GRU); torch has
   input, forget, cell, output and reset, update, new.
2. Sequences lie along axis 0, and all are of one length. Activations are the standard ones, there are no peepholes,
   and a GRU resets after its product, as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sluice.core.errors import SluiceError
from sluice.runtime.torch_cuda.layers import Args, Attributes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gru", "lstm"]

UNTOLD = ("activation_alpha", "activation_beta", "clip", "input_forget")
STANDARD = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}


def lstm(x: Args, a: Attributes) -> tuple[Tensor, ...]:
    import torch

    data, weights, states = _read("LSTM", x, a, states=2)
    run = torch.lstm(data, states, weights, len(weights) % 4 == 0, 1, 0.0, False, x[1].shape[0] == 2, False)
    return _written(run[0], run[1:], x, a)


def gru(x: Args, a: Attributes) -> tuple[Tensor, ...]:
    import torch

    if not a.get("linear_before_reset", 0):
        raise SluiceError("a GRU that resets before its product has no counterpart in torch")
    data, weights, states = _read("GRU", x, a, states=1)
    run = torch.gru(data, states[0], weights, len(weights) % 4 == 0, 1, 0.0, False, x[1].shape[0] == 2, False)
    return _written(run[0], run[1:], x, a)


def _read(kind: str, x: Args, a: Attributes, *, states: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Data in the direction of time, weights in torch's order by direction, and the initial states."""
    data, weight, again = x[0], x[1], x[2]
    known = [x[k] if len(x) > k else None for k in range(8)]
    wanted = STANDARD[kind] * weight.shape[0]
    if known[4] is not None or known[7] is not None or a.get("layout", 0) or any(name in a for name in UNTOLD):
        raise SluiceError("lengths of sequences, peepholes, clipping or another layout have no counterpart in torch")
    if tuple(word.decode() if isinstance(word, bytes) else word for word in a.get("activations", wanted)) != wanted:
        raise SluiceError(f"its activations {a['activations']} have no counterpart in torch")
    weights = []
    for k in range(weight.shape[0]):
        weights += [_ordered(kind, weight[k]), _ordered(kind, again[k])]
        if known[3] is not None:
            weights += [_ordered(kind, half) for half in known[3][k].chunk(2)]
    shape = (weight.shape[0], data.shape[1], again.shape[2])
    first = [given if given is not None else data.new_zeros(shape) for given in known[5 : 5 + states]]
    return (data.flip(0) if a.get("direction") == "reverse" else data), weights, first


def _ordered(kind: str, gates: Tensor) -> Tensor:
    import torch

    parts = gates.chunk(len(ORDER[kind]))
    return torch.cat([parts[k] for k in ORDER[kind]])


def _written(found: Tensor, states: Sequence[Tensor], x: Args, a: Attributes) -> tuple[Tensor, ...]:
    """Shape (steps, directions, batch, hidden), and the last states."""
    steps, batch, _ = found.shape
    found = found.reshape(steps, batch, x[1].shape[0], -1).transpose(1, 2)
    return (found.flip(0) if a.get("direction") == "reverse" else found, *states)
