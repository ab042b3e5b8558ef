"""Carry out factorizations on a captured graph.

1. A weight read by one convolution without groups, ``linear``, ``addmm``, ``mm`` or ``matmul`` becomes two parameters
   beside it (`sluice.passes.cut.factor`), transposed if the weight is stored transposed.
2. The node gets a second one before it. That one takes the input and has no bias; the old one keeps bias, scalars and
   its place in the graph.
3. Before the cut, `truncate_torch` closes: the weight becomes the product of its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Factorize
from sluice.passes.cut.factor import Split, check_form, factors, first_name, per_axis, second_name, truncations
from sluice.passes.cut.unused_torch import remove_unused
from sluice.passes.graph.aten_walk import Args, arguments, each_axis, operator_name
from sluice.passes.graph.names_torch import set_tensor

__all__ = ["factorize_torch", "truncate_torch", "truncations_torch"]

# Where the weight of an operator stands, and whether it is stored as (c, n).
_WEIGHTS = {
    "conv1d": ("weight", False),
    "conv2d": ("weight", False),
    "conv3d": ("weight", False),
    "linear": ("weight", False),
    "addmm": ("mat2", True),
    "mm": ("mat2", True),
    "matmul": ("other", True),
}


def factorize_torch(gm: fx.GraphModule, edits: Sequence[Factorize], split: Split = factors) -> None:
    """Every named weight of the captured graph becomes two parameters, in place.

    Args:
        split: makes the factors; `sluice.passes.cut.factor.random_factors` where their values do not matter.
    Raises:
        SluiceError: a weight is missing, is not the weight of exactly one such layer, or has no such form.
    """
    for edit in edits:
        weight = _tensor(gm, edit.param)
        node = _layer(gm, edit.param, weight)
        check_form(edit, weight.shape)
        names = [first_name(edit.param), second_name(edit.param)]
        if set(names) & set(gm.state_dict()):
            raise SluiceError(
                f"cannot factorize {edit.param!r}: the names {names} of its factors are in use; rename those tensors"
            )
        kind = operator_name(node)
        dense = _array(weight)
        made = split(dense.T if _WEIGHTS[kind][1] else dense, edit.form, edit.rank)
        for name, value in zip(names, made, strict=True):
            # A copy has the strides of its shape. A view whose axes have one element may have others, by which torch
            # takes it for channels last, and an exporter then restores that layout by operators.
            stored = np.array(value.T if _WEIGHTS[kind][1] else value, order="C")
            tensor = torch.from_numpy(stored).to(device=weight.device, dtype=weight.dtype)
            set_tensor(gm, name, tensor, isinstance(weight, nn.Parameter))
            if isinstance(weight, nn.Parameter):
                gm.get_parameter(name).requires_grad_(weight.requires_grad)
        a = arguments(node)
        with gm.graph.inserting_before(node):
            first, second = (gm.graph.get_attr(name) for name in names)
            if kind.startswith("conv"):
                before, after = _convolutions(a, edit.form, weight.ndim - 2)
                middle = gm.graph.call_function(_conv_op(kind, before), (a["input"], first, None, *before, 1))
                node.target = _conv_op(kind, after)
                node.args, node.kwargs = (middle, second, a["bias"], *after, 1), {}
            elif kind == "addmm":
                middle = gm.graph.call_function(torch.ops.aten.mm.default, (a["mat1"], first))
                node.args = (a["self"], middle, second)
            else:
                source = a["input" if kind == "linear" else "self"]
                middle = gm.graph.create_node("call_function", node.target, (source, first))
                node.args, node.kwargs = (middle, second, *([a["bias"]] if kind == "linear" else [])), {}
        # The value in the middle has another shape than the one behind the layer.
        middle.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        remove_unused(gm, [edit.param])
    gm.graph.lint()
    gm.recompile()


def truncate_torch(module: nn.Module, edits: Sequence[Factorize]) -> None:
    """Every named weight becomes its approximation of that form and rank, in place.

    Raises:
        SluiceError: a weight is missing or has no such form.
    """
    for edit in edits:
        weight = _tensor(module, edit.param)
        check_form(edit, weight.shape)
        with torch.no_grad():
            weight.copy_(truncations_torch(weight, edit.form)(edit.rank))


def truncations_torch(weight: Tensor, form: str) -> Callable[[int], Tensor]:
    """The weight's approximation at every rank, from one singular value decomposition in float64."""
    at = truncations(_array(weight), form)
    return lambda rank: torch.from_numpy(at(rank)).to(weight)


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = module.state_dict(keep_vars=True).get(name)
    if tensor is None:
        raise SluiceError(
            f"cannot factorize {name!r}: the model has no such dense weight; apply the plan once, to the model that "
            "it was made for"
        )
    return tensor


def _array(weight: Tensor) -> np.ndarray:
    """In float64, which numpy has for every dtype of torch."""
    return weight.detach().double().cpu().numpy()


def _layer(gm: fx.GraphModule, param: str, weight: Tensor) -> fx.Node:
    """The one operator that reads the weight, under any of its names."""
    state = gm.state_dict(keep_vars=True)
    names = {name for name, tensor in state.items() if tensor is weight}
    users = [u for n in gm.graph.nodes if n.op == "get_attr" and n.target in names for u in n.users]
    if len(users) != 1:
        raise SluiceError(
            f"cannot factorize {param!r}: {len(users)} operators read it, and it must be the weight of exactly one "
            "layer; leave it dense"
        )
    (node,) = users
    known = isinstance(node.target, torch._ops.OpOverload) and operator_name(node) in _WEIGHTS
    a: Args = arguments(node) if known else {}
    role = _WEIGHTS[operator_name(node)][0] if known else ""
    reads = [k for k, v in a.items() if isinstance(v, fx.Node) and v.op == "get_attr" and v.target in names]
    if reads != [role] or (role != "weight" and weight.ndim != 2):
        raise SluiceError(
            f"cannot factorize {param!r}: the operator {operator_name(node)} that reads it does not use it as the "
            "weight of a convolution or linear layer; leave it dense"
        )
    if a.get("groups", 1) != 1:
        raise SluiceError(
            f"cannot factorize {param!r}: its convolution has groups={a['groups']}, only groups=1 can be; leave it "
            "dense"
        )
    return node


def _convolutions(a: Args, form: str, dims: int) -> tuple[list[Any], list[Any]]:
    """Stride, padding and dilation of the two convolutions."""
    halves: tuple[list[Any], list[Any]] = ([], [])
    for key, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = a[key]
        # A padding in words adds nothing along an axis with kernel 1, so both layers can have it.
        both = (value, value) if isinstance(value, str) else per_axis(form, each_axis(value, dims), neutral)
        for half, own in zip(halves, both, strict=True):
            half.append(own)
    return halves


def _conv_op(kind: str, settings: list[Any]) -> Any:
    packet = getattr(torch.ops.aten, kind)
    return packet.padding if isinstance(settings[1], str) else packet.default
