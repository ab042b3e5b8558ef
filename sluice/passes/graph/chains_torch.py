"""The chains of convolutions of a captured graph.

An activation may be written as several operators (`sluice.passes.graph.composed`). A product with the number one, and a
cast to the type that all weights have, do nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sluice.passes.graph.aten_walk import arguments, each_axis, operator_name
from sluice.passes.graph.capture_modes import DROPOUTS, BatchNorm
from sluice.passes.graph.chains import Chain, ChainOp, Layer, Norm, find_chains
from sluice.passes.graph.composed import Composed, composed
from sluice.passes.graph.operators import ELEMENTWISE, aten_operator

__all__ = ["activation_source", "chains_torch"]


def chains_torch(gm: fx.GraphModule) -> tuple[Chain, ...]:
    """The chains of convolutions of a captured graph."""
    state = gm.state_dict(keep_vars=True)
    read = Counter(
        id(state[str(n.target)])
        for n in gm.graph.nodes
        if n.op == "get_attr" and str(n.target) in state
        for _ in n.users
    )
    shared = {name for name, tensor in state.items() if read[id(tensor)] > 1}
    inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    modules = dict(gm.named_modules())
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")]
    sizes = {n for n in nodes if operator_name(n) == "sym_size" and n.args[0].op == "placeholder"}
    found = {n: piece for n in nodes if (piece := _composed(n)) is not None}
    inner = {member for n, piece in found.items() for member in piece.members - {n}}
    ops = [
        ChainOp("act", f"{operator_name(n)} ({n.name})", (found[n].source.name,), (n.name,))
        if n in found
        else _read(n, state, shared, modules)
        for n in nodes
        if n not in sizes and n not in inner
    ]
    return find_chains(ops, inputs)


def activation_source(node: fx.Node) -> fx.Node:
    """The value that an activation, of one operator or of several, is computed of."""
    piece = _composed(node)
    return node.all_input_nodes[0] if piece is None else piece.source


def _composed(node: fx.Node) -> Composed[fx.Node] | None:
    """The activation of several operators that ends here."""
    piece = composed(node, _operands, lambda value: value.users)
    if piece is None or not any(aten_operator(operator_name(n)).is_a("activation") for n in piece.members):
        return None
    changed = [n.args[0] for n in piece.members if n.target._schema.is_mutable]  # type: ignore[union-attr]
    return piece if all(piece.members.issuperset(x.users) for x in changed if isinstance(x, fx.Node)) else None


def _operands(node: fx.Node) -> list[fx.Node] | None:
    """The values that an operator works on entry by entry; None if it is none of that kind, or reads a tensor."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    inputs = node.all_input_nodes
    plain = aten_operator(operator_name(node)).kind in ELEMENTWISE and all(n.op != "get_attr" for n in inputs)
    return inputs if plain and inputs else None


def _read(node: fx.Node, state: dict[str, torch.Tensor], shared: set[str], modules: dict[str, nn.Module]) -> ChainOp:
    """The neutral form of a node; ``shared`` are the tensors that several nodes read."""
    inputs = tuple(n.name for n in node.all_input_nodes if n.op != "get_attr")
    other = ChainOp("other", f"{operator_name(node)} ({node.name})", inputs, (node.name,))
    if node.op == "output":
        return ChainOp("output", "output", inputs, ())
    data = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if data is None or data.op == "get_attr":
        return other
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, tuple(DROPOUTS.values())):
            return replace(other, kind="act")
        path, affine = str(node.target), (*node.args[1:], None, None)[:2]
        names = [str(a.target) if isinstance(a, fx.Node) else None for a in affine]
        if not isinstance(module, BatchNorm) or len(inputs) != 1 or f"{path}.running_mean" not in state:
            return other
        norm = Norm(names[0], names[1], f"{path}.running_mean", f"{path}.running_var", module.eps, node.name)
        return replace(other, kind="norm", norm=norm)
    if not isinstance(node.target, torch._ops.OpOverload):
        return other
    name, a = operator_name(node), arguments(node)
    if node.target._schema.is_mutable and len(data.users) > 1:
        return replace(other, label=f"{other.label}, which changes a value in place that others read")
    if name in ("conv1d", "conv2d", "conv3d"):
        return _read_conv(node, a, state, shared, other)
    if name == "add" and len(inputs) == 2 and a["alpha"] == 1:
        return replace(other, kind="add")
    if aten_operator(name).is_a("activation") and len(inputs) == 1:
        return replace(other, kind="act")
    if name == "mul" and 1 in (a["self"], a["other"]):
        return replace(other, kind="act")
    if name in ("to", "_to_copy") and {a.get("dtype")} == {t.dtype for t in state.values() if t.is_floating_point()}:
        return replace(other, kind="act")  # a convolution's output has the type of the weights
    if name == "constant_pad_nd" and a["value"] == 0 and a["pad"][::2] == a["pad"][1::2]:
        return replace(other, kind="pad", pad=tuple(a["pad"][::-2]))
    return other


def _read_conv(
    node: fx.Node, a: dict[str, Any], state: dict[str, torch.Tensor], shared: set[str], other: ChainOp
) -> ChainOp:
    weight, bias = a["weight"], a["bias"]
    if any(t is not None and (t.op != "get_attr" or t.target not in state) for t in (weight, bias)):
        return replace(other, label=f"{other.label} with a computed weight")
    name, shape = str(weight.target), tuple(state[str(weight.target)].shape)
    axes = len(shape) - 2
    padding, stride, dilation = a["padding"], *(each_axis(a[key], axes) for key in ("stride", "dilation"))
    if padding == "same" and all(k % 2 for k in shape[2:]):
        padding = tuple(k // 2 for k in shape[2:])
    elif isinstance(padding, str):
        padding = 0 if padding == "valid" else None
    reason = None
    if name in shared:
        reason = "is shared"
    elif max(dilation) > 1:
        reason = f"has dilation {dilation}"
    elif padding is None:
        reason = "is padded unevenly"
    elif a["groups"] > 1 and shape[:2] != (a["groups"], 1):
        reason = f"has groups={a['groups']}"
    if reason is not None:
        return replace(other, label=f"convolution {name!r}, which {reason}")
    names = (name, None if bias is None else str(bias.target))
    layer = Layer(*names, shape, stride, each_axis(padding, axes), a["groups"], other.inputs[0], node.name)
    return replace(other, kind="conv", label=f"convolution {name!r}", layer=layer)
