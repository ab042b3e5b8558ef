"""Exact composition of convolutions (LayerMerge, Kim et al. 2024, with strides), on numpy arrays.

With no padding between them, convolution 2 after convolution 1 is one convolution:

    W[o, i, s1 q + p] += sum_m W2[o, m, q] W1[m, i, p]        k = k1 + s1 (k2 - 1),  s = s1 s2,  pad = p1 + s1 p2
    b[o] = b2[o] + sum_{m, q} W2[o, m, q] b1[m]

1. ``pad`` is all padding of both layers, in front of the first. Zeros *between* two layers are not zeros before the
   first, which shows at the borders. So where layer 2 is padded, the composition equals the network with this padding
   moved to the front.
2. Batch norm is a factor per output channel: ``W g``, ``(b - mean) g + beta`` with ``g = gamma / sqrt(var + eps)``.
3. Depthwise after depthwise stays depthwise; with one dense layer the whole is dense, and only then a depthwise weight
   is expanded. Other groups and dilation are refused.
4. A shortcut is a kernel with one tap in the centre: ones for the identity, its matrix for a 1x1 projection.

All spatial axes are treated alike, so one, two and three of them work, and kernels need not be square.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["Conv", "add_shortcut", "compose", "fold_norm", "identity"]


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """``weight`` (n, c / groups, *kernel), ``bias`` (n), one stride and one symmetric zero padding per spatial axis."""

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        axes = self.weight.ndim - 2
        if len(self.stride) != axes or len(self.pad) != axes or self.bias.shape != self.weight.shape[:1]:
            raise SluiceError(
                f"bad convolution: weight {self.weight.shape}, bias {self.bias.shape}, stride {self.stride}, padding "
                f"{self.pad}; give one stride and one padding per spatial axis, and one bias per output channel"
            )
        if self.groups != 1 and self.weight.shape[:2] != (self.groups, 1):
            raise SluiceError(
                f"cannot compose a convolution with weight {self.weight.shape} and groups={self.groups}: only groups=1 "
                "and depthwise (one filter per channel) are supported; leave it out of the segment"
            )

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def depthwise(self) -> bool:
        return self.groups > 1

    @property
    def inputs(self) -> int:
        """Input channels."""
        return int(self.weight.shape[1]) * self.groups


def identity(channels: int, axes: int = 2) -> Conv:
    """The identity, which takes the place of a removed convolution: 1x1, depthwise."""
    ones = np.ones((channels, 1, *[1] * axes))
    return Conv(ones, np.zeros(channels), (1,) * axes, (0,) * axes, channels)


def fold_norm(
    conv: Conv, gamma: np.ndarray | None, beta: np.ndarray | None, mean: np.ndarray, var: np.ndarray, eps: float
) -> Conv:
    """The convolution followed by the batch norm, in its evaluation statistics."""
    scale = (1.0 if gamma is None else gamma) / np.sqrt(var + eps)
    bias = (conv.bias - mean) * scale + (0.0 if beta is None else beta)
    weight = conv.weight * scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
    return Conv(weight, bias, conv.stride, conv.pad, conv.groups)


def compose(first: Conv, second: Conv) -> Conv:
    """``second`` after ``first``, all padding in front.

    Raises:
        SluiceError: their channels or numbers of axes do not match.
    """
    if second.inputs != len(first.bias) or len(first.stride) != len(second.stride):
        raise SluiceError(
            f"cannot compose weights {first.weight.shape} and {second.weight.shape}: the second reads "
            f"{second.inputs} channels, the first gives {len(first.bias)}; merge neighbours only"
        )
    inside = first.kernel
    kernel = tuple(a + s * (b - 1) for a, s, b in zip(inside, first.stride, second.kernel, strict=True))
    depthwise = first.depthwise and second.depthwise
    rows, columns = len(second.bias), 1 if depthwise else first.inputs
    weight = np.zeros((rows, columns, *kernel), np.result_type(first.weight, second.weight))
    taps = second.weight.reshape(*second.weight.shape[:2], -1)
    for index, tap in enumerate(itertools.product(*(range(size) for size in second.kernel))):
        spread = (slice(s * q, s * q + size) for s, q, size in zip(first.stride, tap, inside, strict=True))
        place: tuple[Any, ...] = (slice(None), slice(None), *spread)
        weight[place] += _through(taps[:, :, index], first, second.depthwise)
    sums = taps.sum(axis=2)
    bias = second.bias + (sums[:, 0] * first.bias if second.depthwise else sums @ first.bias)
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    pad = tuple(p + s * q for p, s, q in zip(first.pad, first.stride, second.pad, strict=True))
    return Conv(weight, bias, stride, pad, first.groups if depthwise else 1)


def add_shortcut(branch: Conv, shortcut: Conv | None, shift: tuple[int, ...] | None = None) -> Conv:
    """``branch(x) + shortcut(x)``, ``None`` being the identity, as one convolution.

    Args:
        shift: zeros put around x (negative: positions cut off) on the way of the shortcut, per side; none at all
            between layers whose padding keeps the size.
    Raises:
        SluiceError: the kernel has no centre, or shapes, strides or borders of the two ways differ.
    """
    axes = len(branch.stride)
    shift = (0,) * axes if shift is None else shift
    side = identity(len(branch.bias), axes) if shortcut is None else shortcut
    centre = tuple(size // 2 for size in branch.kernel)
    reason = None
    if any(size % 2 == 0 for size in branch.kernel):
        reason = f"its kernel {branch.kernel} is even and has no centre"
    elif side.weight.shape[2:] != (1,) * axes or any(side.pad):
        reason = f"only the identity and 1x1 projections without padding can be folded, not a {side.kernel} kernel"
    elif side.stride != branch.stride:
        reason = f"the strides of branch and shortcut differ, {branch.stride} and {side.stride}"
    elif (side.inputs, len(side.bias)) != (branch.inputs, len(branch.bias)):
        reason = (
            f"it maps {branch.inputs} to {len(branch.bias)} channels, its shortcut {side.inputs} to {len(side.bias)}"
        )
    elif tuple(c + s for c, s in zip(centre, shift, strict=True)) != branch.pad:
        reason = f"its padding {branch.pad} is not half of its kernel {branch.kernel}"
    if reason is not None:
        raise SluiceError(
            f"cannot fold a shortcut into weight {branch.weight.shape}: {reason}; end the segment before it"
        )
    if side.depthwise or not branch.depthwise:
        weight, groups = branch.weight.copy(), branch.groups
    else:  # a dense projection beside a depthwise branch
        weight, groups = compose(branch, _dense_identity(len(branch.bias), axes)).weight, 1
    tap = side.weight.reshape(side.weight.shape[:2])
    where: tuple[Any, ...] = (slice(None), slice(None), *centre)
    middle = weight[where]  # a view
    if side.depthwise and groups == 1:
        middle[np.arange(len(tap)), np.arange(len(tap))] += tap[:, 0]
    else:
        middle += tap
    return Conv(weight, branch.bias + side.bias, branch.stride, branch.pad, groups)


def _through(tap: np.ndarray, first: Conv, depthwise: bool) -> np.ndarray:
    """(rows, columns, *k1): one tap of the second layer, (n, m) or (n, 1), applied to the whole first layer."""
    spread = (...,) + (None,) * len(first.stride)
    if depthwise:
        return tap[spread] * first.weight
    if first.depthwise:
        return tap[spread] * np.moveaxis(first.weight, 0, 1)
    return np.tensordot(tap, first.weight, axes=1)


def _dense_identity(channels: int, axes: int) -> Conv:
    eye = np.eye(channels).reshape(channels, channels, *[1] * axes)
    return Conv(eye, np.zeros(channels), (1,) * axes, (0,) * axes)
