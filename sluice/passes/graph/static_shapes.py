"""Fold the shape arithmetic of a graph at one static batch, so that every literal is a constant.

``Shape`` of a value of known size is a constant; so is any small operator all of whose inputs are constants and whose
results are integers. A folded operator may make further sizes known, so inference and folding are repeated until
nothing folds. An operator that reads a weight is never folded, since names must survive. An operator that the evaluator
cannot compute stays in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sluice.core.algebra import prime_beside
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, sizes_of, with_batch

__all__ = ["stand_in_batch", "static_graph"]

_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
_ENTRIES = 16  # of a constant that may speak of sizes: a shape, pads, split sizes


def static_graph(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model at one batch size: sizes static and known, shape arithmetic gone.

    Raises:
        SluiceError: the graph is not well typed.
    """
    static = with_batch(model, batch)
    while _fold(static):
        static = with_batch(static, batch)
    return static


def stand_in_batch(model: onnx.ModelProto) -> int | None:
    """A prime that divides no size of the graph, to stand for a free batch; None where the batch is not free."""
    chosen, _ = sizes_of(model)
    dims = [dim for info in model.graph.input for dim in info.type.tensor_type.shape.dim]
    if all(dim.HasField("dim_value") or dim.dim_param in chosen for dim in dims):
        return None
    graph = OnnxGraph(model)
    sizes = {dim.dim_value for info in graph.infos.values() for dim in info.type.tensor_type.shape.dim}
    sizes.update(size for init in graph.initializers.values() for size in init.dims)
    sizes.update(chosen.values())
    for array in graph.literals.values():
        if array.size <= _ENTRIES and array.dtype.kind in "iu":
            sizes.update(np.abs(array).reshape(-1).tolist())
    return prime_beside(sizes)


def _fold(model: onnx.ModelProto) -> bool:
    """Replace constant values by initialisers, in place; whether any was replaced."""
    graph, read = model.graph, OnnxGraph(model)
    known = dict(read.literals)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    kept: list[onnx.NodeProto] = []
    folded: dict[str, np.ndarray] = {}
    for node in graph.node:
        values: Sequence[np.ndarray] | None = None
        if node.op_type == "Shape":
            size = read.shapes.get(node.input[0])
            a = attributes(node)
            if size is not None:
                values = [np.array(size[a.get("start", 0) : a.get("end")], dtype=np.int64)]
        elif node.op_type != "Constant" and node.input and all(name in known for name in node.input if name):
            values = _evaluate(node, [known[name] for name in node.input if name], opset)
        if values is None:
            kept.append(node)
        else:
            folded.update(zip(node.output, values, strict=True))
            known.update(zip(node.output, values, strict=True))
    if not folded:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {info.name for info in graph.output}
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in folded.items() if n in used)
    return True


def _evaluate(node: onnx.NodeProto, inputs: Sequence[np.ndarray], opset: int) -> list[np.ndarray] | None:
    """All outputs of a node, if they are integers and the evaluator can compute them."""
    try:
        if node.op_type == "GatherElements":
            values = [_gather_elements(inputs[0], inputs[1], attributes(node).get("axis", 0))]
        else:
            values = [np.asarray(value) for value in _reference(node, inputs, opset)]
    except Exception:  # of any kind, from an operator that the evaluator lacks; the runtime computes it
        return None
    return values if all(helper.np_dtype_to_tensor_dtype(v.dtype) in _INTEGERS for v in values) else None


def _reference(node: onnx.NodeProto, inputs: Sequence[np.ndarray], opset: int) -> Sequence[Any]:
    names = [name for name in node.input if name]
    graph = helper.make_graph(
        [node],
        "fold",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, inputs, strict=True)
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return list(ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True))))


def _gather_elements(data: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    """``out[i][j] = data[indices[i][j]][j]``; beside ``axis`` the indices may be fewer than the data.

    The reference evaluator takes at most 64 positions along the axis, and no fewer indices than data beside it.
    """
    axis %= data.ndim
    beside = data[tuple(slice(None if d == axis else n) for d, n in enumerate(indices.shape))]
    return np.take_along_axis(beside, np.where(indices < 0, indices + data.shape[axis], indices), axis)
