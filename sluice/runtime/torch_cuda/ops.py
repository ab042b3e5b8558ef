"""ONNX operators in torch: one small function per operator, and the table of all of them.

A function takes the node's operands (None for one that is left out) and its attributes, and gives a tensor, or a tuple
where the node has several outputs. An operand that says *how* to compute (a shape, axes, sizes) is a *number*: it must
be known when the network is built, and arrives as a tensor on the host. All other operands are on the device, but for
single values of arithmetic: those torch takes from the host, as arguments of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError
from sluice.runtime.torch_cuda.layers import (
    Args,
    Attributes,
    average_pool,
    batch_norm,
    conv,
    conv_transpose,
    gemm,
    group_norm,
    instance_norm,
    layer_norm,
    max_pool,
    pad,
    resize,
)
from sluice.runtime.torch_cuda.layout import (
    concat,
    depth_to_space,
    expand,
    flatten,
    gather,
    pool_all,
    reduce_by,
    reshape,
    space_to_depth,
    split,
    squeeze,
    take_slice,
    transpose,
    unsqueeze,
)
from sluice.runtime.torch_cuda.recurrent import gru, lstm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["OPS", "Op", "dtype_of"]

# By number of the ONNX element type.
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    16: "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Op:
    """The function of an operator, its operands that are numbers, and whether it takes single values from the host."""

    run: Callable[[Args, Attributes], Any]
    numbers: frozenset[int] = frozenset()
    scalars: bool = False


def dtype_of(element_type: int) -> torch.dtype:
    """The torch type of an ONNX element type; `SluiceError` where torch has none."""
    import torch

    if element_type not in DTYPES:
        raise SluiceError(f"ONNX element type {element_type} is not supported; use one of {', '.join(DTYPES.values())}")
    found: torch.dtype = getattr(torch, DTYPES[element_type])
    return found


def _div(x: Args, a: Attributes) -> Tensor:
    return x[0].div(x[1]) if x[0].is_floating_point() else x[0].div(x[1], rounding_mode="trunc")


def _clip(x: Args, a: Attributes) -> Tensor:
    low, high = (x[k].item() if len(x) > k and x[k] is not None else None for k in (1, 2))
    return x[0] if low is None and high is None else x[0].clamp(low, high)


def _several(fold: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Args, Attributes], Tensor]:
    def run(x: Args, a: Attributes) -> Tensor:
        result: Tensor = x[0]
        for other in x[1:]:
            result = fold(result, other)
        return result

    return run


def _gelu(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.gelu(x[0], approximate=a.get("approximate", "none"))


def _hard_sigmoid(x: Args, a: Attributes) -> Tensor:
    return (x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1)


def _hard_swish(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.hardswish(x[0])


def _leaky_relu(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.leaky_relu(x[0], a.get("alpha", 0.01))


def _elu(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.elu(x[0], a.get("alpha", 1.0))


def _softplus(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    return F.softplus(x[0])


def _prelu(x: Args, a: Attributes) -> Tensor:
    from torch.nn import functional as F

    data, slope = x[0], x[1]
    if slope.numel() == 1 or (slope.numel() == slope.shape[0] == data.shape[1] and slope.dim() == data.dim() - 1):
        return F.prelu(data, slope.reshape(-1))
    return data.where(data >= 0, slope * data)


def _where(x: Args, a: Attributes) -> Tensor:
    return x[1].where(x[0], x[2])


def _cast(x: Args, a: Attributes) -> Tensor:
    return x[0].to(dtype_of(a["to"]))


def _cast_like(x: Args, a: Attributes) -> Tensor:
    return x[0].to(x[1].dtype)


def _constant(x: Args, a: Attributes) -> Tensor:
    import torch

    found = next(iter(a.values()))
    return found if isinstance(found, torch.Tensor) else torch.tensor(found)


def _constant_of_shape(x: Args, a: Attributes) -> Tensor:
    import torch

    value = a.get("value", torch.zeros(1))
    return value.expand(x[0].tolist()) if x[0].numel() else value.reshape(())


def _range(x: Args, a: Attributes) -> Tensor:
    import torch

    return torch.arange(*(v.item() for v in x), dtype=x[0].dtype)


ONE = frozenset({1})
OPS: Mapping[str, Op] = {
    # products and layers
    "Conv": Op(conv),
    "ConvTranspose": Op(conv_transpose),
    "Gemm": Op(gemm),
    "MatMul": Op(lambda x, a: x[0].matmul(x[1])),
    "AveragePool": Op(average_pool),
    "MaxPool": Op(max_pool),
    "GlobalAveragePool": Op(pool_all("mean")),
    "GlobalMaxPool": Op(pool_all("amax")),
    "BatchNormalization": Op(batch_norm),
    "GroupNormalization": Op(group_norm),
    "InstanceNormalization": Op(instance_norm),
    "LayerNormalization": Op(layer_norm),
    "Pad": Op(pad, frozenset({1, 2, 3})),
    "Resize": Op(resize, frozenset({1, 2, 3})),
    "GRU": Op(gru),
    "LSTM": Op(lstm),
    # element by element
    "Abs": Op(lambda x, a: x[0].abs()),
    "Add": Op(lambda x, a: x[0] + x[1], scalars=True),
    "And": Op(lambda x, a: x[0].logical_and(x[1])),
    "Clip": Op(_clip, frozenset({1, 2})),
    "Div": Op(_div, scalars=True),
    "Elu": Op(_elu),
    "Equal": Op(lambda x, a: x[0] == x[1], scalars=True),
    "Erf": Op(lambda x, a: x[0].erf()),
    "Exp": Op(lambda x, a: x[0].exp()),
    "Gelu": Op(_gelu),
    "Greater": Op(lambda x, a: x[0] > x[1], scalars=True),
    "GreaterOrEqual": Op(lambda x, a: x[0] >= x[1], scalars=True),
    "HardSigmoid": Op(_hard_sigmoid),
    "HardSwish": Op(_hard_swish),
    "LeakyRelu": Op(_leaky_relu),
    "Less": Op(lambda x, a: x[0] < x[1], scalars=True),
    "LessOrEqual": Op(lambda x, a: x[0] <= x[1], scalars=True),
    "Log": Op(lambda x, a: x[0].log()),
    "Max": Op(_several(lambda left, right: left.maximum(right)), scalars=True),
    "Min": Op(_several(lambda left, right: left.minimum(right)), scalars=True),
    "Mul": Op(lambda x, a: x[0] * x[1], scalars=True),
    "Neg": Op(lambda x, a: -x[0]),
    "Not": Op(lambda x, a: x[0].logical_not()),
    "Or": Op(lambda x, a: x[0].logical_or(x[1])),
    "PRelu": Op(_prelu),
    "Pow": Op(lambda x, a: x[0].pow(x[1]).to(x[0].dtype), scalars=True),
    "Reciprocal": Op(lambda x, a: x[0].reciprocal()),
    "Relu": Op(lambda x, a: x[0].relu()),
    "Sigmoid": Op(lambda x, a: x[0].sigmoid()),
    "Softplus": Op(_softplus),
    "Sqrt": Op(lambda x, a: x[0].sqrt()),
    "Sub": Op(lambda x, a: x[0] - x[1], scalars=True),
    "Sum": Op(_several(lambda left, right: left + right), scalars=True),
    "Tanh": Op(lambda x, a: x[0].tanh()),
    "Where": Op(_where),
    # over axes
    "LogSoftmax": Op(lambda x, a: x[0].log_softmax(a.get("axis", -1))),
    "ReduceMax": Op(reduce_by("amax"), ONE),
    "ReduceMean": Op(reduce_by("mean"), ONE),
    "ReduceMin": Op(reduce_by("amin"), ONE),
    "ReduceSum": Op(reduce_by("sum"), ONE),
    "Softmax": Op(lambda x, a: x[0].softmax(a.get("axis", -1))),
    # types and constants
    "Cast": Op(_cast),
    "CastLike": Op(_cast_like),
    "Constant": Op(_constant),
    "ConstantOfShape": Op(_constant_of_shape, frozenset({0})),
    "Dropout": Op(lambda x, a: x[0], frozenset({1, 2})),
    "Identity": Op(lambda x, a: x[0]),
    "Range": Op(_range, frozenset({0, 1, 2})),
    # layout
    "Concat": Op(concat),
    "DepthToSpace": Op(depth_to_space),
    "Expand": Op(expand, ONE),
    "Flatten": Op(flatten),
    "Gather": Op(gather, scalars=True),
    "Reshape": Op(reshape, ONE),
    "Slice": Op(take_slice, frozenset({1, 2, 3, 4})),
    "SpaceToDepth": Op(space_to_depth),
    "Split": Op(split, ONE),
    "Squeeze": Op(squeeze, ONE),
    "Tile": Op(lambda x, a: x[0].tile(x[1].tolist()), ONE),
    "Transpose": Op(transpose),
    "Unsqueeze": Op(unsqueeze, ONE),
}
