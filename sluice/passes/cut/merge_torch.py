"""Merges on a captured graph, in two steps with training in between.

1. `linearize_torch`: the inner activations and the removed convolutions go, and the padding of every run moves to its
   first layer (`sluice.passes.cut.merge_region`, rule 3). Convolutions, norms and shortcuts stay, as the
   over-parameterised form trains better. This changes the function, at the borders too, and training absorbs it.
2. `merge_torch`: every run becomes one convolution with bias, under the name of its last weight; batch norms fold in
   with their running statistics. Exact in eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.cut.merge_region import (
    FoldedBlock,
    MergeRegion,
    Run,
    bias_name,
    compose_run,
    find_region,
    layers_of,
    paddings,
    runs_of,
)
from sluice.passes.cut.unused_torch import remove_unused
from sluice.passes.graph.aten_walk import arguments, each_axis
from sluice.passes.graph.capture import mark_as_cut
from sluice.passes.graph.chains import Span
from sluice.passes.graph.chains_torch import activation_source, chains_torch
from sluice.passes.graph.names_torch import set_tensor

__all__ = ["linearize_torch", "merge_torch"]

_CONVS = {1: torch.ops.aten.conv1d, 2: torch.ops.aten.conv2d, 3: torch.ops.aten.conv3d}
_PAD = torch.ops.aten.constant_pad_nd.default


def linearize_torch(gm: fx.GraphModule, merges: Sequence[Merge]) -> None:
    """Bring a captured graph, in place, into the form that is trained before it is merged; a second call does nothing.

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
        for node in (nodes[value] for value in region.acts):
            node.replace_all_uses_with(activation_source(node))
            gone.append(node)
        values = [*(v.value for v in removed), *(v.norm.value for v in removed if v.norm)]
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


def _set_padding(node: fx.Node, pad: tuple[int, ...]) -> None:
    a = arguments(node)
    axes = len(pad)
    node.target = _CONVS[axes].default
    stride, dilation = each_axis(a["stride"], axes), each_axis(a["dilation"], axes)
    node.args = (a["input"], a["weight"], a["bias"], list(stride), list(pad), list(dilation), a["groups"])
    node.kwargs = {}


def _set_shift(gm: fx.GraphModule, nodes: dict[str, fx.Node], span: Span, shift: tuple[int, ...]) -> list[fx.Node]:
    """Put zeros around the shortcut's input, or cut a border off (negative); returns the nodes that did so before."""
    source, reader = nodes[span.source], nodes[span.shortcut.value if span.shortcut else span.add]
    old = next(n for n in reader.all_input_nodes if n is source or (n.target is _PAD and n.args[0] is source))
    new = source
    if any(shift):
        with gm.graph.inserting_before(reader):
            new = gm.graph.call_function(_PAD, (source, [q for size in shift[::-1] for q in (size, size)], 0.0))
    reader.replace_input_with(old, new)
    return [] if old is source else [old]


def _emit(
    gm: fx.GraphModule,
    region: MergeRegion,
    units: Sequence[Run | FoldedBlock],
    x: fx.Node,
    tensors: dict[str, np.ndarray],
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


def _emit_run(gm: fx.GraphModule, region: MergeRegion, run: Run, x: fx.Node, tensors: dict[str, np.ndarray]) -> fx.Node:
    conv = compose_run(run, tensors)
    name = layers_of(run.parts)[-1].weight
    bias, state = bias_name(name), gm.state_dict(keep_vars=True)
    if bias in state and bias not in region.tensors:
        raise SluiceError(f"cannot merge into {name!r}: its bias would take the name {bias!r}; rename that tensor")
    like = state[name]
    for key, value in ((name, conv.weight), (bias, conv.bias)):
        set_tensor(gm, key, torch.from_numpy(np.array(value, order="C")).to(like), parameter=True)
    weights = (gm.graph.get_attr(name), gm.graph.get_attr(bias))
    ones = [1] * len(conv.stride)
    args = (x, *weights, list(conv.stride), list(conv.pad), ones, conv.groups)
    return gm.graph.call_function(_CONVS[len(conv.stride)].default, args)


def _clean(gm: fx.GraphModule, gone: Sequence[fx.Node], region: MergeRegion) -> None:
    """Erase the nodes that nothing reads any more, and the tensors that no node reads."""
    dead = set(gone)
    for node in reversed(list(gm.graph.nodes)):
        if node in dead and not node.users:
            dead.update(node.all_input_nodes)
            gm.graph.erase_node(node)
    remove_unused(gm, region.tensors)
    mark_as_cut(gm)
    gm.graph.lint()
    gm.recompile()
