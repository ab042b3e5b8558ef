"""Borders of a part of a network as they are inside the network's engine.

1. Inside an engine activations lie with the channels last, at its borders plainly. So inputs and outputs of four axes
   get a layout with the channels last, unless they are plain inside too (`sluice.runtime.base.runner.PLAIN`), or their
   last axis is that of the channels already: norms and products over it say so, and transpositions that move it. In
   half precision the layout comes in vectors of eight channels. Where these are no whole vectors, the builder may also
   leave out the padding, as it does inside.
   An image in float32 that the part also averages over its pixels, as in front of a squeeze, is plain inside: the
   compiler averages along lines of pixels. With the channels last it needs partial sums and a kernel that clears them.
2. The compiler computes matrix products, and what works row by row around them, on matrices (rows, channels). Inside a
   network it moves the change of shape from (N, S, C) to where it costs nothing. At a border it cannot, and then it
   fuses nothing across it: a product and its activation are two kernels in place of one. So a *region*, a largest
   connected set of operators that work on rows and of which one is such a product, is written on matrices, up to the
   borders. Where other operators read or make what a region makes or reads, a ``Reshape`` stands between them.
   Products on (N, H, W, C) are two kernels inside a network as well, and stay as they are.
3. The order of rows at a border is nobody's concern. Behind an attention of several heads the compiler lets the rows of
   one position follow each other, (S, N, C), since its kernel can write that order; in front of an output in the order
   of the file it lays them out anew, and a residual in that order as well. So a part in which a region reads what other
   operators make is written in both orders, and the one with fewer kernels counts (`sluice.runtime.trt.runner`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

__all__ = [
    "BINARY",
    "IMAGE",
    "UNARY",
    "averaged",
    "channels_last_already",
    "held_in",
    "on_rows",
    "over_last_axis",
    "resize",
    "set_layouts",
    "shapes_of",
]

IMAGE = 4  # axes of a tensor with height and width
LINES = (3, IMAGE)  # axes of what operators may work on row by row
CHANNELS_LAST = {"FLOAT": "HWC", "HALF": "HWC8", "BF16": "HWC8", "INT8": "HWC16"}
VECTOR = {"HWC8": 8}
UNARY = frozenset(["Cast", "Clip", "DequantizeLinear", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
                   "Identity", "LeakyRelu", "Neg", "QuantizeLinear", "Relu", "Sigmoid", "Softplus", "Sqrt",
                   "Tanh"])  # fmt: skip
BINARY = frozenset(["Add", "Div", "Mul", "Pow", "Sub"])
LAST_AXIS = frozenset(["LayerNormalization", "Softmax"])
Shape = tuple[int, ...]


def set_layouts(trt: Any, network: Any, plain: Collection[str]) -> None:
    """Rule 1, for a parsed network of TensorRT's; ``plain`` are names of tensors."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for tensor in (*inputs, *outputs):
        layout = CHANNELS_LAST.get(tensor.dtype.name)
        if layout is None or len(tensor.shape) != IMAGE or tensor.name in plain:
            continue
        formats = [layout, "HWC"] if int(tensor.shape[1]) % VECTOR.get(layout, 1) else [layout]
        tensor.allowed_formats = sum(1 << int(getattr(trt.TensorFormat, name)) for name in formats)


def channels_last_already(model: onnx.ModelProto) -> set[str]:
    """Values whose last axis is that of the channels in the file (rule 1)."""
    found = over_last_axis(model)
    for node in model.graph.node:
        if node.op_type == "Transpose":
            axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
            if len(axes) == IMAGE and axes[1] == IMAGE - 1:
                found.add(node.input[0])
            if len(axes) == IMAGE and axes[-1] == 1:
                found.add(node.output[0])
    return found


def averaged(model: onnx.ModelProto) -> set[str]:
    """Values of float32 that a pool over all pixels reads (rule 1)."""
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.output}
    read = {node.input[0] for node in model.graph.node if node.op_type == "GlobalAveragePool"}
    return {name for name in read if kinds.get(name) == onnx.TensorProto.FLOAT}


def over_last_axis(model: onnx.ModelProto) -> set[str]:
    """Values of regions that work row by row, and in which a norm or a product says that channels are the last axis."""
    shapes, held = shapes_of(model), held_in(model)
    working = [node for node in model.graph.node if _works_on_rows(node, shapes, held)]
    return {
        name
        for own in _connected(working, shapes, held)
        if any(node.op_type in LAST_AXIS | {"MatMul"} for node in own)
        for node in own
        for name in (*node.input, *node.output)
    }


