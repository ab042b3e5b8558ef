"""Weightless tensors: a type and a shape without data.

The time of a merged run depends on the shape of its weight, and most runs are in the table already. So their pieces
carry *weightless* tensors, which get numbers when an engine is built. A single element is never weightless, since it
may be part of a piece's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.cut.merge_onnx import random_weight

__all__ = ["weightless", "with_weights"]


def weightless(name: str, data_type: int, shape: Sequence[int]) -> onnx.TensorProto:
    """A tensor without data, or with one element."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=shape)
    if prod(shape) == 1:
        _fill(tensor)
    return tensor


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with random numbers in weightless weights and zeros in weightless vectors; itself if it has none."""
    empty = [k for k, tensor in enumerate(model.graph.initializer) if _is_weightless(tensor)]
    if not empty:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for k in empty:
        _fill(copy.graph.initializer[k])
    return copy


def _is_weightless(tensor: onnx.TensorProto) -> bool:
    """Whether only name, type and shape are set."""
    return not tensor.HasField("raw_data") and {f.name for f, _ in tensor.ListFields()} == {"name", "data_type", "dims"}


def _fill(tensor: onnx.TensorProto) -> None:
    shape = tuple(tensor.dims)
    array = np.zeros(shape) if len(shape) == 1 else random_weight(shape)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
