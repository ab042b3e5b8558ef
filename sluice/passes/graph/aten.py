"""The ATen front end of the coupling rules: captured ``torch.fx`` graph -> `Analysis`.

The table of operators (`sluice.passes.graph.operators`) gives every operator its kind, `KINDS` every kind its rule. An
in-place variant has the rule of its base. An operator without a rule freezes its inputs, with its name as the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sluice.passes.graph import aten_attention as attention
from sluice.passes.graph import aten_layout as layout
from sluice.passes.graph import aten_recurrent as recurrent
from sluice.passes.graph.aten_walk import (
    Args,
    OperatorRule,
    Walk,
    arguments,
    correction_of,
    each_axis,
    factors_of,
    operator_name,
    padding,
    reduced,
    static_shape,
    unknown,
    where,
)
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.channels import find_groups
from sluice.passes.graph.coupling import Value, fixed, matmul_letters
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.groups import Analysis, check_cuttable
from sluice.passes.graph.operators import ATEN

__all__ = ["RULES", "analyze"]

LETTERS = "abcdefgh"


def _conv(w: Walk, n: fx.Node, a: Args) -> Value:
    x, weight = w.operand(a["input"]), w.operand(a["weight"])
    bias = w.operand(a["bias"]) if a["bias"] is not None else None
    if not isinstance(a["groups"], int):
        return unknown(w, n, a, f"{where(n)} has a weight of its own for every entry of the batch")
    transposed = "transpose" in operator_name(n)
    return w.coupling.convolve(x, weight, bias, a["groups"], transposed, where(n, a["weight"]))


def _linear(w: Walk, n: fx.Node, a: Args) -> Value:
    x, weight, lead = a["input"], a["weight"], LETTERS[: len(w.size(a["input"])) - 1]
    factors = [(*w.operand(x), f"{lead}i", w.is_weight(x)), (*w.operand(weight), "oi", w.is_weight(weight))]
    out = w.coupling.contract(factors, f"{lead}o", where(n, weight))
    return _shifted(w, out, n, a.get("bias"), where(n, weight))


def _addmm(w: Walk, n: fx.Node, a: Args) -> Value:
    x, y = factors_of(a)
    return _shifted(w, _product(w, n, x, y), n, a["self"], where(n, y))


def _matmul(w: Walk, n: fx.Node, a: Args) -> Value:
    return _product(w, n, n.args[0], n.args[1])


def _product(w: Walk, n: fx.Node, x: Any, y: Any) -> Value:
    left, right, out = matmul_letters(len(w.size(x)), len(w.size(y)))
    factors = [(*w.operand(x), left, w.is_weight(x)), (*w.operand(y), right, w.is_weight(y))]
    return w.coupling.contract(factors, out, where(n, y))


def _shifted(w: Walk, value: Value, n: fx.Node, bias: Any, name: str) -> Value:
    if bias is None:
        return value
    return w.coupling.combine([(value, w.size(n)), w.operand(bias)], len(value), name)


def _per_channel(w: Walk, n: fx.Node, a: Args) -> Value:
    vectors = w.operands([a[k] for k in ("weight", "bias", "running_mean", "running_var")])
    return w.coupling.per_channel(w.operand(a["input"]), 1, vectors, where(n))


def _group_norm(w: Walk, n: fx.Node, a: Args) -> Value:
    affine = w.operands([a["weight"], a["bias"]])
    return w.coupling.group_norm(w.operand(a["input"]), 1, a["num_groups"], affine, where(n))


def _layer_norm(w: Walk, n: fx.Node, a: Args) -> Value:
    first = len(w.size(a["input"])) - len(a["normalized_shape"])
    affine = w.operands([a["weight"], a.get("bias")])
    return w.coupling.layer_norm(w.operand(a["input"]), first, affine, where(n))


def _combine(w: Walk, n: fx.Node, a: Args) -> Value:
    tensors = [v for v in n.all_input_nodes if v.name in w.shape]
    return w.coupling.combine(w.operands(tensors), len(w.size(n)), where(n))


def _unary(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.of(n.args[0])


def _prelu(w: Walk, n: fx.Node, a: Args) -> Value:
    x, slope = w.operand(a["self"]), w.operand(a["weight"])
    if slope[1] in ((1,), ()):
        return x[0]
    return w.coupling.per_channel(x, 1, [slope], where(n))


def _reduce(w: Walk, n: fx.Node, a: Args) -> Value:
    if isinstance(a.get("other"), fx.Node):  # the larger of two values, no maximum over an axis
        return _combine(w, n, a)
    value = w.coupling.reduce(w.of(a["self"]), reduced(a, len(w.size(a["self"]))), bool(a.get("keepdim")), where(n))
    return _several(w, n, value)


def _statistic(w: Walk, n: fx.Node, a: Args) -> Value:
    x, order = w.of(a["self"]), a.get("ord", a.get("p", 2))
    dims = reduced(a, len(x))
    if order is not None and not (isinstance(order, (int, float)) and 0 < order < math.inf):
        return _reduce(w, n, a)
    if operator_name(n) in ("var", "std"):
        w.coupling.unbiased(w.operand(a["self"]), dims, correction_of(a), where(n))
    return w.coupling.statistic(x, dims, bool(a.get("keepdim")))


def _several(w: Walk, n: fx.Node, value: Value) -> Value:
    """The result, also where its positions come with it."""
    if isinstance(n.meta.get("val"), (tuple, list)):
        w.parts[n.name] = [value] * len(n.meta["val"])
        return ()
    return value


def _spatial(w: Walk, n: fx.Node, a: Args) -> Value:
    axes = next(int(c) for c in operator_name(n) if c.isdigit())
    rank, touched = len(w.size(n.args[0])), [True] * axes
    if "kernel_size" in a:  # an axis of windows of one entry each passes as it is
        kernels = each_axis(a["kernel_size"], axes)
        strides, pads = each_axis(a["stride"] or kernels, axes), each_axis(a["padding"], axes)
        touched = [window != (1, 1, 0) for window in zip(kernels, strides, pads, strict=True)]
    dims = [rank - axes + k for k in range(axes) if touched[k]]
    return _several(w, n, w.coupling.beside(w.of(n.args[0]), dims, where(n)))


def _pad(w: Walk, n: fx.Node, a: Args) -> Value:
    x, pads = w.of(a["self"]), padding(a, len(w.size(a["self"])))
    known = all(isinstance(size, int) and size >= 0 for pair in pads.values() for size in pair)
    if known and "padding" not in a and a.get("mode", "constant") == "constant":
        return w.coupling.pad(x, pads)
    return w.coupling.beside(x, pads, where(n))


def _along(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.coupling.along(w.of(a["self"]), a["dim"] % len(w.size(a["self"])), where(n))


def _fixed(w: Walk, n: fx.Node, a: Args) -> Value:
    return fixed(w.size(n))


# The rule of every kind of `sluice.passes.graph.operators`.
KINDS: dict[str, OperatorRule] = {
    "unary": _unary,
    "combine": _combine,
    "prelu": _prelu,
    "conv": _conv,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "embedding": attention.embedding,
    "sdpa": attention.sdpa,
    "einsum": attention.einsum,
    "lstm": recurrent.lstm,
    "cell": recurrent.cell,
    "instance_norm": _per_channel,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "spatial": _spatial,
    "pad": _pad,
    "reduce": _reduce,
    "statistic": _statistic,
    "along": _along,
    "fixed": _fixed,
    "full": layout.full,
    "stack": layout.stack,
    "unbind": layout.unbind,
    "reshape": layout.reshape,
    "permute": layout.permute,
    "expand": layout.expand,
    "repeat": layout.repeat,
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
    "index": layout.index,
    "index_select": layout.index_select,
}
RULES: dict[str, OperatorRule] = {name: KINDS[row.kind] for name, row in ATEN.items() if row.kind in KINDS}


def analyze(gm: fx.GraphModule, exclude: Sequence[str] = (), *, needed: bool = True, dims: bool = False) -> Analysis:
    """Read a captured graph: groups, what is frozen and why, the labelled axes of every node.

    Args:
        needed: False for a network whose widths may all be fixed, since ranks, blocks or merges are edited instead.
        dims: the dimensions of attention heads are groups as well.
    Raises:
        SluiceError: no width can be cut, and one is needed.
    """
    w = Walk(gm)
    modules = dict(gm.named_modules())
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            w.shape[node.name] = static_shape(value, w.batch)
        if node.op == "get_attr":
            w.weights.add(node.name)
            w.value[node.name] = w.parameter(node)
        elif node.op == "call_function":
            inputs = [v for v in node.all_input_nodes if v.name in w.shape or v.name in w.parts]
            if inputs and all(v.name in w.weights for v in inputs):
                w.weights.add(node.name)
            if node.target is operator.getitem:
                w.value[node.name] = layout.getitem(w, node, {})
            elif isinstance(node.target, torch._ops.OpOverload):
                rule = RULES.get(operator_name(node), unknown)
                w.value[node.name] = rule(w, node, arguments(node))
            else:
                unknown(w, node, {})
        elif node.op == "call_module" and node.args:
            x = node.args[0]
            w.value[node.name] = w.of(x)
            if isinstance(modules[node.target], BatchNorm):
                own = [f"{node.target}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
                vectors = [(w.coupling.value(v), w.coupling.tensors[v]) for v in own if v in w.coupling.tensors]
                w.value[node.name] = w.coupling.per_channel(w.operand(x), 1, vectors, str(node.target))
        elif node.op == "output":
            w.coupling.unknown([w.of(v) for v in node.all_input_nodes], "is an output of the model")
    w.coupling.settle(dims)
    analysis = replace(leave_out(find_groups(w.coupling, w.value, w.shape), exclude), dims=dims)
    if needed:
        check_cuttable(analysis)
    return analysis
