"""How many bytes the weights of an ONNX model have, and whether one protobuf can hold them.

Bytes follow from types and shapes. What lies in ``raw_data`` would be copied to be counted, and a message beyond the
limit cannot even tell its size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["bytes_of_tensor", "bytes_of_weights", "is_large"]

LARGE = 2**31 - 2**26  # bytes of weights in one protobuf, with room for the graph


def bytes_of_tensor(init: onnx.TensorProto) -> int:
    """Of an initialiser; strings count as nothing."""
    from onnx import TensorProto, helper

    if init.data_type == TensorProto.STRING:
        return 0
    return math.prod(init.dims) * helper.tensor_dtype_to_np_dtype(init.data_type).itemsize


def bytes_of_weights(model: onnx.ModelProto) -> int:
    return sum(map(bytes_of_tensor, model.graph.initializer))


def is_large(model: onnx.ModelProto) -> bool:
    """Is the model too large for one protobuf, as a message that is serialised must be?"""
    return bytes_of_weights(model) >= LARGE
