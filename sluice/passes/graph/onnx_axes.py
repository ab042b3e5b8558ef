"""The ONNX front end of the coupling rules: model -> `Analysis`; needs numpy and onnx, not torch.

The rules (`sluice.passes.graph.coupling`) and the table of operators (`sluice.passes.graph.operators`) are those for
``torch.fx``. Every initialiser is a named tensor. Values are analysed at one static batch with the shape arithmetic
folded, so that sizes are numbers. An operator with a size that stays open freezes its inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx

from sluice.passes.graph import onnx_layout as layout
from sluice.passes.graph import onnx_recurrent as recurrent
from sluice.passes.graph.channels import find_groups
from sluice.passes.graph.coupling import Value, fixed, matmul_letters
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.onnx_walk import Attributes, Node, OnnxRule, OnnxWalk, entry, open_size, unknown
from sluice.passes.graph.operators import ONNX, onnx_operator
from sluice.passes.graph.static_shapes import stand_in_batch, static_sizes

__all__ = ["RULES", "analyze_onnx"]


def _conv(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    bias = w.operand(n.input[2]) if entry(n, 2) else None
    x, weight = w.operand(n.input[0]), w.operand(n.input[1])
    return w.coupling.convolve(x, weight, bias, a.get("group", 1), n.op_type == "ConvTranspose", n.input[1])


def _gemm(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, y = n.input[:2]
    left, right = "km" if a.get("transA") else "mk", "nk" if a.get("transB") else "kn"
    factors = [(*w.operand(x), left, x in w.weights), (*w.operand(y), right, y in w.weights)]
    out = w.coupling.contract(factors, "mn", y)
    if entry(n, 2):
        return w.coupling.combine([(out, w.shape[n.output[0]]), w.operand(n.input[2])], 2, y)
    return out


def _matmul(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, y = n.input
    left, right, out = matmul_letters(len(w.shape[x]), len(w.shape[y]))
    factors = [(*w.operand(x), left, x in w.weights), (*w.operand(y), right, y in w.weights)]
    return w.coupling.contract(factors, out, y)


def _einsum(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    equation = a["equation"]
    equation = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        return unknown(w, n, a)
    factors = [(*w.operand(i), term, i in w.weights) for i, term in zip(n.input, terms, strict=True)]
    return w.coupling.contract(factors, out, next((i for i in n.input if i in w.weights), n.name))


def _per_channel(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, vectors = w.operand(n.input[0]), w.operands(n.input[1:])
    if n.op_type == "InstanceNormalization" and any(x[0][2:]):
        return x[0]  # the inner part of a decomposed group norm: the affine has one entry per group
    return w.coupling.per_channel(x, 1, vectors, n.name)


def _layer_norm(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    first = a.get("axis", -1) % len(w.shape[n.input[0]])
    return w.coupling.layer_norm(w.operand(n.input[0]), first, w.operands(n.input[1:]), n.name)


def _combine(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.combine(w.operands(n.input), len(w.shape[n.output[0]]), n.name)


def _unary(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.of(n.input[0])


def _reduced(w: OnnxWalk, n: Node, a: Attributes) -> list[int]:
    rank = len(w.shape[n.input[0]])
    return a.get("axes") or (w.ints(entry(n, 1)) if entry(n, 1) else None) or list(range(rank))


def _reduce(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.reduce(w.of(n.input[0]), _reduced(w, n, a), bool(a.get("keepdims", 1)), n.name)


def _statistic(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    if n.op_type == "ReduceMean":
        w.coupling.unbiased(w.operand(n.input[0]), _reduced(w, n, a), _correction(w, n, a), n.name)
    return w.coupling.statistic(w.of(n.input[0]), _reduced(w, n, a), bool(a.get("keepdims", 1)))


def _correction(w: OnnxWalk, n: Node, a: Attributes) -> float:
    """Of a variance that is written ``mean * n / (n - c)``, with n the number of entries that the mean is of: c."""
    entries = math.prod(w.shape[n.input[0]][d] for d in _reduced(w, n, a))
    for times in w.graph.readers.get(n.output[0], ()):
        if times.op_type == "Mul" and w.graph.scalar(times.input[1]) == entries:
            for over in w.graph.readers.get(times.output[0], ()):
                if over.op_type == "Div" and (by := w.graph.scalar(over.input[1])) is not None:
                    return entries - by
    return 0.0


def _spatial(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    if n.op_type == "GlobalAveragePool":  # a mean over whatever stands there
        return w.coupling.statistic(w.of(n.input[0]), range(2, len(w.shape[n.input[0]])), True)
    dims = range(2, len(w.shape[n.input[0]]))
    if "kernel_shape" in a and a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
        kernels, rank = a["kernel_shape"], len(dims)  # an axis of windows of one entry each passes as it is
        strides, pads = a.get("strides") or [1] * rank, a.get("pads") or [0] * 2 * rank
        windows = zip(dims, kernels, strides, pads[:rank], pads[rank:], strict=True)
        return w.coupling.beside(w.of(n.input[0]), [d for d, *one in windows if one != [1, 1, 0, 0]], n.name)
    return w.coupling.beside(w.of(n.input[0]), dims, n.name)


def _along(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.along(w.of(n.input[0]), a.get("axis", -1) % len(w.shape[n.input[0]]), n.name)


def _arg(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.reduce(w.of(n.input[0]), [a.get("axis", 0)], bool(a.get("keepdims", 1)), n.name)


def _top(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    found = w.coupling.beside(w.of(n.input[0]), [a.get("axis", -1) % len(w.shape[n.input[0]])], n.name)
    w.value.update((name, found) for name in n.output if name)
    return found


def _trilu(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    rank = len(w.shape[n.input[0]])
    return w.coupling.beside(w.of(n.input[0]), (rank - 2, rank - 1), n.name)


def _grid_sample(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    w.coupling.unknown([w.of(n.input[1])], f"{n.name} reads it as positions")
    return w.coupling.beside(w.of(n.input[0]), range(2, len(w.shape[n.input[0]])), n.name)


def _fixed(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return fixed(w.shape.get(n.output[0], ()))


# The rule of every kind of `sluice.passes.graph.operators`.
KINDS: dict[str, OnnxRule] = {
    "unary": _unary,
    "combine": _combine,
    "prelu": _combine,
    "conv": _conv,
    "linear": _gemm,
    "matmul": _matmul,
    "einsum": _einsum,
    "sdpa": recurrent.attention,
    "lstm": recurrent.recurrent,
    "batch_norm": _per_channel,
    "instance_norm": _per_channel,
    "lp_norm": _unary,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "spatial": _spatial,
    "pad": layout.pad,
    "reduce": _reduce,
    "statistic": _statistic,
    "along": _along,
    "arg": _arg,
    "top": _top,
    "trilu": _trilu,
    "grid_sample": _grid_sample,
    "fixed": _fixed,
    "full": layout.full,
    "reshape": layout.reshape,
    "permute": layout.transpose,
    "expand": layout.expand,
    "repeat": layout.tile,
    "cat": layout.concat,
    "split": layout.split,
    "slice": layout.slice_,
    "select": layout.gather,
    "index": layout.gather_nd,
    "pixel_shuffle": layout.depth_to_space,
    "pixel_unshuffle": layout.space_to_depth,
}
RULES: dict[str, OnnxRule] = {name: KINDS[row.kind] for name, row in ONNX.items() if row.kind in KINDS}


def analyze_onnx(model: onnx.ModelProto, exclude: Sequence[str] = (), *, dims: bool = False) -> Analysis:
    """Read an ONNX graph: groups, what is frozen and why, the labelled axes of every value.

    Args:
        dims: the dimensions of attention heads are groups as well.
    Raises:
        SluiceError: a size cannot be inferred.
    """
    batch = stand_in_batch(model)
    static = static_sizes(model, batch or 1)
    w = OnnxWalk(static, OnnxGraph(static), batch)
    for node in static.graph.node:
        rule = KINDS.get(onnx_operator(node.op_type, node.domain).kind, unknown)
        if rule is not _fixed and any(name not in w.shape for name in (*node.input, *node.output) if name):
            rule = open_size if rule is not unknown else unknown
        if node.input and all(name in w.weights for name in node.input if name):
            w.weights.update(node.output)
        value = rule(w, node, attributes(node))
        w.value.setdefault(node.output[0], value)
    for out in static.graph.output:
        w.coupling.unknown([w.of(out.name)], "is an output of the model")
    w.coupling.settle(dims)
    return replace(leave_out(find_groups(w.coupling, w.value, w.shape), exclude), batch=batch, dims=dims)
