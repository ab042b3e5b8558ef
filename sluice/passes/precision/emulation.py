"""Networks in 16 bits, computed on a CPU. onnx only.

ONNX Runtime has no bfloat16 kernels on a CPU and few for float16, so those two are *emulated*: every operator computes
in float32 and its result is rounded to 16 bits. An accelerator that accumulates in float32 and stores 16 bits does the
same, and rounds less often where it fuses operators.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.passes.graph.onnx_graph import infer_weightless

__all__ = ["emulated"]

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with every 16-bit value as a float32 of the same number; one without 16-bit values as it is."""
    inferred = infer_weightless(model)
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    halves = {i.name: i.type.tensor_type.elem_type for i in values if i.type.tensor_type.elem_type in _HALVES}
    if not halves and not any(init.data_type in _HALVES for init in model.graph.initializer):
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for init in done.graph.initializer:
        if init.data_type in _HALVES:
            init.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(init).astype("float32"), init.name))
    for info in [*done.graph.input, *done.graph.output]:
        if info.name in halves:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    del done.graph.value_info[:], done.graph.node[:]
    for node in model.graph.node:
        copy = done.graph.node.add()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            elif attribute.name == "value" and attribute.t.data_type in _HALVES:
                array = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(array))
        for index, name in enumerate(node.output):
            if name in halves:
                copy.output[index] = f"{name}:exact"
                rounded = helper.make_node("Cast", [f"{name}:exact"], [f"{name}:rounded"], to=halves[name])
                widened = helper.make_node("Cast", [f"{name}:rounded"], [name], to=TensorProto.FLOAT)
                done.graph.node.extend([rounded, widened])
    return done
