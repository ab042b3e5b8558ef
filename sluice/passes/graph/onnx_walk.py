"""The state of a walk over an ONNX graph, and how a node is read; shared by the rules of the ONNX front end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx

from sluice.passes.graph.coupling import FIXED, Coupling, Operand, Shape, Value, fixed
from sluice.passes.graph.onnx_graph import INTEGERS, OnnxGraph, is_whole_shape, reads

__all__ = ["Attributes", "Node", "OnnxRule", "OnnxWalk", "entry", "open_size", "unknown"]

Node = onnx.NodeProto
Attributes = dict[str, Any]


class OnnxWalk:
    """Labels and sizes by name. Every initialiser is a named tensor, and a value like any other."""

    def __init__(self, model: onnx.ModelProto, graph: OnnxGraph, batch: int | None):
        self.graph, self.constants = graph, graph.literals
        self.coupling = Coupling({init.name: tuple(init.dims) for init in model.graph.initializer})
        self.whole_shape_of = {n.output[0]: n.input[0] for n in model.graph.node if is_whole_shape(n)}
        self.batch = batch
        self.value: dict[str, Value] = {}
        self.shape: dict[str, Shape] = {name: tuple(init.dims) for name, init in graph.initializers.items()}
        self.shape |= graph.shapes
        self.weights = set(graph.initializers)  # values computed from named tensors alone

    def of(self, name: str) -> Value:
        if name not in self.value and name in self.coupling.tensors:
            self.value[name] = self.coupling.value(name)
        return self.value[name] if name in self.value else fixed(self.shape.get(name, ()))

    def operand(self, name: str) -> Operand:
        return self.of(name), self.shape[name]

    def operands(self, names: Iterable[str]) -> list[Operand]:
        """Of those that are there."""
        return [self.operand(name) for name in names if name in self.shape]

    def is_free(self, size: int) -> bool:
        """Is a size a number of its own, no batch and not one."""
        return size > 1 and (self.batch is None or size % self.batch != 0)

    def ints(self, name: str) -> list[int] | None:
        value = self.constants.get(name)
        return None if value is None else [int(v) for v in np.asarray(value).reshape(-1)]


OnnxRule = Callable[[OnnxWalk, Node, Attributes], Value]


def entry(n: Node, index: int) -> str:
    """An input by its place, empty where it is not given."""
    return n.input[index] if index < len(n.input) else ""


def unknown(w: OnnxWalk, n: Node, a: Attributes, why: str = "") -> Value:
    """Everything that the operator reads stays whole."""
    called = f"{n.domain}.{n.op_type}" if n.domain else n.op_type
    w.coupling.unknown([w.of(i) for i in reads(n) if i], why or f"unknown operator {called} ({n.name})")
    for name in n.input:
        init = w.graph.initializers.get(name)
        whole = init is not None and init.data_type in (onnx.TensorProto.BOOL, *INTEGERS)
        if name in w.weights and len(value := w.of(name)) > 1 and not whole:
            w.coupling.produce(value[0])
    return tuple(FIXED for _ in w.shape.get(n.output[0], ()))


def open_size(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """A size is not known even at a known batch."""
    return unknown(w, n, a, f"{n.name or n.output[0]} works on a size that is not known")