def on_rows(model: onnx.ModelProto, *, positions_first: bool = False) -> onnx.ModelProto:
    """The model with its regions on rows (rule 2), itself if there are none; sizes are fixed. Names stay.

    With ``positions_first`` in the other order (rule 3); the model itself if no region reads what other operators make.
    """
    shapes = shapes_of(model)
    held = held_in(model)
    working = [node for node in model.graph.node if _works_on_rows(node, shapes, held)]
    flat = [node for node in working if len(shapes[node.output[0]]) < IMAGE]
    regions = [own for own in _connected(flat, shapes, held) if any(node.op_type == "MatMul" for node in own)]
    region = {id(node) for own in regions for node in own}
    if not region:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    of_region = [id(node) in region for node in model.graph.node]
    made = {name for node, own in zip(model.graph.node, of_region, strict=True) if own for name in node.output}
    given = {info.name for info in model.graph.input}
    read = {name for node, own in zip(model.graph.node, of_region, strict=True) if own for name in node.input}
    rows = {name for name in made | (read & given) if _is_lines(name, shapes, held)}  # what has two axes from now on
    del result.graph.node[:], result.graph.value_info[:]
    for info in (*result.graph.input, *result.graph.output):
        if info.name in rows:
            resize(info, _rows(shapes[info.name]))
    added: dict[str, bool] = {}  # by value, whether a region reads it
    for node, own in zip(model.graph.node, of_region, strict=True):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for k, name in enumerate(node.input):
            if own == (name in rows) or not _is_lines(name, shapes, held):
                continue
            target = _rows(shapes[name]) if own else shapes[name]
            copy.input[k] = f"{name}:{'rows' if own else 'lines'}"
            if copy.input[k] not in added:
                added[copy.input[k]] = own
                result.graph.node.extend(
                    _moved(name, copy.input[k], shapes[name], target, result.graph, positions_first)
                )
        if own and node.op_type in LAST_AXIS:
            _set_axis(copy)
        result.graph.node.append(copy)
    return model if positions_first and not any(added.values()) else result


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """The sizes of all values of a model of fixed sizes."""
    inferred = shape_inference.infer_shapes(model).graph
    found = {init.name: tuple(init.dims) for init in model.graph.initializer}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = info.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            found[info.name] = tuple(dim.dim_value for dim in dims)
    return found


def held_in(model: onnx.ModelProto) -> set[str]:
    """Initialisers, and what follows from them alone."""
    held = {init.name for init in model.graph.initializer} | {""}
    for node in model.graph.node:
        if held.issuperset(node.input):
            held.update(node.output)
    return held


def _is_lines(name: str, shapes: dict[str, Shape], held: Collection[str]) -> bool:
    return name not in held and len(shapes.get(name, ())) in LINES


def _works_on_rows(node: onnx.NodeProto, shapes: dict[str, Shape], held: Collection[str]) -> bool:
    """Whether every row of what the operator makes follows from the same row of what it reads."""
    shape = shapes.get(node.output[0], ())
    if len(shape) not in LINES or len([name for name in node.output if name]) != 1 or node.input[0] in held:
        return node.op_type in BINARY and len(shape) in LINES and _elementwise(node, shape, shapes, held)
    others = node.input[1:]
    small = all(name in held for name in others) and all(len(shapes.get(name, ())) <= 1 for name in others if name)
    if node.op_type in UNARY:
        return small and all(math.prod(shapes.get(name, ())) == 1 for name in others if name)
    if node.op_type in LAST_AXIS:
        return small and _axis(node) in (-1, len(shape) - 1)
    if node.op_type == "MatMul":
        return node.input[1] in held and len(shapes.get(node.input[1], ())) == 2
    return node.op_type in BINARY and _elementwise(node, shape, shapes, held)


def _elementwise(node: onnx.NodeProto, shape: Shape, shapes: dict[str, Shape], held: Collection[str]) -> bool:
    return all(len(shapes.get(name, shape)) <= 1 if name in held else shapes.get(name) == shape for name in node.input)


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)


def _set_axis(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = -1


def _connected(
    nodes: Iterable[onnx.NodeProto], shapes: dict[str, Shape], held: Collection[str]
) -> list[list[onnx.NodeProto]]:
    """The nodes in sets that share activations."""
    found: list[tuple[set[str], list[onnx.NodeProto]]] = []
    for node in nodes:
        names = {name for name in (*node.input, *node.output) if _is_lines(name, shapes, held)}
        meets = [one for one in found if one[0] & names]
        found = [one for one in found if not one[0] & names]
        found.append((names.union(*(one[0] for one in meets)), [*(n for one in meets for n in one[1]), node]))
    return [own for _, own in found]


def _rows(shape: Shape) -> Shape:
    return math.prod(shape[:-1]), shape[-1]


def resize(info: onnx.ValueInfoProto, shape: Shape) -> None:
    """Write the sizes of an input or output."""
    del info.type.tensor_type.shape.dim[:]
    for size in shape:
        info.type.tensor_type.shape.dim.add().dim_value = size


def _moved(
    name: str, to: str, lines: Shape, target: Shape, graph: onnx.GraphProto, positions_first: bool
) -> list[onnx.NodeProto]:
    """The operators between a value of these lines and the same on rows, to the shape ``target``."""
    if not positions_first:
        return [_reshape(name, to, target, graph)]
    between, perm = f"{to}:turned", [1, 0, 2]
    if target != lines:
        turned = helper.make_node("Transpose", [name], [between], name=f"turn {to}", perm=perm)
        return [turned, _reshape(between, to, target, graph)]
    turned = helper.make_node("Transpose", [between], [to], name=f"turn {to}", perm=perm)
    return [_reshape(name, between, (lines[1], lines[0], lines[2]), graph), turned]


def _reshape(name: str, to: str, shape: Shape, graph: onnx.GraphProto) -> onnx.NodeProto:
    graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{to}:shape"))
    return helper.make_node("Reshape", [name, f"{to}:shape"], [to], name=f"reshape {to}")
