"""How many examples of a file are run at once, so that memory follows the file and not the examples.

1. The values of a run that lie in memory together take no more than the file's weights, or than `LEAST` bytes where the
   weights take less. One example runs in any case.
2. A value lies in memory from the operator that makes it to the last one that reads it. What a runtime computes in
   place, it computes in less.
3. Values whose sizes are not known count as nothing.
"""

from __future__ import annotations

import math

import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.core.weight_bytes import bytes_of_weights
from sluice.passes.graph.onnx_graph import OnnxGraph, reads
from sluice.passes.graph.static_shapes import static_sizes

__all__ = ["LEAST", "examples_at_once", "room_of", "values_in_memory"]

LEAST = 2**22


def examples_at_once(model: onnx.ModelProto, most: int) -> int:
    """From 1 to ``most`` (rule 1)."""
    return max(1, min(most, room_of(model) // max(1, values_in_memory(model))))


def room_of(model: onnx.ModelProto) -> int:
    """Bytes that values may take beside the weights (rule 1)."""
    return max(LEAST, bytes_of_weights(model))


def values_in_memory(model: onnx.ModelProto) -> int:
    """Bytes of one example's values at the operator where they take most (rule 2)."""
    try:
        static = static_sizes(model, 1)
    except SluiceError:
        return 0
    graph = OnnxGraph(static)
    last = {name: place for place, node in enumerate(static.graph.node) for name in reads(node)}
    kinds = {name: info.type.tensor_type.elem_type for name, info in graph.infos.items()}
    bytes_of = {n: math.prod(shape) * _width(kinds[n]) for n, shape in graph.shapes.items() if kinds.get(n)}
    held = sum(bytes_of.get(name, 0) for name in graph.inputs)
    most, freed = held, dict[int, int]()
    for place, node in enumerate(static.graph.node):
        for name in node.output:
            held += bytes_of.get(name, 0)
            end = len(static.graph.node) if name in graph.outputs else last.get(name, place)
            freed[end] = freed.get(end, 0) + bytes_of.get(name, 0)
        most = max(most, held)
        held -= freed.pop(place, 0)
    return most


def _width(kind: int) -> int:
    return 0 if kind == onnx.TensorProto.STRING else helper.tensor_dtype_to_np_dtype(kind).itemsize
