"""ONNX operators that move, join or reduce values along axes, in torch.

Every function takes its operands (None for one that is left out) and the node's attributes. Axes, shapes and amounts
are tensors on the host, known when the network is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sluice.runtime.torch_cuda.layers import Args, Attributes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "concat",
    "depth_to_space",
    "expand",
    "flatten",
    "gather",
    "pool_all",
    "reduce_by",
    "reshape",
    "space_to_depth",
    "split",
    "squeeze",
    "take_slice",
    "transpose",
    "unsqueeze",
]


def concat(x: Args, a: Attributes) -> Tensor:
    import torch

    return torch.cat(list(x), a["axis"])


def split(x: Args, a: Attributes) -> tuple[Tensor, ...]:
    axis, size = a.get("axis", 0), x[0].shape[a.get("axis", 0)]
    if len(x) > 1 and x[1] is not None:
        return tuple(x[0].split(x[1].tolist(), axis))
    return tuple(x[0].split(-(-size // a["outputs"]), axis))


def take_slice(x: Args, a: Attributes) -> Tensor:
    data, starts, ends = x[0], x[1].tolist(), x[2].tolist()
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(len(starts))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken = range(data.shape[axis])[start:end:step]
        # Torch has no negative steps.
        forward = taken if step > 0 or not taken else taken[::-1]
        window = [slice(None)] * data.dim()
        window[axis] = slice(forward.start, forward.stop, forward.step) if taken else slice(0, 0)
        data = data[tuple(window)] if step > 0 else data[tuple(window)].flip(axis)
    return data


def gather(x: Args, a: Attributes) -> Tensor:
    data, index, axis = x[0], x[1], a.get("axis", 0) % x[0].dim()
    if index.dim() == 0 and index.device.type == "cpu":
        return data.select(axis, int(index))
    positions = index.reshape(-1).long()
    found = data.index_select(axis, positions.where(positions >= 0, positions + data.shape[axis]))
    return found.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def reshape(x: Args, a: Attributes) -> Tensor:
    shape = x[1].tolist()
    if not a.get("allowzero", 0):
        shape = [x[0].shape[k] if size == 0 else size for k, size in enumerate(shape)]
    return x[0].reshape(shape)


def flatten(x: Args, a: Attributes) -> Tensor:
    axis = a.get("axis", 1)
    return x[0].reshape(int(np.prod(x[0].shape[:axis], dtype=np.int64)), -1)


def squeeze(x: Args, a: Attributes) -> Tensor:
    axes = _axes(x, a)
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(axes))


def unsqueeze(x: Args, a: Attributes) -> Tensor:
    data, axes = x[0], _axes(x, a) or []
    rank = data.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def transpose(x: Args, a: Attributes) -> Tensor:
    return x[0].permute(a.get("perm", list(range(x[0].dim()))[::-1]))


def expand(x: Args, a: Attributes) -> Tensor:
    return x[0].expand(np.broadcast_shapes(tuple(x[0].shape), tuple(x[1].tolist())))


def depth_to_space(x: Args, a: Attributes) -> Tensor:
    (n, c, h, w), s = x[0].shape, a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        parts = x[0].reshape(n, c // s**2, s, s, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = x[0].reshape(n, s, s, c // s**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // s**2, h * s, w * s)


def space_to_depth(x: Args, a: Attributes) -> Tensor:
    (n, c, h, w), s = x[0].shape, a["blocksize"]
    return x[0].reshape(n, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4).reshape(n, c * s**2, h // s, w // s)


def reduce_by(name: str) -> Callable[[Args, Attributes], Tensor]:
    def run(x: Args, a: Attributes) -> Tensor:
        axes = _axes(x, a)
        if not axes and a.get("noop_with_empty_axes", 0):
            return x[0]
        result: Tensor = getattr(x[0], name)(tuple(axes or range(x[0].dim())), keepdim=bool(a.get("keepdims", 1)))
        return result

    return run


def pool_all(name: str) -> Callable[[Args, Attributes], Tensor]:
    return lambda x, a: getattr(x[0], name)(tuple(range(2, x[0].dim())), keepdim=True)


def _axes(x: Args, a: Attributes) -> list[int] | None:
    """Of the second operand, or of the attribute that it was in older opsets."""
    return x[1].tolist() if len(x) > 1 and x[1] is not None else a.get("axes")
