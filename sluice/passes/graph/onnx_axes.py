"""The ONNX front end of the coupling rules: model -> `Analysis`; needs numpy and onnx, not torch.

The rules (`sluice.passes.graph.coupling`) and the table of operators (`sluice.passes.graph.operators`) are those for
``torch.fx``. Every initialiser is a named tensor. Values are analysed at one static batch with the shape arithmetic
folded, so that sizes are numbers. An operator with a size that stays open freezes its inputs and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from sluice.passes.graph.coupling import Axis, Coupling, Shape
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.groups import Analysis, find_groups
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, is_whole_shape, reads
from sluice.passes.graph.operators import ONNX
from sluice.passes.graph.static_shapes import stand_in_batch, static_graph

__all__ = ["analyze_onnx"]

Node = onnx.NodeProto


class _Walk:
    def __init__(self, model: onnx.ModelProto, graph: OnnxGraph):
        self.constants = graph.literals
        self.coupling = Coupling({init.name: tuple(init.dims) for init in model.graph.initializer})
        self.whole_shape_of = {n.output[0]: n.input[0] for n in model.graph.node if is_whole_shape(n)}
        self.axis: dict[str, Axis | None] = {}
        self.alias: dict[str, tuple[str, tuple[int, ...]]] = {}  # transposed weights: value -> (tensor, order)
        self.shape: dict[str, Shape] = {name: tuple(init.dims) for name, init in graph.initializers.items()}
        self.shape |= graph.shapes

    def of(self, name: str) -> Axis | None:
        if name in self.coupling.tensors and name not in self.axis:
            long = [d for d, size in enumerate(self.shape[name]) if size > 1]
            self.axis[name] = Axis(long[0], self.coupling.param(name, long[0])) if len(long) == 1 else None
        return self.axis.get(name)

    def tensor(self, name: str) -> str | None:
        return name if name in self.coupling.tensors else None

    def weight(self, name: str) -> tuple[str | None, tuple[int, ...]]:
        """A named 2-D tensor, perhaps read through a transpose."""
        if name in self.alias:
            return self.alias[name]
        return (self.tensor(name), tuple(range(len(self.shape.get(name, ())))))

    def ints(self, name: str) -> list[int] | None:
        value = self.constants.get(name)
        return None if value is None else [int(v) for v in np.asarray(value).reshape(-1)]


OperatorRule = Callable[[_Walk, Node, dict[str, Any]], Axis | None]


def _input(n: Node, index: int) -> str:
    return n.input[index] if index < len(n.input) else ""


def _conv(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    rank = len(w.shape[n.input[0]])
    out, into = (1, 0) if n.op_type == "ConvTranspose" else (0, 1)
    return w.coupling.contract(
        w.of(n.input[0]),
        1,
        rank,
        w.tensor(n.input[1]),
        out,
        into,
        w.tensor(_input(n, 2)),
        a.get("group", 1),
        n.input[1],
    )


def _gemm(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    weight, order = w.weight(n.input[1])
    if a.get("transA") or weight is None or a.get("alpha", 1.0) != 1.0:
        return _unknown(w, n, a)
    out, into = (0, 1) if a.get("transB") else (1, 0)
    bias = w.tensor(_input(n, 2))
    return w.coupling.contract(w.of(n.input[0]), 1, 2, weight, order[out], order[into], bias, 1, weight)


def _matmul(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    weight, order = w.weight(n.input[1])
    if weight is None or len(order) != 2:
        return _unknown(w, n, a)
    rank = len(w.shape[n.input[0]])
    return w.coupling.contract(w.of(n.input[0]), rank - 1, rank, weight, order[1], order[0], None, 1, weight)


def _per_channel(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    names = [w.tensor(i) for i in n.input[1:]]
    x = w.of(n.input[0])
    if n.op_type == "InstanceNormalization" and x is not None and x.dim != 1:
        return x  # the inner part of a decomposed group norm: the affine has one entry per group
    if any(i and w.tensor(i) is None for i in n.input[1:]):
        return _unknown(w, n, a)
    return w.coupling.per_channel(x, 1, names, n.name)


def _layer_norm(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    first = a.get("axis", -1) % len(w.shape[n.input[0]])
    return w.coupling.layer_norm(w.of(n.input[0]), first, [w.tensor(i) for i in n.input[1:] if i], n.name)


def _combine(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    operands = [(w.of(i), w.shape[i], w.tensor(i)) for i in n.input if i in w.shape]
    return w.coupling.combine(operands, w.shape[n.output[0]], n.name)


def _unary(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return w.of(n.input[0])


def _concat(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return w.coupling.concat([(w.of(i), w.shape[i]) for i in n.input if i in w.shape], a["axis"], n.name)


def _split(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    x, start = w.of(n.input[0]), 0
    dim = a.get("axis", 0) % len(w.shape[n.input[0]])
    for out in n.output:
        stop = start + w.shape[out][dim]
        w.axis[out] = w.coupling.narrow(x, dim, start, stop, n.name)
        start = stop
    return w.axis[n.output[0]]


def _slice(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    x, shape = w.of(n.input[0]), w.shape[n.input[0]]
    if x is None:
        return None
    starts, ends = w.ints(n.input[1]), w.ints(n.input[2])
    axes = w.ints(_input(n, 3)) if _input(n, 3) else list(range(len(starts or [])))
    steps = w.ints(_input(n, 4)) if _input(n, 4) else [1] * len(starts or [])
    if axes is None or (x.dim in [d % len(shape) for d in axes] and (starts is None or ends is None or steps is None)):
        return _unknown(w, n, a)
    for start, end, dim, step in zip(starts or [], ends or [], axes, steps or [], strict=False):
        if dim % len(shape) == x.dim:
            if step == -1:
                w.coupling.freeze(x, f"{n.name} reverses the channels")
                return None
            if step != 1:
                return _unknown(w, n, a)
            i, j, _ = slice(start, end).indices(shape[x.dim])
            return w.coupling.narrow(x, x.dim, i, j, n.name)
    return x


def _reshape(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return w.coupling.reshape(w.of(n.input[0]), w.shape[n.input[0]], w.shape[n.output[0]], n.name)


def _transpose(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    rank = len(w.shape[n.input[0]])
    order = a.get("perm", list(range(rank))[::-1])
    if (name := w.tensor(n.input[0])) is not None and rank == 2:
        w.alias[n.output[0]] = (name, tuple(order))
    return w.coupling.permute(w.of(n.input[0]), order)


def _expand(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    x, before, after = w.of(n.input[0]), w.shape[n.input[0]], w.shape[n.output[0]]
    if n.input[1] in w.whole_shape_of and len(before) == before.count(1):  # zeros_like: cut as that value is
        return w.of(w.whole_shape_of[n.input[1]])
    if x is None:
        return None
    dim = x.dim + len(after) - len(before)
    return Axis(dim, x.atoms) if len(x.atoms) == after[dim] else _unknown(w, n, a)


def _gather(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    """A scalar selects one position, and the axis is gone; a list picks some of its positions."""
    x, (data, indices) = w.of(n.input[0]), (len(w.shape[name]) for name in n.input)
    dim = a.get("axis", 0) % data
    if indices > 1:
        return _unknown(w, n, a)
    if indices == 0:
        return w.coupling.reduce(x, [dim], data, False, n.name)
    return w.coupling.pick(x, dim, w.of(n.input[1]), n.name)


def _reduce(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    rank = len(w.shape[n.input[0]])
    axes = a.get("axes") or (w.ints(_input(n, 1)) if _input(n, 1) else None) or list(range(rank))
    return w.coupling.reduce(w.of(n.input[0]), axes, rank, bool(a.get("keepdims", 1)), n.name)


def _spatial(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return w.coupling.spatial(w.of(n.input[0]), 2, n.name)


def _pad(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    x, rank = w.of(n.input[0]), len(w.shape[n.input[0]])
    pads = w.ints(_input(n, 1))
    if x is None or (pads is not None and len(pads) == 2 * rank and not pads[x.dim] and not pads[x.dim + rank]):
        return x
    return _unknown(w, n, a)


def _along(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return w.coupling.along(w.of(n.input[0]), a.get("axis", -1) % len(w.shape[n.input[0]]), n.name)


def _depth_to_space(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    (b, c, h, v), r, x = w.shape[n.input[0]], a["blocksize"], w.of(n.input[0])
    if a.get("mode", b"DCR") in (b"CRD", "CRD"):
        x = w.coupling.tie_runs(x, c // r**2) if x is not None and x.dim == 1 else x
        inner, order = (b, c // r**2, r, r, h, v), [0, 1, 4, 2, 5, 3]
    else:
        inner, order = (b, r, r, c // r**2, h, v), [0, 3, 4, 1, 5, 2]
    return w.coupling.shuffle(x, (b, c, h, v), inner, order, w.shape[n.output[0]], n.name)


def _fixed(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    return None


def _unknown(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    w.coupling.unknown([w.of(i) for i in reads(n) if i], f"unknown operator {n.op_type} ({n.name})")
    return None


def _open(w: _Walk, n: Node, a: dict[str, Any]) -> Axis | None:
    """A size is not known even at a known batch: the values that the operator reads stay whole, and its weights."""
    reason = f"{n.name or n.output[0]} works on a size that is not known"
    w.coupling.unknown([w.of(i) for i in n.input if i], reason)
    for name in filter(w.tensor, n.input):
        for axis in range(len(w.coupling.tensors[name])):
            w.coupling.freeze(w.coupling.param(name, axis), reason)
        if len(w.coupling.tensors[name]) > 1 and (name, 0) not in w.coupling.producers:
            w.coupling.producers.append((name, 0))
    return None


# The rule of every kind of `sluice.passes.graph.operators`.
KINDS: dict[str, OperatorRule] = {
    "unary": _unary,
    "combine": _combine,
    "prelu": _combine,
    "conv": _conv,
    "linear": _gemm,
    "matmul": _matmul,
    "batch_norm": _per_channel,
    "instance_norm": _per_channel,
    "layer_norm": _layer_norm,
    "spatial": _spatial,
    "pad": _pad,
    "reduce": _reduce,
    "along": _along,
    "fixed": _fixed,
    "reshape": _reshape,
    "permute": _transpose,
    "expand": _expand,
    "cat": _concat,
    "split": _split,
    "slice": _slice,
    "select": _gather,
    "pixel_shuffle": _depth_to_space,
}
RULES: dict[str, OperatorRule] = {name: KINDS[row.kind] for name, row in ONNX.items() if row.kind in KINDS}


def analyze_onnx(model: onnx.ModelProto, exclude: Sequence[str] = ()) -> Analysis:
    """Read an ONNX graph: groups, what is frozen and why, the labelled axis of every value.

    Raises:
        SluiceError: a size cannot be inferred.
    """
    batch = stand_in_batch(model)
    static = static_graph(model, batch or 1)
    w = _Walk(model, OnnxGraph(static))
    for node in static.graph.node:
        rule = RULES.get(node.op_type, _unknown)
        if rule is not _fixed and any(name not in w.shape for name in (*node.input, *node.output) if name):
            rule = _open if rule is not _unknown else _unknown
        axis = rule(w, node, attributes(node))
        if rule is not _split:
            w.axis[node.output[0]] = axis
    for out in static.graph.output:
        w.coupling.freeze(w.of(out.name), "is an output of the model")
    return replace(leave_out(find_groups(w.coupling, w.axis, w.shape), exclude), batch=batch)
