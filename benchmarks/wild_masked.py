"""The original whose removed consumer columns are zero: what a cut network has to equal, made without the rewriter.

1. Whatever reads a removed channel by weights reads it with zeros. Rows that make it stay, so the channel is alive.
2. A sum over channels has no weights. Its removed entries are set to zero; a mean divides by the number of those kept.
3. A layer norm is written out in such sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes

__all__ = ["masked"]

SUMS = ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")


def masked(model: onnx.ModelProto, analysis: Analysis, keeps: Sequence[np.ndarray]) -> onnx.ModelProto:
    """The model with the channels masked that ``keeps`` leaves out, group by group."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    made = set(analysis.producers)
    tensors = OnnxGraph(done).initializers
    for group, keep in zip(analysis.groups, keeps, strict=True):
        for ref in group.refs:
            if (ref.param, ref.axis) in made:
                continue
            array = numpy_helper.to_array(tensors[ref.param]).copy()
            gone = (ref.channels >= 0) & ~keep[ref.channels]
            np.moveaxis(array, ref.axis, 0)[gone] = 0
            tensors[ref.param].CopyFrom(numpy_helper.from_array(array, ref.param))
    writer = _Writer(done, analysis, keeps)
    nodes = [new for node in done.graph.node for new in writer.written(node)]
    del done.graph.node[:]
    done.graph.node.extend(nodes)
    return done


class _Writer:
    def __init__(self, model: onnx.ModelProto, analysis: Analysis, keeps: Sequence[np.ndarray]):
        self.graph, self.read, self.analysis, self.keeps = model.graph, OnnxGraph(model), analysis, keeps

    def written(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        lost = {}
        for axis in self.analysis.values.get(node.input[0], ()) if node.input else ():
            if not (mask := axis.mask(self.keeps)).all():
                lost[axis.dim] = mask
        shape = self.analysis.shapes.get(node.input[0], ()) if node.input else ()
        axes = self._axes(node, len(shape))
        lost = {dim: mask for dim, mask in lost.items() if dim in axes}
        if not lost:
            return [node]
        keep = np.ones((), dtype=np.float32)
        for dim, mask in lost.items():
            keep = keep * mask.reshape([-1 if d == dim else 1 for d in range(len(shape))]).astype(np.float32)
        share = math.prod(mask.mean() for mask in lost.values())
        if node.op_type == "LayerNormalization":
            return self._norm(node, keep, share, sorted(axes))
        hidden = self.read.fresh(f"{node.input[0]}.masked")
        factor = keep / share if node.op_type == "ReduceMean" else keep
        times = helper.make_node("Mul", [node.input[0], self._held(hidden, factor)], [hidden])
        node.input[0] = hidden
        return [times, node]

    def _axes(self, node: onnx.NodeProto, rank: int) -> set[int]:
        given = attributes(node)
        if node.op_type == "LayerNormalization":
            return set(range(given.get("axis", -1) % rank, rank)) if rank else set()
        if node.op_type not in SUMS or not rank:
            return set()
        listed = self.read.array(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        axes = given.get("axes") or (listed.tolist() if listed is not None else range(rank))
        return {axis % rank for axis in axes}

    def _held(self, stem: str, array: np.ndarray) -> str:
        name = self.read.fresh(f"{stem}.mask")
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype=np.float32), name))
        return name

    def _norm(self, node: onnx.NodeProto, keep: np.ndarray, share: float, axes: list[int]) -> list[onnx.NodeProto]:
        """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the entries kept."""
        x, out, stem = node.input[0], node.output[0], node.output[0]
        over, mask = self._held(stem, keep / share), self._held(stem, keep)
        epsilon = self._held(stem, np.array(attributes(node).get("epsilon", 1e-5)))
        names = [self.read.fresh(f"{stem}.{k}") for k in range(8)]
        steps = [
            helper.make_node("Mul", [x, over], [names[0]]),
            helper.make_node("ReduceMean", [names[0]], [names[1]], axes=axes),
            helper.make_node("Sub", [x, names[1]], [names[2]]),
            helper.make_node("Mul", [names[2], names[2]], [names[3]]),
            helper.make_node("Mul", [names[3], over], [names[4]]),
            helper.make_node("ReduceMean", [names[4]], [names[5]], axes=axes),
            helper.make_node("Add", [names[5], epsilon], [names[6]]),
            helper.make_node("Sqrt", [names[6]], [names[7]]),
        ]
        divided, scaled, kept = (self.read.fresh(f"{stem}.{w}") for w in ("divided", "scaled", "kept"))
        steps.append(helper.make_node("Div", [names[2], names[7]], [divided]))
        steps.append(helper.make_node("Mul", [divided, mask], [kept]))
        has_bias = len(node.input) > 2 and node.input[2]
        steps.append(helper.make_node("Mul", [kept, node.input[1]], [scaled if has_bias else out]))
        return [*steps, helper.make_node("Add", [scaled, node.input[2]], [out])] if has_bias else steps
