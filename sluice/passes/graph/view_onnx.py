"""The dataflow view of an ONNX graph; needs onnx and numpy, not torch.

Weights keep their names through transposes, casts and reshapes; a linear layer is a MatMul with a weight, whose bias is
a sum of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.passes.graph.coupling import Shape
from sluice.passes.graph.onnx_graph import BATCH, attributes, with_batch
from sluice.passes.graph.view import GraphView, Node

__all__ = ["view_onnx"]

_LAYOUTS = "Identity Transpose Reshape Flatten Squeeze Unsqueeze Cast CastLike Expand Tile"


_ZEROS = """Relu LeakyRelu PRelu Elu Selu Celu Gelu Swish HardSwish Mish Tanh Softsign Neg Abs Sqrt Sign Erf Sin Floor
    Ceil Round Dropout Slice Split Gather DepthToSpace SpaceToDepth MaxPool AveragePool LpPool GlobalAveragePool
    GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare Resize Upsample Div"""


_NORM_TYPES = """BatchNormalization InstanceNormalization LayerNormalization GroupNormalization RMSNormalization
    SimplifiedLayerNormalization"""


_LAYOUT = frozenset(_LAYOUTS.split())


_ZERO = _LAYOUT | frozenset(_ZEROS.split())


_NORMS = frozenset(_NORM_TYPES.split())


_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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
    reader = _Reader(model, named)
    nodes = tuple(reader.node(node) for node in model.graph.node)
    bodies = {name for node in model.graph.node for name in set(_reads(node)) - set(node.input)}
    outputs = frozenset(bodies | {info.name for info in model.graph.output})
    return GraphView(nodes, outputs, frozenset(reader.derived), _shapes(model) if shapes else {})


class _Reader:
    """State of one walk: which values are derived, and which of those are a named tensor in another layout."""

    def __init__(self, model: onnx.ModelProto, named: Container[str] | None):
        initializers = {init.name: init for init in model.graph.initializer}
        self.tensors = {
            name
            for name, init in initializers.items()
            if init.data_type in _FLOATS and (_is_named(init) if named is None else name.partition("::")[0] in named)
        }
        self.alias = {name: name for name in self.tensors}
        constants = [init for name, init in initializers.items() if name not in self.tensors]
        self.zeros = {i.name for i in constants if i.data_type in _FLOATS and not numpy_helper.to_array(i).any()}
        self.derived = set(initializers)
        self.scalars = {n: numpy_helper.to_array(i) for n, i in initializers.items() if math.prod(i.dims) == 1}

    def node(self, n: onnx.NodeProto) -> Node:
        op, reads = n.op_type, [name for name in _reads(n) if name]
        if op == "Constant":
            value = next(iter(attributes(n).values()))
            array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
            if array.size == 1 and array.dtype.kind in "fiu":
                self.scalars[n.output[0]] = array
        if op == "Shape" or all(name in self.derived for name in reads):
            self.derived.update(n.output)
        if op in _LAYOUT and n.input[0] in self.alias:
            self.alias[n.output[0]] = self.alias[n.input[0]]
        if op in ("Cast", "CastLike", "Identity") and n.input[0] in self.scalars:
            self.scalars[n.output[0]] = self.scalars[n.input[0]]
        active = [name for name in reads if name not in self.derived]
        residual = op == "Add" and len(active) == 2 and active[0] != active[1]
        kind, closes = self._kind(n, active)
        return Node(
            op,
            kind,
            tuple(name for name in n.output if name),
            tuple(name for name in reads if name not in self.tensors),
            tuple(dict.fromkeys(self.alias[name] for name in reads if name in self.alias)),
            closes,
            self._bounds(n),
            residual,
        )

    def _kind(self, n: onnx.NodeProto, active: Sequence[str]) -> tuple[str, tuple[str, ...] | None]:
        op, first = n.op_type, n.input[0] if n.input else ""
        if op in ("Add", "Sub", "Concat", "Sum"):
            return "sum", self._aliases([v for v in n.input if v not in active])
        if op == "Mul":
            return "mul", self._aliases([v for v in n.input if v not in active])
        if op in _WEIGHTED and len(active) == 1 and (op != "MatMul" or self._is_weight(n)):
            return "weighted", self._aliases([v for v in n.input if v not in active])
        if op in _NORMS:
            return "norm", self._aliases([v for v in n.input[1:3] if v]) if len(n.input) > 1 else None
        if first not in active:
            return "other", None
        bounds = self._bounds(n)
        if bounds is not None:
            return ("zero" if bounds[0] <= 0.0 <= bounds[1] else "other"), None
        if op == "Pad":
            mode = attributes(n).get("mode", b"constant")
            filled = len(n.input) > 2 and n.input[2] and self._number(n.input[2]) != 0.0
            return ("other" if mode == b"constant" and filled else "zero"), None
        return ("zero" if op in _ZERO else "other"), None

    def _is_weight(self, n: onnx.NodeProto) -> bool:
        return any(v in self.alias for v in n.input)

    def _aliases(self, values: Sequence[str]) -> tuple[str, ...] | None:
        """The named tensors that these values are; None if one of them is not. An exporter's zero bias is none."""
        given = [v for v in values if v and v not in self.zeros]
        return tuple(self.alias[v] for v in given) if all(v in self.alias for v in given) else None

    def _number(self, name: str) -> float | None:
        value = self.scalars.get(name)
        return None if value is None else float(value.reshape(-1)[0])

    def _bounds(self, n: onnx.NodeProto) -> tuple[float, float] | None:
        if n.op_type == "Relu":
            return 0.0, math.inf
        if n.op_type != "Clip":
            return None
        a = attributes(n)
        limits: list[float] = []
        for index, key, default in ((1, "min", -math.inf), (2, "max", math.inf)):
            given = n.input[index] if len(n.input) > index else ""
            number = self._number(given) if given else float(a.get(key, default))
            if number is None:
                return None
            limits.append(number)
        return limits[0], limits[1]


def _is_named(init: onnx.TensorProto) -> bool:
    return "." in init.name or not (re.fullmatch(r"val_\d+", init.name) or math.prod(init.dims) == 1)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, also inside the bodies of control flow."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from (name for name in _reads(inner) if name)


def _shapes(model: onnx.ModelProto) -> Mapping[str, Shape]:
    graph = with_batch(model, BATCH).graph
    found: dict[str, Shape] = {}
    for info in [*graph.input, *graph.value_info, *graph.output]:
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[info.name] = tuple(d.dim_value for d in dims)
    return found
