"""The ATen front end of the coupling rules: captured ``torch.fx`` graph -> `Analysis`.

The table of operators (`sluice.passes.graph.operators`) gives every operator its kind, `KINDS` every kind its rule. An
in-place variant has the rule of its base. An operator without a rule freezes its inputs, with its name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sluice.passes.graph import aten_layout as layout
from sluice.passes.graph.aten_walk import (
    Args,
    OperatorRule,
    Walk,
    arguments,
    operator_name,
    static_shape,
    unknown,
    where,
)
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.coupling import Axis
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.groups import Analysis, check_cuttable, find_groups
from sluice.passes.graph.operators import ATEN

__all__ = ["RULES", "analyze"]


def _conv(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    transposed = "transpose" in operator_name(n)
    out, into = (1, 0) if transposed else (0, 1)
    rank = len(w.size(a["input"]))
    dim = rank - len(w.size(a["weight"])) + 1
    bias = w.tensor(a["bias"])
    return w.coupling.contract(
        w.of(a["input"]), dim, rank, w.tensor(a["weight"]), out, into, bias, a["groups"], where(n, a["weight"])
    )


def _linear(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["input"]))
    bias = w.tensor(a.get("bias"))
    return w.coupling.contract(
        w.of(a["input"]), rank - 1, rank, w.tensor(a["weight"]), 0, 1, bias, 1, where(n, a["weight"])
    )


def _addmm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.contract(
        w.of(a["mat1"]), 1, 2, w.tensor(a["mat2"]), 1, 0, w.tensor(a["self"]), 1, where(n, a["mat2"])
    )


def _matmul(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, weight = a["self"], a.get("other", a.get("mat2"))
    if w.tensor(weight) is None or len(w.size(weight)) != 2:
        return unknown(w, n, a)
    rank = len(w.size(x))
    return w.coupling.contract(w.of(x), rank - 1, rank, w.tensor(weight), 1, 0, None, 1, where(n, weight))


def _computed(w: Walk, tensors: Sequence[Any]) -> bool:
    """Is one of the tensors of a norm neither absent nor a named tensor?"""
    return any(t is not None and w.tensor(t) is None for t in tensors)


def _instance_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    tensors = [a[k] for k in ("weight", "bias", "running_mean", "running_var")]
    if _computed(w, tensors):
        return unknown(w, n, a)
    return w.coupling.per_channel(w.of(a["input"]), 1, [w.tensor(t) for t in tensors], where(n))


def _group_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return unknown(w, n, a)
    names = [w.tensor(a["weight"]), w.tensor(a["bias"])]
    return w.coupling.group_norm(w.of(a["input"]), 1, a["num_groups"], names, where(n))


def _layer_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return unknown(w, n, a)
    first = len(w.size(a["input"])) - len(a["normalized_shape"])
    return w.coupling.layer_norm(w.of(a["input"]), first, [w.tensor(a["weight"]), w.tensor(a["bias"])], where(n))


def _combine(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    operands = [(w.of(v), w.size(v), w.tensor(v)) for v in n.all_input_nodes if w.shape.get(v.name) is not None]
    return w.coupling.combine(operands, w.size(n), where(n))


def _unary(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.of(n.args[0])


def _prelu(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x = w.of(a["self"])
    if x is not None and w.size(a["weight"]) not in ((1,), ()):
        if _computed(w, [a["weight"]]):
            return unknown(w, n, a)
        return w.coupling.per_channel(x, 1, [w.tensor(a["weight"])], where(n))
    return x


def _reduce(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["self"]))
    dims = a.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else dims if isinstance(dims, Sequence) else [dims]
    axis = w.coupling.reduce(w.of(a["self"]), dims, rank, bool(a.get("keepdim", False)), where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):  # max and min with their positions
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _spatial(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    spatial_axes = next(int(c) for c in operator_name(n) if c.isdigit())
    axis = w.coupling.spatial(w.of(n.args[0]), len(w.size(n.args[0])) - spatial_axes, where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _pad(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank, pads = len(w.size(a["self"])), a["pad"] if "pad" in a else a["padding"]
    return w.coupling.spatial(w.of(a["self"]), rank - len(pads) // 2, where(n))


def _along(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.along(w.of(a["self"]), a["dim"] % len(w.size(a["self"])), where(n))


def _fixed(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return None


# The rule of every kind of `sluice.passes.graph.operators`.
KINDS: dict[str, OperatorRule] = {
    "unary": _unary,
    "combine": _combine,
    "prelu": _prelu,
    "conv": _conv,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "spatial": _spatial,
    "pad": _pad,
    "reduce": _reduce,
    "along": _along,
    "fixed": _fixed,
    "reshape": layout.reshape,
    "permute": layout.permute,
    "expand": layout.expand,
    "like": layout.like,
    "cat": layout.cat,
    "split": layout.split,
    "slice": layout.slice_,
    "narrow": layout.narrow,
    "select": layout.select,
    "glu": layout.glu,
    "roll": layout.roll,
    "flip": layout.flip,
    "pixel_shuffle": layout.pixel_shuffle,
    "pixel_unshuffle": layout.pixel_unshuffle,
    "channel_shuffle": layout.channel_shuffle,
    "index_select": layout.index_select,
}
RULES: dict[str, OperatorRule] = {name: KINDS[row.kind] for name, row in ATEN.items() if row.kind in KINDS}


def analyze(gm: fx.GraphModule, exclude: Sequence[str] = (), *, needed: bool = True) -> Analysis:
    """Read a captured graph: groups, what is frozen and why, the labelled axis of every node.

    Args:
        needed: False for a network whose widths may all be fixed, since ranks, blocks or merges are edited instead.
    Raises:
        SluiceError: no width can be cut, and one is needed.
    """
    w = Walk(gm)
    modules = dict(gm.named_modules())
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            w.shape[node.name] = static_shape(value)
        if node.op == "get_attr":
            w.axis[node.name] = w.vector(node)
        elif node.op == "call_function":
            if node.target is operator.getitem:
                w.axis[node.name] = layout.getitem(w, node, {})
            elif isinstance(node.target, torch._ops.OpOverload):
                rule = RULES.get(operator_name(node), unknown)
                w.axis[node.name] = rule(w, node, arguments(node))
            elif any(w.of(v) is not None for v in node.all_input_nodes):
                unknown(w, node, {})
        elif node.op == "call_module":
            x = node.args[0]
            w.axis[node.name] = w.of(x)
            if isinstance(modules[node.target], BatchNorm):
                own = [f"{node.target}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
                names = [name for name in own if name in w.coupling.tensors]
                w.axis[node.name] = w.coupling.per_channel(w.of(x), 1, names, str(node.target))
        elif node.op == "output":
            w.coupling.unknown([w.of(v) for v in node.all_input_nodes], "is an output of the model")
    analysis = leave_out(find_groups(w.coupling, w.axis, w.shape), exclude)
    if needed:
        check_cuttable(analysis)
    return analysis
