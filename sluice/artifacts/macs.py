"""Multiply-accumulates of an ONNX graph for one example: convolutions, matrix products and recurrent layers.

Conv            output elements * (in channels / groups) * kernel elements
ConvTranspose   input elements * (out channels / groups) * kernel elements
Gemm, MatMul    output elements * contracted size
LSTM, GRU, RNN  steps * batch * elements of both matrices, over all directions
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.static_shapes import static_sizes

__all__ = ["count_macs", "macs_by_node"]


def count_macs(model: onnx.ModelProto) -> int:
    """MACs at batch 1 (at the model's own batch if that is fixed)."""
    return sum(macs for _, macs in macs_by_node(model))


def macs_by_node(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The operators that multiply, with their MACs, as `count_macs`."""
    graph = OnnxGraph(static_sizes(model, 1))
    shapes = {name: list(init.dims) for name, init in graph.initializers.items()}
    for name, info in graph.infos.items():
        shapes[name] = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    for node in graph.graph.node:
        if node.op_type == "Conv":
            yield node, math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            yield node, math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            contracted = shapes[node.input[0]][0 if attributes(node).get("transA") else -1]
            yield node, math.prod(shapes[node.output[0]]) * contracted
        elif node.op_type in ("LSTM", "GRU", "RNN"):
            matrices = sum(math.prod(shapes[name]) for name in node.input[1:3])
            yield node, math.prod(shapes[node.input[0]][:2]) * matrices
