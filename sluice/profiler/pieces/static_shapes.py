"""The shape arithmetic of a graph is folded at one static batch, so that every literal is a constant.

``Shape`` of a value of known size is a constant; so is any small operator whose inputs are all constants and whose
result is an integer. An operator that touches a weight is never folded: names must survive.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sluice.passes.graph.onnx_graph import attributes, constants, with_batch

__all__ = ["static_graph"]

_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def static_graph(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model at one batch size: all sizes static and known, shape arithmetic gone."""
    static = with_batch(model, batch)
    sizes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in [*static.graph.input, *static.graph.value_info]
    }
    known = constants(static)
    opset = next(o.version for o in static.opset_import if o.domain in ("", "ai.onnx"))
    kept: list[onnx.NodeProto] = []
    folded: dict[str, np.ndarray] = {}
    for node in static.graph.node:
        value: np.ndarray | None = None
        if node.op_type == "Shape" and all(sizes.get(node.input[0], [0])):
            a = attributes(node)
            value = np.array(sizes[node.input[0]][a.get("start", 0) : a.get("end")], dtype=np.int64)
        elif node.op_type != "Constant" and node.input and all(name in known for name in node.input if name):
            value = _evaluate(node, known, opset)
        if value is None:
            kept.append(node)
        else:
            known[node.output[0]] = folded[node.output[0]] = value
    del static.graph.node[:]
    static.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    static.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in folded.items() if n in used)
    return with_batch(static, batch)


def _evaluate(node: onnx.NodeProto, known: dict[str, np.ndarray], opset: int) -> np.ndarray | None:
    inputs = [name for name in node.input if name]
    graph = helper.make_graph(
        [node],
        "fold",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(known[n].dtype), known[n].shape)
            for n in inputs
        ],
        [helper.make_value_info(node.output[0], onnx.TypeProto())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    value = np.asarray(next(iter(ReferenceEvaluator(model).run(None, {name: known[name] for name in inputs}))))
    return value if helper.np_dtype_to_tensor_dtype(value.dtype) in _INTEGERS else None
