"""Fold the shape arithmetic of a graph at one static batch, so that every literal is a constant.

``Shape`` of a value of known size is a constant; so is any small operator all of whose inputs are constants and whose
results are integers, one truth value, or a few numbers computed from sizes. A folded operator may make further sizes
known, so inference and folding are repeated until nothing folds. An operator that reads a weight is never folded, since
names must survive. An operator that the evaluator cannot compute stays in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sluice.core.algebra import prime_beside
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, hollow, reads, sizes_of, with_batch

__all__ = ["stand_in_batch", "static_graph", "static_sizes"]

_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
_ENTRIES = 16  # of a constant that may speak of sizes: a shape, pads, split sizes


def static_graph(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model at one batch size: sizes static and known, shape arithmetic gone.

    Raises:
        SluiceError: the graph is not well typed.
    """
    static, folded = with_batch(model, batch), dict[str, np.ndarray]()
    while _fold(static, folded):
        static = with_batch(static, batch)
    return static


def static_sizes(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """`static_graph` without the numbers of large tensors, for who asks for sizes alone."""
    return static_graph(hollow(model), batch)


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


def _fold(model: onnx.ModelProto, folded: dict[str, np.ndarray]) -> bool:
    """Replace constant values by initialisers, in place, and add them to ``folded``; whether any was replaced."""
    graph, read = model.graph, OnnxGraph(model)
    known = {**read.literals, **folded}
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    kept: list[onnx.NodeProto] = []
    fresh: dict[str, np.ndarray] = {}
    for node in graph.node:
        values: Sequence[np.ndarray] | None = None
        names = [name for name in node.input if name]
        sized = any(name in folded for name in names)  # computed from sizes
        if node.op_type == "Shape":
            size = read.shapes.get(node.input[0])
            a = attributes(node)
            if size is not None:
                values = [np.array(size[a.get("start", 0) : a.get("end")], dtype=np.int64)]
        elif node.op_type != "Constant" and names:
            inputs = [known.get(name, _number(read, name) if sized else None) for name in names]
            if all(value is not None for value in inputs):
                values = _evaluate(node, inputs, opset, floats=sized)
        if values is None:
            kept.append(node)
        else:
            for found in (fresh, known, folded):
                found.update(zip(node.output, values, strict=True))
    if not fresh:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in reads(node)} | {info.name for info in graph.output}
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in fresh.items() if n in used)
    return True


def _number(read: OnnxGraph, name: str) -> np.ndarray | None:
    """A constant of one entry."""
    return None if read.scalar(name) is None else read.array(name)


def _evaluate(node: onnx.NodeProto, inputs: Sequence[Any], opset: int, *, floats: bool) -> list[np.ndarray] | None:
    """All outputs of a node, if the evaluator can compute them.

    They are integers, or one truth value each; with ``floats`` a few numbers of any type.
    """
    try:
        if node.op_type == "GatherElements":
            values = [_gather_elements(inputs[0], inputs[1], attributes(node).get("axis", 0))]
        else:
            values = [np.asarray(value) for value in _reference(node, inputs, opset)]
    except Exception:  # of any kind, from an operator that the evaluator lacks; the runtime computes it
        return None
    return values if all(_is_plain(value, floats) for value in values) else None


def _is_plain(value: np.ndarray, floats: bool) -> bool:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    if kind == onnx.TensorProto.BOOL:
        return value.size == 1
    return kind in _INTEGERS or (floats and value.size <= _ENTRIES)


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
