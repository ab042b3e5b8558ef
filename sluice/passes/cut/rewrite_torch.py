"""Apply a plan to a captured graph: slice the named tensors, mend the literal sizes, then restructure.

1. Every `Slice` acts on the tensor of that name; operators that read the tensor follow from its shape.
2. Literal sizes belong to no named tensor. Where an axis of a node loses positions, its literals are rewritten: a
   reshape or expand target, a layer norm's shape, split sizes, slice bounds, the number of depthwise groups. The scale
   of attention stays that of the dense head.
3. Drops, merges and factorizations act on the sliced graph, in this order.

The slim network computes what the closed network computes: removed channels and branches carry nothing, weights have
the rank of the plan (`sluice.passes.gates.gating`), merged runs are linear with all padding in front.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sluice.core.algebra import bounds_of_kept
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.passes.cut.drop_torch import drop_torch
from sluice.passes.cut.factor_torch import factorize_torch
from sluice.passes.cut.merge_torch import linearize_torch, merge_torch
from sluice.passes.cut.resolve import masks_of_slices
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.aten_walk import arguments, operator_name, padding
from sluice.passes.graph.capture import Inputs, capture, clone, mark_as_cut
from sluice.passes.graph.groups import Analysis, ValueAxis
from sluice.passes.graph.names_torch import set_tensor

__all__ = ["merge_runs", "rewrite_captured", "rewrite_torch", "slice_tensors"]

KERNEL = 4  # elements
_SIZES = {  # the argument that holds the sizes of the result
    "view": "size",
    "reshape": "shape",
    "_unsafe_view": "size",
    "expand": "size",
    "broadcast_to": "size",
    "unflatten": "sizes",
    "zeros": "size",
    "ones": "size",
    "full": "size",
    "empty": "size",
    "new_zeros": "size",
    "new_ones": "size",
    "new_full": "size",
    "new_empty": "size",
}


def rewrite_torch(model: nn.Module, plan: Plan, example_inputs: Inputs, *, merged: bool = True) -> fx.GraphModule:
    """The slim network, trainable, with the dense model's parameter names.

    Args:
        merged: False leaves the runs that the plan merges as they are trained, linear but apart; `merge_runs` merges
            them later.
    Raises:
        SluiceError: the plan was made for another model or contradicts the graph.
    """
    slim = capture(model, example_inputs)
    rewrite_captured(slim, plan, merged=merged)
    return slim


def rewrite_captured(
    slim: fx.GraphModule, plan: Plan, *, merged: bool = True, analysis: Analysis | None = None
) -> None:
    """`rewrite_torch` of a captured network, in place.

    Args:
        analysis: of this network or of one that it is a clone of; without it the graph is read. The plan is held to it
            all the same.
    """
    shapes = {name: tuple(t.shape) for name, t in slim.state_dict(keep_vars=True).items()}
    plan.check_model(shapes)
    if analysis is None:
        analysis = analyze(slim, needed=False, dims=True)  # whatever a plan may cut
    assert analysis.tensors == shapes and analysis.shapes.keys() <= {node.name for node in slim.graph.nodes}
    keeps = masks_of_slices(analysis, plan.slices)
    changed = mend_literals(slim, analysis, keeps) or bool(plan.drops or plan.merges or plan.factorizations)
    slice_tensors(slim, plan)
    if plan.drops:
        drop_torch(slim, plan.drops)
    if plan.merges:
        linearize_torch(slim, plan.merges)
    if plan.merges and merged:
        merge_torch(slim, plan.merges)
    if plan.factorizations:
        factorize_torch(slim, plan.factorizations)
    mark_as_cut(slim)
    if changed:  # sliced weights alone leave the code as it is, and other sizes leave the graph as it is
        slim.recompile()


def merge_runs(slim: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The network that `rewrite_torch` left unmerged, merged, with its present weights; the same function."""
    if not plan.merges:
        return slim
    done = clone(slim)
    merge_torch(done, plan.merges)
    done.graph.lint()
    done.recompile()
    return done


