"""Scenario ONNX graphs: attributes, constants, and every size at one batch.

Sizes are inferred from the operators. What inference cannot see through stays as the exporter wrote it, as far as the
batch tells all its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError

__all__ = ["BATCH", "LITERAL", "attributes", "constants", "is_whole_shape", "sizes_of", "with_batch"]

LITERAL = 1024  # elements; a shape, a scale or a list of axes has no more
BATCH = 10_007  # stands for a dynamic size: prime, so that products stay recognisable


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy at one static batch with every size inferred that can be."""
    known = {info.name: info for info in model.graph.value_info}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    del copy.graph.value_info[:]
    for info in copy.graph.output:
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    try:
        _infer(copy)
    except onnx.shape_inference.InferenceError as error:
        raise SluiceError(f"the ONNX graph is not well typed: {error}; export it again") from None
    symbols = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    inferred = {info.name: info for info in copy.graph.value_info}
    for name, info in known.items():  # what inference could not see through, as the exporter wrote it
        found = inferred.get(name)
        if found is not None and all(d.HasField("dim_value") for d in found.type.tensor_type.shape.dim):
            continue
        dims = info.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") or d.dim_param in symbols for d in dims):
            if found is None:
                found = copy.graph.value_info.add()
            found.CopyFrom(info)
            for dim in found.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.dim_value = batch
    return copy


def _infer(model: onnx.ModelProto) -> None:
    """Infer all shapes, in place.

    Inference goes through the bytes of the whole model, there and back. Weights stay behind: only their types and
    shapes are asked for, and they are nearly all of the bytes.
    """
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.output.extend(model.graph.output)
    given = {info.name for info in model.graph.input}
    for init in model.graph.initializer:
        if math.prod(init.dims) <= LITERAL or init.name in given:
            skeleton.graph.initializer.append(init)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, init.dims))
    inferred = onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True).graph
    model.graph.value_info.extend(inferred.value_info)
    del model.graph.output[:]
    model.graph.output.extend(inferred.output)


def sizes_of(infos: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, ...]]:
    """The shapes that are known; a value with an open size has none."""
    found: dict[str, tuple[int, ...]] = {}
    for info in infos:
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[info.name] = tuple(dim.dim_value for dim in dims)
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def is_whole_shape(node: onnx.NodeProto) -> bool:
    """Does the node tell all sizes of its input?"""
    a = attributes(node)
    return node.op_type == "Shape" and not a.get("start", 0) and "end" not in a


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Integer constants that describe shapes: initialisers and Constant nodes."""
    found = {
        init.name: numpy_helper.to_array(init)
        for init in model.graph.initializer
        if init.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    }
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = next(iter(attributes(node).values()))
            found[node.output[0]] = (
                numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
            )
    return found
