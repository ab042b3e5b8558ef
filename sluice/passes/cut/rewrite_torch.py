"""Apply a plan to a captured graph: slice the named tensors, mend the literal sizes, then restructure.

1. Every `Slice` acts on the tensor of that name; operators that read the tensor follow from its shape.
2. Literal sizes belong to no named tensor. Where a node's labelled axis loses positions, its literals are rewritten:
   a reshape or expand target, a layer norm's shape, split sizes, slice bounds, the number of depthwise groups.
3. Drops, merges and factorizations act on the sliced graph, in this order.

The slim network computes what the closed network computes: removed channels and branches carry nothing, weights have
the rank of the plan (`sluice.passes.gates.gating`), merged runs are linear with all padding in front.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sluice.core.plan import Plan
from sluice.passes.cut.drop_torch import drop_torch
from sluice.passes.cut.factor_torch import factorize_torch
from sluice.passes.cut.merge_torch import linearize_torch, merge_torch
from sluice.passes.cut.resolve import masks_of_slices
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.aten_walk import arguments, operator_name
from sluice.passes.graph.capture import Inputs, capture, clone, mark_as_cut
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.names_torch import set_tensor

__all__ = ["merge_runs", "rewrite_captured", "rewrite_torch", "slice_tensors"]

_RESHAPES = {
    "view": "size",
    "reshape": "shape",
    "_unsafe_view": "size",
    "expand": "size",
    "broadcast_to": "size",
    "unflatten": "sizes",
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


def rewrite_captured(slim: fx.GraphModule, plan: Plan, *, merged: bool = True) -> None:
    """`rewrite_torch` of a captured network, in place."""
    plan.check_model({name: tuple(t.shape) for name, t in slim.state_dict().items()})
    analysis = analyze(slim, needed=False)
    keeps = masks_of_slices(analysis, plan.slices)
    mend_literals(slim, analysis, keeps)
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
    slim.graph.lint()
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
    by_name: dict[str, torch.Tensor] = {}
    for cut in plan.slices:
        tensor = by_name.get(cut.param, state[cut.param].detach())
        by_name[cut.param] = tensor.index_select(cut.axis, torch.tensor(cut.keep, device=tensor.device))
    for name, tensor in by_name.items():
        old = state[name]
        set_tensor(module, name, tensor.contiguous(), isinstance(old, nn.Parameter))
        for alias in (a for a in state if a not in by_name and state[a] is old):  # tied weights stay tied
            owner, leaf = module.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2]
            setattr(owner, leaf, module.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2]))


def mend_literals(gm: fx.GraphModule, analysis: Analysis, keeps: list[np.ndarray]) -> None:
    """Rewrite every literal size of a cut axis in ``gm.graph``."""

    def lost(node: Any) -> tuple[int, np.ndarray] | None:
        axis = analysis.values.get(node.name) if isinstance(node, fx.Node) else None
        mask = None if axis is None else axis.mask(keeps)
        return None if axis is None or mask is None or mask.all() else (axis.dim, mask)

    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name, a = operator_name(node), arguments(node)
        source: Any = node.args[0] if not isinstance(node.args[0], (list, tuple)) else None
        if name in _RESHAPES and (cut := lost(node)):
            sizes = list(a[_RESHAPES[name]])
            offset = (a["dim"] % len(analysis.shapes[source.name])) if name == "unflatten" else 0
            where = cut[0] - offset
            if 0 <= where < len(sizes) and sizes[where] != -1:
                sizes[where] = int(cut[1].sum())
                _set(node, _RESHAPES[name], sizes)
        elif name == "layer_norm" and (cut := lost(source)):
            sizes = list(a["normalized_shape"])
            where = cut[0] - (len(analysis.shapes[source.name]) - len(sizes))
            if where >= 0:
                sizes[where] = int(cut[1].sum())
                _set(node, "normalized_shape", sizes)
        elif name in ("chunk", "split", "split_with_sizes") and (cut := lost(source)):
            dim, mask = cut
            if a["dim"] % len(analysis.shapes[source.name]) == dim:
                _resplit(gm, node, dim, mask, analysis)
        elif name == "slice" and (cut := lost(source)):
            dim, mask = cut
            if a["dim"] % len(analysis.shapes[source.name]) == dim:
                start, stop, _ = slice(a["start"] or 0, a["end"]).indices(len(mask))
                node.args = (source, dim, int(mask[:start].sum()), int(mask[:stop].sum()))
        elif name == "narrow" and (cut := lost(source)):
            dim, mask = cut
            if a["dim"] % len(analysis.shapes[source.name]) == dim:
                start = a["start"] % len(mask)
                stop = start + a["length"]
                node.args = (source, dim, int(mask[:start].sum()), int(mask[start:stop].sum()))
        elif name == "roll" and (cut := lost(source)):
            dim, mask = cut
            rank = len(analysis.shapes[source.name])
            along = sum(s for s, d in zip(a["shifts"], a["dims"], strict=True) if d % rank == dim) % len(mask)
            shifts = [0 if d % rank == dim else s for s, d in zip(a["shifts"], a["dims"], strict=True)]
            node.args = (source, [*shifts, int(mask[len(mask) - along :].sum())], [*a["dims"], dim])
        elif name == "squeeze" and lost(source):  # an axis cut to one channel must not be squeezed away
            ones = [d for d, size in enumerate(analysis.shapes[source.name]) if size == 1]
            rank, dims = len(analysis.shapes[source.name]), a.get("dim", ones)
            dims = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
            node.target = torch.ops.aten.squeeze.dims
            node.args, node.kwargs = (source, [d for d in dims if d in ones]), {}
        elif name.startswith("conv") and a["groups"] > 1 and (cut := lost(source)):
            weight = analysis.shapes[node.args[1].name]
            if weight[1] == 1:  # depthwise: one group per channel of the input
                _set(node, "groups", a["groups"] * int(cut[1].sum()) // len(cut[1]))


def _resplit(gm: fx.GraphModule, node: fx.Node, dim: int, mask: np.ndarray, analysis: Analysis) -> None:
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