def slice_tensors(module: nn.Module, plan: Plan) -> None:
    """Slice parameters and buffers in place, by name."""
    state = module.state_dict(keep_vars=True)
    kept: dict[tuple[int, torch.device], torch.Tensor] = {}  # the plan holds what it keeps
    cuts: dict[str, dict[int, torch.Tensor]] = {}
    for cut in sorted(plan.slices, key=lambda cut: cut.axis):
        if (key := (id(cut.keep), device := state[cut.param].device)) not in kept:
            kept[key] = torch.from_numpy(np.array(cut.keep)).to(device)
        cuts.setdefault(cut.param, {})[cut.axis] = kept[key]
    by_name = {name: _taken(state[name].detach(), along) for name, along in cuts.items()}
    names: dict[int, list[str]] = {}
    for name, old in state.items():
        names.setdefault(id(old), []).append(name)
    for name, tensor in by_name.items():
        old = state[name]
        set_tensor(module, name, tensor.contiguous(), isinstance(old, nn.Parameter))
        for alias in (a for a in names[id(old)] if a not in by_name):  # tied weights stay tied
            owner, leaf = module.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2]
            setattr(owner, leaf, module.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2]))


def _taken(tensor: torch.Tensor, along: dict[int, torch.Tensor]) -> torch.Tensor:
    """What is kept along these axes, which ascend: whole rows first, which are copied as they lie."""
    kernel = math.prod(tensor.shape[2:])
    if tuple(along) == (0, 1) and kernel >= KERNEL:  # both at once, since each copy moves a whole kernel
        outputs, inputs = along.values()
        taken = (outputs[:, None] * tensor.shape[1] + inputs).flatten()
        return tensor.reshape(-1, kernel).index_select(0, taken).reshape(len(outputs), len(inputs), *tensor.shape[2:])
    for axis, kept in along.items():
        tensor = tensor.index_select(axis, kept)
    return tensor


