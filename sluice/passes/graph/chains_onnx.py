"""The chains of convolutions of an ONNX graph; numpy and onnx only."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx

from sluice.passes.graph.chains import Chain, ChainOp, Layer, Norm, find_chains
from sluice.passes.graph.onnx_graph import attributes

__all__ = ["chains_onnx"]

_ACTIVATIONS = """Relu Clip LeakyRelu Elu Selu Celu Gelu Mish HardSwish HardSigmoid Sigmoid Tanh Softplus Softsign Swish
    Dropout Identity"""


def chains_onnx(model: onnx.ModelProto) -> tuple[Chain, ...]:
    """The chains of convolutions of an ONNX graph whose initialisers carry the parameter names."""
    graph = model.graph
    shapes = {init.name: tuple(init.dims) for init in graph.initializer}
    constant = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    inputs = [info.name for info in graph.input if info.name not in shapes]
    uses = Counter(name for node in graph.node for name in node.input)
    made = {node.output[0]: node for node in graph.node}
    ops: list[ChainOp] = []
    gates: set[str] = set()
    for node in reversed(graph.node):  # from behind, so that a product takes the sigmoid before it along
        gate = _gate(node, made, uses)
        if gate is not None:
            gates.add(gate)
            ops.append(ChainOp("act", f"Swish ({node.output[0]})", (made[gate].input[0],), (node.output[0],)))
        elif node.op_type == "Constant" or node.output[0] in gates:
            continue
        elif node.op_type != "Shape" or node.input[0] not in inputs:  # sizes that enter do not change
            ops.append(_read(node, shapes, constant, uses))
    ops.reverse()
    ops += [ChainOp("output", "output", (info.name,), ()) for info in graph.output]
    return find_chains(ops, inputs)


def _gate(node: onnx.NodeProto, made: dict[str, onnx.NodeProto], uses: Counter[str]) -> str | None:
    """The sigmoid's value where the node is x * sigmoid(x) and its only reader."""
    if node.op_type == "Mul":
        for x, gate in (tuple(node.input), tuple(node.input)[::-1]):
            if gate in made and made[gate].op_type == "Sigmoid" and made[gate].input[0] == x and uses[gate] == 1:
                return gate
    return None


def _read(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], constant: set[str], uses: Counter[str]) -> ChainOp:
    """The neutral form of a node."""
    inputs = tuple(name for name in node.input if name and name not in shapes and name not in constant)
    outputs = tuple(name for name in node.output if name)
    other = ChainOp("other", f"{node.op_type} ({node.output[0]})", inputs, outputs)
    if inputs != tuple(node.input)[:1] or len(outputs) > 1:
        plain = node.op_type == "Add" and len(inputs) == 2
        return replace(other, kind="add") if plain else other
    if node.op_type in _ACTIVATIONS.split():
        return replace(other, kind="act")
    if not all(name in shapes for name in node.input[1:] if name):
        return other
    if node.op_type == "Conv":
        return _read_conv(node, shapes, uses, other)
    if node.op_type == "BatchNormalization":
        weight, bias, mean, var = node.input[1:5]
        norm = Norm(weight, bias, mean, var, attributes(node).get("epsilon", 1e-5), outputs[0])
        return replace(other, kind="norm", norm=norm)
    return other


def _read_conv(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], uses: Counter[str], other: ChainOp) -> ChainOp:
    a, name = attributes(node), node.input[1]
    shape, axes = shapes[name], len(shapes[name]) - 2
    stride, dilation = (tuple(a.get(key, (1,) * axes)) for key in ("strides", "dilations"))
    pads, groups = tuple(a.get("pads", (0,) * 2 * axes)), a.get("group", 1)
    automatic = a.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER") and max(stride) == 1 and all(k % 2 for k in shape[2:]):
        pads, automatic = tuple(k // 2 for k in shape[2:]) * 2, b"NOTSET"
    reason = None
    if uses[name] > 1:
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
