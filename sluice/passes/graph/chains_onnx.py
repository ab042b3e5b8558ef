"""The chains of convolutions of an ONNX graph; numpy and onnx only.

An exporter may write an activation as several operators (`sluice.passes.graph.composed`). Its products with the number
one do nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import onnx

from sluice.passes.graph.chains import Chain, ChainOp, Layer, Norm, find_chains
from sluice.passes.graph.composed import Composed, composed
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.operators import ELEMENTWISE, onnx_operator

__all__ = ["chains_onnx"]


def chains_onnx(model: onnx.ModelProto) -> tuple[Chain, ...]:
    """The chains of convolutions of an ONNX graph whose initialisers carry the parameter names."""
    graph = OnnxGraph(model)
    numbers = _numbers(graph)
    pieces = _composed(graph, numbers)
    inner = {member for value, piece in pieces.items() for member in piece.members - {value}}
    ops: list[ChainOp] = []
    for node in model.graph.node:
        value = node.output[0]
        label = f"{node.op_type} ({value})"
        factors = [name for name in node.input if numbers.get(name) != 1]
        if node.op_type == "Constant" or value in inner:
            continue
        if value in pieces:
            ops.append(ChainOp("act", label, (pieces[value].source,), (value,)))
        elif node.op_type == "Mul" and len(factors) == 1:
            ops.append(ChainOp("act", label, (factors[0],), (value,)))
        elif node.op_type != "Shape" or node.input[0] not in graph.inputs:  # sizes that enter do not change
            ops.append(_read(node, graph))
    ops += [ChainOp("output", "output", (name,), ()) for name in graph.outputs]
    return find_chains(ops, list(graph.inputs))


def _numbers(graph: OnnxGraph) -> dict[str, float]:
    """Constants of one number, which are no tensors of the model."""
    names = [name for name, init in graph.initializers.items() if not init.dims]
    names += [name for name, node in graph.producers.items() if node.op_type == "Constant"]
    arrays = {name: array for name in names if (array := graph.array(name)) is not None}
    return {name: float(a.reshape(-1)[0]) for name, a in arrays.items() if a.size == 1 and a.dtype.kind in "biuf"}


def _composed(graph: OnnxGraph, numbers: Container[str]) -> dict[str, Composed[str]]:
    """The activations of several operators, by the value that they make."""
    made = graph.producers

    def readers(value: str) -> set[str]:
        own = {name for node in graph.readers.get(value, ()) for name in node.output}
        return own | {""} if value in graph.outputs else own  # a value that leaves the graph is read there

    def operands(value: str) -> list[str] | None:
        node = made.get(value)
        if node is None or onnx_operator(node.op_type, node.domain).kind not in ELEMENTWISE:
            return None
        read = [name for name in node.input if name and name not in numbers]
        return read if read and graph.initializers.keys().isdisjoint(read) else None

    found = {}
    for value in made:
        piece = composed(value, operands, readers)
        if piece and any(
            onnx_operator(made[member].op_type, made[member].domain).is_a("activation") for member in piece.members
        ):
            found[value] = piece
    return found


def _read(node: onnx.NodeProto, graph: OnnxGraph) -> ChainOp:
    """The neutral form of a node."""
    inputs = tuple(name for name in node.input if name and not graph.is_constant(name))
    outputs = tuple(name for name in node.output if name)
    other = ChainOp("other", f"{node.op_type} ({node.output[0]})", inputs, outputs)
    if inputs != tuple(node.input)[:1] or len(outputs) > 1:
        plain = node.op_type == "Add" and len(inputs) == 2
        return replace(other, kind="add") if plain else other
    if onnx_operator(node.op_type, node.domain).is_a("activation"):
        return replace(other, kind="act")
    if not all(name in graph.initializers for name in node.input[1:] if name):
        return other
    if node.op_type == "Conv":
        return _read_conv(node, graph, other)
    if node.op_type == "BatchNormalization":
        weight, bias, mean, var = node.input[1:5]
        norm = Norm(weight, bias, mean, var, attributes(node).get("epsilon", 1e-5), outputs[0])
        return replace(other, kind="norm", norm=norm)
    return other


def _read_conv(node: onnx.NodeProto, graph: OnnxGraph, other: ChainOp) -> ChainOp:
    a, name = attributes(node), node.input[1]
    shape = tuple(graph.initializers[name].dims)
    axes = len(shape) - 2
    stride, dilation = (tuple(a.get(key, (1,) * axes)) for key in ("strides", "dilations"))
    pads, groups = tuple(a.get("pads", (0,) * 2 * axes)), a.get("group", 1)
    automatic = a.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER") and max(stride) == 1 and all(k % 2 for k in shape[2:]):
        pads, automatic = tuple(k // 2 for k in shape[2:]) * 2, b"NOTSET"
    reason = None
    if graph.uses(name) > 1:
        reason = "is shared"
    elif max(dilation) > 1:
        reason = f"has dilation {dilation}"
    elif pads[:axes] != pads[axes:] or automatic not in (b"NOTSET", b"VALID"):
        reason = "is padded unevenly"
    elif groups > 1 and shape[:2] != (groups, 1):
        reason = f"has groups={groups}"
    if reason is not None:
        return replace(other, label=f"convolution {name!r}, which {reason}")
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    layer = Layer(name, bias, shape, stride, pads[:axes], groups, node.input[0], node.output[0])
    return replace(other, kind="conv", label=f"convolution {name!r}", layer=layer)
