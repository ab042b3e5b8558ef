"""Convolutions that the compiler makes matrix products of, in a part of a network.

1. The compiler computes some 1x1 convolutions as products W x of images (channels, positions), which have three axes,
   (N, C, HW). Inside a network the next kernel reads these as they lie. As the output of a part they get their four
   axes back, and that is a kernel of its own, which copies the tensor. Which convolutions these are depends on sizes,
   precision and version, so it is read off the engine of the part: a kernel of no operator follows that of a
   convolution, and writes the same numbers with four axes.
2. Such a convolution, and what is computed pixel by pixel from there to the output, is written on matrices (rows,
   channels): the row of a pixel holds its channels, as it does in memory where channels lie last. The compiler makes
   the same product of it, and no copy. Other convolutions stay: a product on rows would be another kernel.
3. The kernels that a network has in place of such a part are those of the convolution, less the copies.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.runtime.base.runner import PLAIN
from sluice.runtime.trt.borders import BINARY, IMAGE, UNARY, held_in, resize, shapes_of
from sluice.runtime.trt.inspect import EngineLayer, node_name

__all__ = ["products_on_rows", "without_copies"]

Shape = tuple[int, ...]


def without_copies(layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    """The layers of a part that its network has, too (rule 3)."""
    return [layer for layer in layers if not _sources(layer, layers)]


def products_on_rows(model: onnx.ModelProto, layers: Sequence[EngineLayer]) -> onnx.ModelProto:
    """The part with products whose results are copied on rows (rule 2), itself if its engine has none. Names stay.

    Args:
        model: with fixed sizes.
        layers: of the engine that the part has as it is.
    """
    named = {name for layer in layers for source in _sources(layer, layers) for name in source.nodes}
    shapes, held, weights = shapes_of(model), held_in(model), {init.name for init in model.graph.initializer}
    outputs = {info.name for info in model.graph.output if info.doc_string != PLAIN}  # which are copied in the network
    rows: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node_name(node) in named and _is_product(node, shapes, weights):
            region = _to_the_output(node, model.graph, shapes, held)
            if any(name in outputs for own in region for name in own.output):
                rows += [own for own in region if own not in rows]
    return _written(model, rows, shapes) if rows else model


def _sources(layer: EngineLayer, layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    """The layers of whose results this one may copy one to give it four axes (rule 1)."""
    if layer.nodes or len(layer.inputs) != 1 or len(layer.outputs) != 1:
        return []
    read, made = layer.inputs[0].shape, layer.outputs[0].shape
    if len(made) != IMAGE or read != (*made[:2], made[2] * made[3]):
        return []
    return [other for other in layers if other.nodes and read in [tensor.shape for tensor in other.outputs]]


def _is_product(node: onnx.NodeProto, shapes: dict[str, Shape], weights: Collection[str]) -> bool:
    if node.op_type != "Conv" or node.input[0] in weights or not all(n in weights for n in node.input[1:] if n):
        return False
    read, made, weight = (shapes.get(name, ()) for name in (node.input[0], node.output[0], node.input[1]))
    alone = len(read) == len(weight) == IMAGE and weight[2:] == (1, 1) and weight[1] == read[1]
    return alone and made == (read[0], weight[0], *read[2:])  # no groups, strides or pads


def _to_the_output(
    first: onnx.NodeProto, graph: onnx.GraphProto, shapes: dict[str, Shape], held: Collection[str]
) -> list[onnx.NodeProto]:
    """The convolution and what follows from it, and from inputs of the part, pixel by pixel."""
    region, shape = [first], shapes[first.output[0]]
    known = {first.output[0], *(info.name for info in graph.input)}
    for node in graph.node:
        others = [name for name in node.input if name not in held]
        follows = any(name in own.output for own in region for name in others)
        if follows and node.op_type in UNARY | BINARY and known.issuperset(others):
            sizes = [shapes.get(name, ()) for name in node.input]
            pairs = zip(node.input, sizes, strict=True)
            if all(size == shape if name in others else math.prod(size) == 1 for name, size in pairs):
                region.append(node)
                known.update(node.output)
    return region


def _written(model: onnx.ModelProto, region: list[onnx.NodeProto], shapes: dict[str, Shape]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    given = {info.name for info in graph.input if info.doc_string != PLAIN}
    rows = {name for node in region for name in node.output}
    rows |= {name for name in given if all(node in region for node in model.graph.node if name in node.input)}
    rows = {name for name in rows if len(shapes[name]) == IMAGE}
    del graph.node[:], graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if info.name in rows:
            resize(info, _rows(shapes[info.name]))
    weights = {init.name: init for init in model.graph.initializer}
    added: set[str] = set()
    for node in model.graph.node:
        own = node in region
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for k, name in enumerate(node.input):
            if len(shapes.get(name, ())) == IMAGE and name not in weights and (name in rows) != own:
                copy.input[k] = f"{name}:{'rows' if own else 'image'}"
                if copy.input[k] not in added:
                    added.add(copy.input[k])
                    graph.node.extend(_moved(name, copy.input[k], shapes[name], graph, own))
        if own and node.op_type == "Conv":
            graph.node.extend(_product(copy, weights[node.input[1]], graph))
        else:
            graph.node.append(copy)
    return result


def _rows(shape: Shape) -> Shape:
    return shape[0] * shape[2] * shape[3], shape[1]


def _product(node: onnx.NodeProto, weight: onnx.TensorProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The convolution as a product of rows, and the sum with its bias."""
    matrix = numpy_helper.to_array(weight)[:, :, 0, 0].T
    name = f"{node.output[0]}:weight"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), name))
    if len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [node.input[0], name], node.output, name=node.name)]
    between = f"{node.output[0]}:product"
    return [
        helper.make_node("MatMul", [node.input[0], name], [between], name=node.name),
        helper.make_node("Add", [between, node.input[2]], node.output, name=f"bias of {node.output[0]}"),
    ]


def _moved(name: str, to: str, shape: Shape, graph: onnx.GraphProto, to_rows: bool) -> list[onnx.NodeProto]:
    """The operators that make rows of an image, or an image of rows."""
    n, c, h, w = shape
    sizes = np.array([n * h * w, c] if to_rows else [n, h, w, c], dtype=np.int64)
    graph.initializer.append(numpy_helper.from_array(sizes, f"{to}:shape"))
    between, shaping = f"{to}:between", f"{to}:shape"
    if to_rows:
        return [
            helper.make_node("Transpose", [name], [between], name=f"transpose {to}", perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [between, shaping], [to], name=f"reshape {to}"),
        ]
    return [
        helper.make_node("Reshape", [name, shaping], [between], name=f"reshape {to}"),
        helper.make_node("Transpose", [between], [to], name=f"transpose {to}", perm=[0, 3, 1, 2]),
    ]
