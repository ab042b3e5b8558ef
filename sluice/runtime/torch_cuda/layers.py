"""ONNX operators that are layers, in torch: products, convolutions, pools, norms, resizing.

Every function takes its operands (None for one that is left out) and the node's attributes. Padding that is not the
same on both sides is done before the layer, because torch's layers know symmetric padding only. A convolution's image
of one channel counts as one with channels last: the outputs of other operators have the strides of the other layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "average_pool",
    "batch_norm",
    "conv",
    "conv_transpose",
    "gemm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "max_pool",
    "pad",
    "resize",
]

Args = Sequence[Any]
Attributes = Mapping[str, Any]
Pairs = list[tuple[int, int]]


def gemm(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    left, right = x[0].t() if a.get("transA") else x[0], x[1] if a.get("transB") else x[1].t()
    bias = x[2] if len(x) > 2 else None
    if a.get("alpha", 1.0) == 1.0 and a.get("beta", 1.0) == 1.0 and (bias is None or bias.dim() == 1):
        return F.linear(left, right, bias)
    product = a.get("alpha", 1.0) * F.linear(left, right)
    return product if bias is None else product + a.get("beta", 1.0) * bias


def conv(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    data, weight, bias = x[0], x[1], x[2] if len(x) > 2 else None
    kernel = list(weight.shape[2:])
    strides, dilations = _per_axis(a, "strides", kernel), _per_axis(a, "dilations", kernel)
    pairs = _padding(a, data.shape[2:], kernel, strides, dilations)
    if any(before != after for before, after in pairs):
        data, pairs = _padded(data, pairs), [(0, 0)] * len(pairs)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    padding = [before for before, _ in pairs]
    return convolve(_channels_last(data), weight, bias, strides, padding, dilations, a.get("group", 1))


def conv_transpose(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    if "output_shape" in a or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise SluiceError("output_shape and automatic padding are not supported; give pads")
    data, weight, bias = x[0], x[1], x[2] if len(x) > 2 else None
    kernel = list(weight.shape[2:])
    strides, dilations = _per_axis(a, "strides", kernel), _per_axis(a, "dilations", kernel)
    pairs = _padding(a, data.shape[2:], kernel, strides, dilations)
    common = [min(pair) for pair in pairs]
    extra = list(a.get("output_padding", [0] * len(kernel)))
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(kernel) - 1]
    out = convolve(_channels_last(data), weight, bias, strides, common, extra, a.get("group", 1), dilations)
    for axis, ((before, after), both) in enumerate(zip(pairs, common, strict=True), start=2):
        out = out.narrow(axis, before - both, out.shape[axis] - before - after + 2 * both)
    return out


def max_pool(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    data, kernel = x[0], list(a["kernel_shape"])
    strides, dilations = _per_axis(a, "strides", kernel), _per_axis(a, "dilations", kernel)
    pairs = _padding(a, data.shape[2:], kernel, strides, dilations)
    if any(before != after for before, after in pairs):
        data, pairs = _padded(data, pairs, float("-inf")), [(0, 0)] * len(pairs)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(data, kernel, strides, [before for before, _ in pairs], dilations, bool(a.get("ceil_mode", 0)))


def average_pool(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    data, kernel = x[0], list(a["kernel_shape"])
    strides = _per_axis(a, "strides", kernel)
    pairs = _padding(a, data.shape[2:], kernel, strides, [1] * len(kernel))
    counted = bool(a.get("count_include_pad", 0))
    if any(d != 1 for d in a.get("dilations", [])):
        raise SluiceError("an average over dilated windows is not supported; use a convolution")
    if any(before != after for before, after in pairs):
        if not counted or a.get("ceil_mode", 0):
            raise SluiceError("uneven padding that does not count is not supported; pad before the pool")
        data, pairs = _padded(data, pairs), [(0, 0)] * len(pairs)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return pool(data, kernel, strides, [before for before, _ in pairs], bool(a.get("ceil_mode", 0)), counted)


def batch_norm(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    if a.get("training_mode", 0):
        raise SluiceError("batch norm in training mode is not supported; export the network in eval mode")
    data, scale, shift, mean, var = x
    return F.batch_norm(data, mean, var, scale, shift, training=False, eps=a.get("epsilon", 1e-5))


def instance_norm(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.instance_norm(x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5))


def layer_norm(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    shape = x[0].shape[a.get("axis", -1) :]
    return F.layer_norm(x[0], shape, x[1], x[2] if len(x) > 2 else None, a.get("epsilon", 1e-5))


def group_norm(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.group_norm(x[0], a["num_groups"], x[1], x[2], a.get("epsilon", 1e-5))


def pad(x: Args, a: Attributes) -> Tensor:
    """Operands: data, begins and ends, value, axes."""
    import torch
    from torch.nn import functional as F

    data, amounts = x[0], x[1].tolist()
    value = float(x[2]) if len(x) > 2 and x[2] is not None else 0.0
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(data.dim())
    pairs: Pairs = [(0, 0)] * data.dim()
    for k, axis in enumerate(axes):
        pairs[axis] = (amounts[k], amounts[k + len(amounts) // 2])
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes[a.get("mode", "constant")]
    if mode == "constant":
        return F.pad(data, _backwards(pairs), value=value)
    for axis in (0, 1):  # torch pads positions alone
        if pairs[axis] != (0, 0):
            places = np.pad(np.arange(data.shape[axis]), pairs[axis], mode=a["mode"])
            data = data.index_select(axis, torch.from_numpy(places).to(data.device))
    return F.pad(data, _backwards(pairs[2:]), mode=mode) if any(pair != (0, 0) for pair in pairs[2:]) else data


def resize(x: Args, a: Attributes) -> Tensor:
    """Operands: data, region of interest, scales, sizes; axes as an attribute."""
    from torch.nn import functional as F

    data = x[0]
    how = (a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel"))
    modes = {
        ("nearest", "asymmetric"): ("nearest", None),
        ("linear", "half_pixel"): ("linear", False),
        ("linear", "align_corners"): ("linear", True),
    }
    rounded = how[0] == "nearest" and a.get("nearest_mode", "round_prefer_floor") != "floor"
    if how not in modes or rounded or a.get("antialias", 0) or "axes" in a:
        raise SluiceError(f"resizing by {how} is not supported; use nearest (floor, asymmetric) or linear (half_pixel)")
    mode, aligned = modes[how]
    if mode == "linear":
        mode = ("linear", "bilinear", "trilinear")[data.dim() - 3]
    by_size = len(x) > 3 and x[3] is not None
    amounts = x[3].tolist() if by_size else x[2].tolist()
    if amounts[:2] != (list(data.shape[:2]) if by_size else [1.0, 1.0]):
        raise SluiceError("resizing the batch or the channels is not supported; resize positions alone")
    if by_size:
        return F.interpolate(data, size=amounts[2:], mode=mode, align_corners=aligned)
    return F.interpolate(data, scale_factor=amounts[2:], mode=mode, align_corners=aligned)


def _channels_last(data: Tensor) -> Tensor:
    """The same data; for the kernel's layout torch asks the strides, and those of one channel fit both."""
    if data.dim() != 4 or data.shape[1] != 1 or not data.is_contiguous():
        return data
    high, wide = data.shape[2:]
    return data.as_strided(data.shape, (high * wide, 1, wide, 1))


def _per_axis(a: Attributes, name: str, kernel: Sequence[int]) -> list[int]:
    return list(a.get(name, [1] * len(kernel)))


def _padding(
    a: Attributes, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Pairs:
    """(before, after) of every axis, of the attribute ``pads`` or automatic."""
    automatic = a.get("auto_pad", "NOTSET")
    if automatic == "NOTSET":
        pads = list(a.get("pads", [0] * 2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    if automatic == "VALID":
        return [(0, 0)] * len(kernel)
    pairs: Pairs = []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if automatic == "SAME_UPPER" else (large, small))
    return pairs


def _padded(data: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    from torch.nn import functional as F

    return F.pad(data, _backwards(pairs), value=value)


def _backwards(pairs: Pairs) -> list[int]:
    """Torch lists the last axis first."""
    return [amount for pair in reversed(pairs) for amount in pair]
