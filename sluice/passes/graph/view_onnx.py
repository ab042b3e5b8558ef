"""The dataflow view of an ONNX graph; needs onnx and numpy, not torch.

Weights keep their names through transposes, casts and reshapes; a linear layer is a MatMul with a weight, whose bias is
a sum of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence

import onnx
from onnx import numpy_helper

from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, is_hollow, reads
from sluice.passes.graph.operators import Operator, onnx_operator
from sluice.passes.graph.static_shapes import stand_in_batch, static_sizes
from sluice.passes.graph.view import GraphView, Node

__all__ = ["view_onnx"]

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def view_onnx(model: onnx.ModelProto, named: Container[str] | None = None, shapes: bool = True) -> GraphView:
    """The graph as `sluice.passes.graph.blocks` reads it.

    Args:
        named: the tensors of the model. Without it: every floating-point initialiser but those that exporters make,
            which have no module path and are called ``val_*`` or hold a single number.
        shapes: infer the shape of every value; not needed where a plan says what to drop.
    Raises:
        SluiceError: shapes are asked for and the graph is not well typed.
    """
    graph = OnnxGraph(model)
    reader = _Reader(graph, named)
    nodes = tuple(reader.node(node) for node in model.graph.node)
    bodies = {name for node in model.graph.node for name in set(reads(node)) - set(node.input)}
    sizes = OnnxGraph(static_sizes(model, stand_in_batch(model) or 1)).shapes if shapes else {}
    return GraphView(nodes, frozenset(bodies | graph.outputs.keys()), frozenset(reader.derived), sizes)


class _Reader:
    """State of one walk: which values are derived, and which of those are a named tensor in another layout."""

    def __init__(self, graph: OnnxGraph, named: Container[str] | None):
        self.graph, initializers = graph, graph.initializers
        self.tensors = {
            name
            for name, init in initializers.items()
            if init.data_type in _FLOATS and (_is_named(init) if named is None else name.partition("::")[0] in named)
        }
        self.alias = {name: name for name in self.tensors}
        constants = [init for name, init in initializers.items() if name not in self.tensors]
        self.zeros = {i.name for i in constants if i.data_type in _FLOATS and _is_zero(i)}
        self.derived = set(initializers)
        self.scalars = {n: numpy_helper.to_array(i) for n, i in initializers.items() if math.prod(i.dims) == 1}

    def node(self, n: onnx.NodeProto) -> Node:
        op, read = n.op_type, [name for name in reads(n) if name]
        row = onnx_operator(op, n.domain)
        array = self.graph.array(n.output[0]) if op == "Constant" else None
        if array is not None and array.size == 1 and array.dtype.kind in "fiu":
            self.scalars[n.output[0]] = array
        if op == "Shape" or all(name in self.derived for name in read):
            self.derived.update(n.output)
        if row.is_a("layout") and n.input[0] in self.alias:
            self.alias[n.output[0]] = self.alias[n.input[0]]
        if op in ("Cast", "CastLike", "Identity") and n.input[0] in self.scalars:
            self.scalars[n.output[0]] = self.scalars[n.input[0]]
        active = [name for name in read if name not in self.derived]
        residual = op == "Add" and len(active) == 2 and active[0] != active[1]
        kind, closes = self._kind(n, row, active)
        return Node(
            op,
            kind,
            tuple(name for name in n.output if name),
            tuple(name for name in read if name not in self.tensors),
            tuple(dict.fromkeys(self.alias[name] for name in read if name in self.alias)),
            closes,
            self._bounds(n, row),
            residual,
        )

    def _kind(self, n: onnx.NodeProto, row: Operator, active: Sequence[str]) -> tuple[str, tuple[str, ...] | None]:
        first = n.input[0] if n.input else ""
        if row.zero in ("sum", "mul", "choice"):
            operands = n.input[1:] if row.zero == "choice" else n.input
            return row.zero, self._aliases([v for v in operands if v not in active])
        if row.weights and len(active) == 1 and (row.kind != "matmul" or self._is_weight(n)):
            return "weighted", self._aliases([v for v in n.input if v not in active])
        if row.is_a("norm"):
            return "norm", self._aliases([v for v in n.input[1:3] if v]) if len(n.input) > 1 else None
        return ("zero" if first in active and self._keeps_zero(n, row) else "other"), None

    def _keeps_zero(self, n: onnx.NodeProto, row: Operator) -> bool:
        if row.limits is not None:
            bounds = self._bounds(n, row)
            return bounds is not None and bounds[0] <= 0.0 <= bounds[1]
        if row.kind == "pad":
            mode = attributes(n).get("mode", b"constant")
            return mode != b"constant" or len(n.input) < 3 or not n.input[2] or self._number(n.input[2]) == 0.0
        if row.zero == "number":  # an exponent
            exponent = self._number(n.input[1])
            return exponent is not None and exponent > 0.0
        return row.zero == "zero"

    def _is_weight(self, n: onnx.NodeProto) -> bool:
        return any(v in self.alias for v in n.input)

    def _aliases(self, values: Sequence[str]) -> tuple[str, ...] | None:
        """The named tensors that these values are; None if one of them is not. An exporter's zero bias is none."""
        given = [v for v in values if v and v not in self.zeros]
        return tuple(self.alias[v] for v in given) if all(v in self.alias for v in given) else None

    def _number(self, name: str) -> float | None:
        value = self.scalars.get(name)
        return None if value is None else float(value.reshape(-1)[0])

    def _bounds(self, n: onnx.NodeProto, row: Operator) -> tuple[float, float] | None:
        if row.limits is None:
            return None
        found: list[float] = []
        for index, (limit, default) in enumerate(zip(row.limits, (-math.inf, math.inf), strict=True), 1):
            if isinstance(limit, str):  # an input, an attribute in old opsets
                given = n.input[index] if len(n.input) > index else ""
                number = self._number(given) if given else float(attributes(n).get(limit, default))
            else:
                number = limit
            if number is None:
                return None
            found.append(number)
        return found[0], found[1]


def _is_zero(init: onnx.TensorProto) -> bool:
    return not is_hollow(init) and not numpy_helper.to_array(init).any()


def _is_named(init: onnx.TensorProto) -> bool:
    return "." in init.name or not (re.fullmatch(r"val_\d+", init.name) or math.prod(init.dims) == 1)
