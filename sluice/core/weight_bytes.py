"""How many bytes the weights of an ONNX model have, whether one protobuf can hold them, and weights beside a model.

1. Bytes follow from types and shapes. What lies in ``raw_data`` would be copied to be counted, and a message beyond the
   limit cannot even tell its size.
2. ONNX Runtime reads large tensors where they lie in memory. A model that is given as one message is copied into that
   message, into the runtime's own, and into the runtime's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["Apart", "bytes_of_tensor", "bytes_of_weights", "is_large", "weights_apart", "with_tensors"]

APART = 2**16  # bytes of a tensor that may lie outside of its model
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


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """A model whose large tensors lie outside of it, and these by name."""

    light: onnx.ModelProto
    weights: Mapping[str, np.ndarray]

    def tell(self, options: Any) -> None:
        """Say to options of a session where the tensors lie."""
        import onnxruntime as ort

        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in self.weights.values()]
        options.add_external_initializers(list(self.weights), values)


def weights_apart(model: onnx.ModelProto) -> Apart:
    """The model, for a runtime that reads large tensors where they lie (rule 2)."""
    light = type(model)(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for name in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(light.graph, name).extend(getattr(model.graph, name))
    return with_tensors(light, model.graph.initializer)


def with_tensors(light: onnx.ModelProto, tensors: Iterable[onnx.TensorProto]) -> Apart:
    """A model without initialisers, which gets them in place, and the large ones beside it."""
    from onnx import TensorProto, numpy_helper

    weights = {}
    for init in tensors:
        if bytes_of_tensor(init) < APART:
            light.graph.initializer.append(init)
            continue
        weights[init.name] = numpy_helper.to_array(init)
        place = light.graph.initializer.add(name=init.name, data_type=init.data_type, dims=init.dims)
        place.data_location = TensorProto.EXTERNAL
        place.external_data.add(key="location", value="in memory")
    return Apart(light, weights)
