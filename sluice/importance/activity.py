"""Scores of channels from activations and weights of an ONNX file, without gradients and without labels.

A layer that reads channel ``j`` as its input ``x`` adds ``W_j x_j`` to its output, in the mean square at most

    s_j = E[x_j^2] |W_j|^2

1. The score of a channel is the sum of this over the layers that read it, each divided by its sum over all channels:
   every layer counts alike, and sums of squares serve as well as means. They come from a run of the file, in which the
   file itself computes them. Each is computed as soon as its activation is there, so that none is kept for it.
2. A group that no such layer reads has the squared norms of the weights that make it.

Source: |W| |x| per weight is the score of Wanda (Sun et al., ICLR 2024); the sum over the entries of a channel is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.files.opset import opset_of
from sluice.passes.files.rows import Rows
from sluice.passes.graph.groups import Analysis, AxisGroup
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.runtime.targets import untimed_session

__all__ = ["activity_scores"]

AXES_ARE_INPUTS = 18  # the first operator set in which ReduceSumSquare takes its axes as an input
SQUARES = "sluice.squares."


@dataclass(frozen=True, slots=True)
class _Reader:
    """A layer: the value that it reads, that value's channel axis, its weight, the axis of the weight that reads."""

    value: str
    value_axis: int
    weight: str
    axis: int


def activity_scores(model: onnx.ModelProto, analysis: Analysis, rows: Rows) -> dict[str, np.ndarray]:
    """Scores by group, shape ``(size of the group,)``, none of them all zero."""
    graph = OnnxGraph(model)
    readers = {(one.weight, one.axis): one for one in _readers(graph, analysis)}
    wanted = {
        (readers[key].value, readers[key].value_axis)
        for group in analysis.groups
        for ref in group.refs
        if (key := (ref.param, ref.axis)) in readers and key not in analysis.producers
    }
    squares = _squares(model, sorted(wanted), analysis, rows)
    return {group.name: _score(group, graph, analysis, readers, squares) for group in analysis.groups}


def _readers(graph: OnnxGraph, analysis: Analysis) -> list[_Reader]:
    """All layers whose weight is an initialiser, but for grouped convolutions: these read a part of the channels."""
    found = []
    for node in graph.graph.node:
        if len(node.input) < 2 or node.input[1] not in graph.initializers or node.input[0] not in analysis.shapes:
            continue
        rank, dims = len(analysis.shapes[node.input[0]]), graph.initializers[node.input[1]].dims
        a = attributes(node)
        if node.op_type in ("Conv", "ConvTranspose") and a.get("group", 1) == 1:
            found.append(_Reader(node.input[0], 1, node.input[1], 1 if node.op_type == "Conv" else 0))
        elif node.op_type == "Gemm" and not a.get("transA"):
            found.append(_Reader(node.input[0], rank - 1, node.input[1], 1 if a.get("transB") else 0))
        elif node.op_type == "MatMul" and len(dims) == 2:
            found.append(_Reader(node.input[0], rank - 1, node.input[1], 0))
    return found


def _squares(
    model: onnx.ModelProto, wanted: list[tuple[str, int]], analysis: Analysis, rows: Rows
) -> dict[tuple[str, int], np.ndarray]:
    """By value and axis the sum of squares of every channel (rule 1)."""
    if not wanted:
        return {}
    probe = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    probe.graph.name = "squares"
    probe.graph.input.extend(OnnxGraph(model).inputs.values())
    tensors = list(model.graph.initializer)
    probes = dict[str, list[onnx.NodeProto]]()
    for index, (value, axis) in enumerate(wanted):
        name, others = f"{SQUARES}{index}", [d for d in range(len(analysis.shapes[value])) if d != axis]
        if opset_of(model) >= AXES_ARE_INPUTS:
            tensors.append(numpy_helper.from_array(np.array(others, np.int64), f"{name}.axes"))
            node = helper.make_node("ReduceSumSquare", [value, f"{name}.axes"], [name], keepdims=0)
        else:
            node = helper.make_node("ReduceSumSquare", [value], [name], keepdims=0, axes=others)
        probes.setdefault(value, []).append(node)
        probe.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for value in OnnxGraph(model).inputs:
        probe.graph.node.extend(probes.get(value, ()))
    for node in model.graph.node:
        probe.graph.node.append(node)
        for value in node.output:
            probe.graph.node.extend(probes.get(value, ()))
    session = untimed_session(probe, tensors)
    sums = [np.zeros(()) for _ in wanted]
    for feeds in rows.batches():
        found = session.run(feeds)
        sums = [total + found[f"{SQUARES}{k}"].astype(np.float64) for k, total in enumerate(sums)]
    return dict(zip(wanted, sums, strict=True))


def _score(
    group: AxisGroup, graph: OnnxGraph, analysis: Analysis, readers: Mapping[tuple[str, int], _Reader],
    squares: Mapping[tuple[str, int], np.ndarray],
) -> np.ndarray:  # fmt: skip
    read, made = np.zeros(group.size), np.zeros(group.size)
    for ref in group.refs:
        key = (ref.param, ref.axis)
        if ref.param not in graph.initializers:
            continue
        weight = numpy_helper.to_array(graph.initializers[ref.param])
        if weight.ndim < 2 or not np.issubdtype(weight.dtype, np.floating):
            continue
        rows = np.moveaxis(weight, ref.axis, 0).reshape(weight.shape[ref.axis], -1).astype(np.float64)
        norms, mine = (rows**2).sum(1), ref.channels >= 0
        if key in analysis.producers:
            np.add.at(made, ref.channels[mine], norms[mine])
        elif key in readers and (at := (readers[key].value, readers[key].value_axis)) in squares:
            own = np.zeros(group.size)
            np.add.at(own, ref.channels[mine], (norms * squares[at])[mine])
            read += own / max(own.sum(), np.finfo(float).tiny)
    found = read if read.any() else made
    return found if found.any() else np.ones(group.size)
