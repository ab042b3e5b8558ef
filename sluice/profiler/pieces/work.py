"""The work of a piece as a function of its extents: multiply-accumulates, elements moved, channels at its ends.

Every labelled axis of a value has a number of positions that is a sum of products of extents, nearly always affine;
heads and their dimensions share an axis, and their product counts there. The elements of a value are

    elements(v) = rest(v) * prod over labelled axes of (const + sum_S coef_S * prod_{k in S} extent_k)

An anchor operator multiplies the elements of its output by the channels that each of them reads (for a depthwise
convolution one); a recurrent layer those of every gate by its input and its state. What a runtime fuses or does not, no
number here knows: the cost law (`sluice.profiler.fit.cost_law`) finds the milliseconds of work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.profiler.pieces.fused import name_of
from sluice.profiler.pieces.identity import Composition, compositions_of, weights_only
from sluice.profiler.pieces.partition import CONVOLUTIONS, Partition, Piece
from sluice.profiler.pieces.split import ANCHORS, RECURRENT

__all__ = ["Work", "work_of"]


Sum = Mapping[tuple[int, ...], float]  # by extents that are multiplied, their coefficient; the constant at ()


@dataclass(frozen=True, slots=True, eq=False)
class _Count:
    """``scale`` times the product of sums of products of extents."""

    scale: float
    factors: tuple[Sum, ...] = ()

    def at(self, points: np.ndarray) -> np.ndarray:
        found = np.full(len(points), self.scale)
        for factor in self.factors:
            found *= sum(coef * points[:, list(extents)].prod(1) for extents, coef in factor.items())
        return found

    def times(self, factor: float) -> _Count:
        return _Count(self.scale * factor, self.factors)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The work of a piece.

    Attributes:
        kind: operator and kernel of its anchor, ``Conv 3x3``, ``Conv 3x3 depthwise``; of the first operator where
            there is no anchor.
        macs: by anchor, elements of its output and the channels that each of them reads.
        moved: elements of every activation that is read or made, and of the weights by pairs as ``macs``.
        ends: channels that the anchor reads and makes.
    """

    kind: str
    macs: tuple[tuple[_Count, _Count], ...]
    moved: tuple[_Count, ...]
    weights: tuple[tuple[_Count, _Count], ...]
    ends: tuple[_Count, _Count] | None

    def at(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Multiply-accumulates and elements moved, shape ``(n,)`` each, at points of shape ``(n, extents)``."""
        macs, moved = np.zeros(len(points)), np.zeros(len(points))
        for out, into in self.macs:
            macs += out.at(points) * into.at(points)
        for one in self.moved:
            moved += one.at(points)
        return macs, moved + self.weights_at(points)

    def weights_at(self, points: np.ndarray) -> np.ndarray:
        """Elements of the weights at the points, shape ``(n,)``."""
        found = np.zeros(len(points))
        for out, into in self.weights:
            found += out.at(points) * into.at(points)
        return found

    def channels(self, points: np.ndarray) -> np.ndarray:
        """Channels that the anchor reads and makes at the points, shape ``(n, 2)``; one where there is no anchor."""
        if self.ends is None:
            return np.ones((len(points), 2))
        return np.stack([end.at(points) for end in self.ends], axis=1)


def work_of(piece: Piece, partition: Partition) -> Work:
    """The work of one piece of a partition."""
    size = _Sizes(piece, partition.analysis)
    held = weights_only(piece.model.graph, piece.inputs) | OnnxGraph(piece.model).initializers.keys()
    macs: list[tuple[_Count, _Count]] = []
    weights: list[tuple[_Count, _Count]] = []
    kind, ends = "", None
    for node in piece.model.graph.node:
        if node.op_type not in ANCHORS or node.input[0] not in size.shapes:
            continue
        made = size.channels(name_of(node))
        if not kind:
            kind, ends = _kind(node, size, held), (size.channels(node.input[0]), made)
        if node.op_type in RECURRENT:
            out, rows = _gates(node, size)
            for read in (size.channels(node.input[0]), made):
                macs.append((out, read))
                weights.append((rows, read))
            continue
        into = _reads(node, size, held)
        macs.append((size.of(node.output[0]), into))
        if node.input[1] in held:
            dims = size.shapes[node.input[1]]
            per_pair = math.prod(dims) / max(1.0, math.prod(float(e.at(size.dense)[0]) for e in (made, into)))
            weights.append((made.times(per_pair), into))
    kind = kind or piece.model.graph.node[0].op_type
    seen = {n: None for node in piece.model.graph.node for n in (*node.input, *node.output) if n in size.shapes}
    active = [n for n in seen if n not in held]
    return Work(kind, tuple(macs), tuple(size.of(n) for n in active), tuple(weights), ends)


class _Sizes:
    """Sizes of a piece's values by its extents."""

    def __init__(self, piece: Piece, analysis: Analysis) -> None:
        self.analysis, self.shapes = analysis, analysis.shapes
        self.place = {group: k for k, extent in enumerate(piece.extents) for group, _ in extent.coefs}
        sizes: Mapping[str, int] = {group.name: group.size for group in analysis.groups}
        self.dense = np.array([[float(extent.at(sizes)) for extent in piece.extents]])

    def axis(self, value: str, axis: int) -> _Count:
        """The positions on one axis of the value."""
        for found in compositions_of(self.analysis, value):
            if found.axis == axis % len(self.shapes[value]):
                return _Count(1.0, (self._sum(found),))
        return _Count(float(self.shapes[value][axis]))

    def channels(self, value: str) -> _Count:
        """The last labelled axis of the value, or else its second, or else nothing to speak of."""
        found, shape = next(reversed(compositions_of(self.analysis, value)), None), self.shapes[value]
        if found is None:
            return _Count(float(shape[1] if len(shape) > 2 else shape[-1] if shape else 1))
        return _Count(1.0, (self._sum(found),))

    def of(self, value: str) -> _Count:
        """The elements of the value."""
        factors = tuple(self._sum(found) for found in compositions_of(self.analysis, value))
        labelled = float(_Count(1.0, factors).at(self.dense)[0])
        return _Count(math.prod(self.shapes[value]) / max(1.0, labelled), factors)

    def _sum(self, found: Composition) -> Sum:
        """Groups of one extent, whose sum it is, all have the same coefficient."""
        own = {tuple(sorted(self.place[g] for g in names)): float(coef) for names, coef in found.coefs.items()}
        return {**own, (): float(found.fixed)}


def _reads(node: onnx.NodeProto, size: _Sizes, held: Collection[str]) -> _Count:
    """Products behind every element that an anchor makes."""
    if node.op_type in CONVOLUTIONS and node.input[1] in held:
        dims = size.shapes[node.input[1]]
        area = float(math.prod(dims[2:]))
        group = attributes(node).get("group", 1)
        if node.op_type == "ConvTranspose":  # every element that is read is spread out
            area *= math.prod(size.shapes[node.input[0]][2:]) / math.prod(size.shapes[node.output[0]][2:])
        if group > 1 and dims[1] == 1:
            return _Count(area)
        return size.channels(node.input[0]).times(area / group)
    if node.op_type == "Attention":  # an element of the context reads every position for its score and for itself
        return _Count(2.0 * size.shapes[node.input[1]][-2])
    return size.axis(node.input[0], -1)


def _gates(node: onnx.NodeProto, size: _Sizes) -> tuple[_Count, _Count]:
    """Elements of all gates that a recurrent layer computes, and rows of its weights, both ways in all."""
    ways, rows, hidden = size.shapes[node.input[2]]
    steps = size.shapes[node.input[0]][0]
    out = size.of(node.output[0]) if node.output[0] else size.of(node.output[1]).times(steps)
    made = size.channels(name_of(node))
    return out.times(rows / hidden), made.times(ways * rows / hidden)


def _kind(node: onnx.NodeProto, size: _Sizes, held: Collection[str]) -> str:
    if node.op_type not in CONVOLUTIONS or node.input[1] not in held:
        own = node.op_type != "MatMul" or node.input[1] in held
        return node.op_type if own else f"{node.op_type} of activations"
    dims = size.shapes[node.input[1]]
    depthwise = attributes(node).get("group", 1) > 1 and dims[1] == 1
    return f"{node.op_type} {'x'.join(map(str, dims[2:]))}" + (" depthwise" if depthwise else "")
