"""Merges on a captured graph, in two steps with training in between.

1. `linearize_torch`: the inner activations and the removed convolutions go, and the padding of every run moves to its
   first layer (`sluice.passes.cut.merge_region`, rule 3). Convolutions, norms and shortcuts stay, as the
   over-parameterised form trains better. This changes the function, at the borders too, and training absorbs it.
2. `merge_torch`: every run becomes one convolution with bias, under the name of its last weight; batch norms fold in
   with their running statistics. Exact in eval mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.cut.merge_region import (
    Block,
    Region,
    Run,
    bias_name,
    compose_run,
    find_region,
    layers_of,
    paddings,
    runs_of,
)
from sluice.passes.cut.unused_torch import remove_unread
from sluice.passes.graph.aten_walk import arguments, operator_name
from sluice.passes.graph.capture import _DROPOUTS, MARK, BatchNorm, set_tensor
from sluice.passes.graph.chains import Chain, Layer, Norm, Op, Span, find_chains

__all__ = ["chains_torch", "linearize_torch", "merge_torch"]

_ACTIVATIONS = """relu relu6 hardtanh clamp clamp_min clamp_max leaky_relu elu selu celu gelu silu mish hardswish
    hardsigmoid sigmoid tanh softplus"""
_CONVS = {1: torch.ops.aten.conv1d, 2: torch.ops.aten.conv2d, 3: torch.ops.aten.conv3d}
_PAD = torch.ops.aten.constant_pad_nd.default


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
    return find_chains([_read(n, state, shared, modules) for n in nodes if n not in sizes], inputs)


def linearize_torch(gm: fx.GraphModule, merges: Sequence[Merge]) -> None:
    """Bring a captured graph, in place, into the form that is trained before it is merged; twice is as good as once.

    Raises:
        SluiceError: a merge does not fit the graph.
    """
    for merge in merges:
        region = find_region(chains_torch(gm), merge)
        nodes = {n.name: n for n in gm.graph.nodes}
        gone = [nodes[span.add] for span in region.emptied]
        for run in runs_of(region.units):
            pads, shifts = paddings(run)
            for layer in layers_of(run.parts):
                _set_padding(nodes[layer.value], pads[layer.weight])
            for span in region.spans:
                if span.add in shifts and shifts[span.add] != span.shift:
                    gone += _set_shift(gm, nodes, span, shifts[span.add])
        for span in region.emptied:
            nodes[span.add].replace_all_uses_with(nodes[span.source])
        removed = [layer for layer in region.layers if layer.weight not in region.kept]
        values = [*region.acts, *(v.value for v in removed), *(v.norm.value for v in removed if v.norm)]
        for node in (nodes[value] for value in values):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gone.append(node)
        _clean(gm, gone, region)


def merge_torch(gm: fx.GraphModule, merges: Sequence[Merge]) -> None:
    """One convolution per run, in place, on a dense or on a linearised captured graph.

    Raises:
        SluiceError: a merge does not fit the graph.
    """
    for merge in merges:
        region = find_region(chains_torch(gm), merge)
        nodes = {n.name: n for n in gm.graph.nodes}
        state = gm.state_dict(keep_vars=True)
        tensors = {name: state[name].detach().cpu().numpy() for name in region.tensors}
        out = nodes[region.value]
        with gm.graph.inserting_before(out.next):
            new = _emit(gm, region, region.units, nodes[region.source], tensors)
        out.replace_all_uses_with(new)
        _clean(gm, [out], region)


def _read(node: fx.Node, state: dict[str, torch.Tensor], shared: set[str], modules: dict[str, nn.Module]) -> Op:
    """The neutral form of a node; ``shared`` are the tensors that several nodes read."""
    inputs = tuple(n.name for n in node.all_input_nodes if n.op != "get_attr")
    other = Op("other", f"{operator_name(node)} ({node.name})", inputs, (node.name,))
    if node.op == "output":
        return Op("output", "output", inputs, ())
    data = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if data is None or data.op == "get_attr":
        return other
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, tuple(_DROPOUTS.values())):
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
    if name in _ACTIVATIONS.split() and len(inputs) == 1:
        return replace(other, kind="act")
    if name == "constant_pad_nd" and a["value"] == 0 and a["pad"][::2] == a["pad"][1::2]:
        return replace(other, kind="pad", pad=tuple(a["pad"][::-2]))
    return other


def _read_conv(node: fx.Node, a: dict[str, Any], state: dict[str, torch.Tensor], shared: set[str], other: Op) -> Op:
    weight, bias = a["weight"], a["bias"]
    if any(t is not None and (t.op != "get_attr" or t.target not in state) for t in (weight, bias)):
        return replace(other, label=f"{other.label} with a computed weight")
    name, shape = str(weight.target), tuple(state[str(weight.target)].shape)
    axes = len(shape) - 2
    padding, stride, dilation = a["padding"], *(_each(a[key], axes) for key in ("stride", "dilation"))
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
    layer = Layer(*names, shape, stride, _each(padding, axes), a["groups"], other.inputs[0], node.name)
    return replace(other, kind="conv", label=f"convolution {name!r}", layer=layer)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One number per axis, as operators also take one for all."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * axes if len(values) == 1 else values


def _set_padding(node: fx.Node, pad: tuple[int, ...]) -> None:
    a = arguments(node)
    axes = len(pad)
    node.target = _CONVS[axes].default
    stride, dilation = _each(a["stride"], axes), _each(a["dilation"], axes)
    node.args = (a["input"], a["weight"], a["bias"], list(stride), list(pad), list(dilation), a["groups"])
    node.kwargs = {}


def _set_shift(gm: fx.GraphModule, nodes: dict[str, fx.Node], span: Span, shift: tuple[int, ...]) -> list[fx.Node]:
    """Zeros around (or, negative, a border cut off) what the shortcut reads; returns what took their place before."""
    source, reader = nodes[span.source], nodes[span.shortcut.value if span.shortcut else span.add]
    old = next(n for n in reader.all_input_nodes if n is source or (n.target is _PAD and n.args[0] is source))
    new = source
    if any(shift):
        with gm.graph.inserting_before(reader):
            new = gm.graph.call_function(_PAD, (source, [q for size in shift[::-1] for q in (size, size)], 0.0))
    reader.replace_input_with(old, new)
    return [] if old is source else [old]


def _emit(
    gm: fx.GraphModule, region: Region, units: Sequence[Run | Block], x: fx.Node, tensors: dict[str, np.ndarray]
) -> fx.Node:
    for unit in units:
        if isinstance(unit, Run):
            x = _emit_run(gm, region, unit, x, tensors)
        else:
            side = x
            if unit.span.shortcut is not None:
                side = _emit_run(gm, region, Run((unit.span.shortcut,)), x, tensors)
            branch = _emit(gm, region, unit.units, x, tensors)
            x = gm.graph.call_function(torch.ops.aten.add.Tensor, (branch, side))
    return x


def _emit_run(gm: fx.GraphModule, region: Region, run: Run, x: fx.Node, tensors: dict[str, np.ndarray]) -> fx.Node:
    conv = compose_run(run, tensors)
    name = layers_of(run.parts)[-1].weight
    bias, state = bias_name(name), gm.state_dict(keep_vars=True)
    if bias in state and bias not in region.tensors:
        raise SluiceError(f"cannot merge into {name!r}: its bias would take the name {bias!r}; rename that tensor")
    like = state[name]
    for key, value in ((name, conv.weight), (bias, conv.bias)):
        set_tensor(gm, key, torch.from_numpy(np.ascontiguousarray(value)).to(like), parameter=True)
    weights = (gm.graph.get_attr(name), gm.graph.get_attr(bias))
    ones = [1] * len(conv.stride)
    args = (x, *weights, list(conv.stride), list(conv.pad), ones, conv.groups)
    return gm.graph.call_function(_CONVS[len(conv.stride)].default, args)


def _clean(gm: fx.GraphModule, gone: Sequence[fx.Node], region: Region) -> None:
    """Erase the nodes that nothing reads any more, and the tensors that no node reads."""
    dead = set(gone)
    for node in reversed(list(gm.graph.nodes)):
        if node in dead and not node.users:
            dead.update(node.all_input_nodes)
            gm.graph.erase_node(node)
    remove_unread(gm, region.tensors)
    gm.meta.pop(MARK, None)  # as in `rewrite_torch`: shapes in node.meta are those of the dense model
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    gm.graph.lint()
    gm.recompile()