def mend_literals(gm: fx.GraphModule, analysis: Analysis, keeps: list[np.ndarray]) -> bool:
    """Rewrite every literal size of a cut axis in ``gm.graph``; True if there is one."""
    known: dict[int, dict[int, np.ndarray]] = {}  # axes of values are shared, and the analysis holds them
    changed = False

    def mask(axis: ValueAxis) -> dict[int, np.ndarray]:
        if id(axis) not in known:
            found = axis.mask(keeps)
            known[id(axis)] = {} if found.all() else {axis.dim: found}
        return known[id(axis)]

    def lost(node: Any) -> dict[int, np.ndarray]:
        """By axis what is kept of a value, for the axes that lose something."""
        axes = analysis.values.get(node.name, ()) if isinstance(node, fx.Node) else ()
        return {dim: kept for axis in axes for dim, kept in mask(axis).items()}

    for node in list(gm.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            before = node.target, node.args, node.kwargs
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            if operator_name(node) in _SIZES:
                _resize(node, source, lost(node), analysis)
            elif source is not None and "pad" in arguments(node) and (cut := lost(node)):
                _repad(node, source, cut, analysis)
            elif source is not None and (cut := lost(source)):
                _mend(node, source, cut, analysis)
            changed |= before != (node.target, node.args, node.kwargs)
    return changed


def _resize(node: fx.Node, source: fx.Node | None, cut: dict[int, np.ndarray], analysis: Analysis) -> None:
    """The literal sizes of an operator's result; one that holds the batch as well is left to be inferred."""
    name, a = operator_name(node), arguments(node)
    sizes = list(a[_SIZES[name]])
    offset = a["dim"] % len(analysis.shapes[source.name]) if name == "unflatten" and source is not None else 0
    for dim, mask in cut.items():
        where = dim - offset
        if 0 <= where < len(sizes) and sizes[where] != -1:
            sizes[where] = int(mask.sum()) if isinstance(sizes[where], int) else -1
    inferred = [] if name in ("expand", "broadcast_to") else [k for k, size in enumerate(sizes) if size == -1]
    for where in inferred if len(inferred) > 1 else ():  # as numbers, but for the one that holds the batch
        size = node.meta["val"].shape[where + offset]
        if isinstance(size, int):
            sizes[where] = int(cut[where + offset].sum()) if where + offset in cut else size
    if inferred and sizes.count(-1) > 1:
        raise SluiceError(
            f"{name} ({node.name}) to {tuple(a[_SIZES[name]])} has several sizes that follow from others; write all of "
            "them but one as numbers"
        )
    if cut:
        _set(node, _SIZES[name], sizes)


def _mend(node: fx.Node, source: fx.Node, cut: dict[int, np.ndarray], analysis: Analysis) -> None:
    """The literals of an operator whose first operand loses something."""
    name, a, shape = operator_name(node), arguments(node), analysis.shapes[source.name]
    rank = len(shape)
    along = a["dim"] % rank if isinstance(a.get("dim"), int) else None
    mask = cut.get(along) if along is not None else None
    if name in ("layer_norm", "rms_norm"):
        sizes = list(a["normalized_shape"])
        for dim, kept in cut.items():
            if dim >= rank - len(sizes):
                sizes[dim - rank + len(sizes)] = int(kept.sum())
        _set(node, "normalized_shape", sizes)
    elif name == "group_norm" and 1 in cut and a["num_groups"] == shape[1]:  # a group of its own for every channel
        _set(node, "num_groups", int(cut[1].sum()))
    elif name in ("chunk", "split", "split_with_sizes") and along is not None and mask is not None:
        _resplit(node, along, mask)
    elif name == "slice" and mask is not None:
        start, stop, step = slice(a["start"] or 0, a["end"], a["step"]).indices(len(mask))
        node.args, node.kwargs = (source, along, *bounds_of_kept(mask, start, stop, step), step), {}
    elif name == "narrow" and mask is not None:
        start = a["start"] % len(mask)
        stop = start + a["length"]
        node.args = (source, along, int(mask[:start].sum()), int(mask[start:stop].sum()))
    elif name == "roll":
        shifts, dims = list(a["shifts"]), [d % rank for d in a["dims"]]
        for dim, kept in cut.items():
            by = sum(s for s, d in zip(shifts, dims, strict=True) if d == dim) % len(kept)
            shifts = [0 if d == dim else s for s, d in zip(shifts, dims, strict=True)]
            shifts, dims = [*shifts, int(kept[len(kept) - by :].sum())], [*dims, dim]
        node.args = (source, shifts, dims)
    elif name == "squeeze":  # an axis cut to one channel must not be squeezed away
        ones = [d for d, size in enumerate(shape) if size == 1]
        given = a.get("dim", ones)
        given = [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
        node.target = torch.ops.aten.squeeze.dims
        node.args, node.kwargs = (source, [d for d in given if d in ones]), {}
    elif name.startswith("conv") and a["groups"] != 1:
        weight = analysis.shapes[a["weight"].name]
        channels = cut.get(rank - len(weight) + 1)
        if weight[1] == 1 and channels is not None:  # depthwise: one group per channel of the input
            _set(node, "groups", a["groups"] * int(channels.sum()) // len(channels))
    elif name == "scaled_dot_product_attention" and a.get("scale") is None and rank - 1 in cut:
        _set(node, "scale", 1.0 / math.sqrt(shape[-1]))  # that of the dense head


def _repad(node: fx.Node, source: fx.Node, cut: dict[int, np.ndarray], analysis: Analysis) -> None:
    """As many entries of the padding as readers still take."""
    a, shape = arguments(node), analysis.shapes[source.name]
    pads = list(a["pad"])
    for dim, (front, _) in padding(a, len(shape)).items():
        if dim in cut:
            mask, k = cut[dim], 2 * (len(shape) - 1 - dim)
            pads[k : k + 2] = [int(mask[:front].sum()), int(mask[front + shape[dim] :].sum())]
    _set(node, "pad", pads)


def _resplit(node: fx.Node, dim: int, mask: np.ndarray) -> None:
    sizes = [value.shape[dim] for value in node.meta["val"]]
    bounds = np.cumsum([0, *sizes])
    new = [int(mask[i:j].sum()) for i, j in itertools.pairwise(bounds)]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], new, dim), {}


def _set(node: fx.Node, argument: str, value: Any) -> None:
    names = [arg.name for arg in node.target._schema.arguments]  # type: ignore[union-attr]
    index = names.index(argument)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(argument, value)
