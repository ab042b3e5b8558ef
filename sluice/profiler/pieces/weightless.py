"""Weightless tensors: a type and a shape without data.

1. The time of a layer depends on the shape of its weight, and most pieces are in the table already. So a partition,
   its pieces and what is restructured of it carry *weightless* tensors, which get numbers when an engine is built. So a
   profile holds next to nothing of a large file, of which pieces and graphs of ranks would hold a copy each.
2. Weights of layers are such, and what a merged run is made of. A single element never is, since it may be part of a
   piece's key, and neither is what other operators read: masks, tables and vectors decide on forms of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.cut.merge_onnx import random_weight
from sluice.passes.graph.onnx_graph import hollow, is_hollow, reads
from sluice.profiler.pieces.split import ANCHORS, RECURRENT

__all__ = ["light", "weightless", "with_weights"]


def light(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose layers have weightless weights (rule 2)."""
    weights, others = set[str](), set[str]()
    for node in model.graph.node:
        last = 3 if node.op_type in RECURRENT else 2
        own = node.input[1:last] if node.op_type in ANCHORS else []
        weights.update(own)
        others.update(reads(node) if not own else [*node.input[:1], *node.input[last:]])
    return hollow(model, weights - others)


def weightless(name: str, data_type: int, shape: Sequence[int]) -> onnx.TensorProto:
    """A tensor without data, or with one element."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=shape)
    if prod(shape) == 1:
        _fill(tensor)
    return tensor


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with random numbers in weightless weights and zeros in weightless vectors; itself if it has none."""
    empty = [k for k, tensor in enumerate(model.graph.initializer) if is_hollow(tensor)]
    if not empty:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for k in empty:
        _fill(copy.graph.initializer[k])
    return copy


def _fill(tensor: onnx.TensorProto) -> None:
    shape = tuple(tensor.dims)
    array = np.zeros(shape) if len(shape) == 1 else random_weight(shape)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
