"""The work of a piece as a function of its extents: multiply-accumulates, elements moved, channels at its ends.

Every value of a piece has a number of elements that is affine in the extents, as one axis of it is labelled at most:

    elements(v) = rest(v) * (const(v) + sum_k coef_k(v) * extent_k)

An anchor operator multiplies the elements of its output by the channels that each of them reads (for a depthwise
convolution one). What a runtime fuses or does not, no number here knows: the cost law
(`sluice.profiler.fit.cost_law`) finds the milliseconds of work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.profiler.pieces.identity import compositions_of
from sluice.profiler.pieces.partition import Partition, Piece
from sluice.profiler.pieces.split import ANCHORS

__all__ = ["Work", "work_of"]


@dataclass(frozen=True, slots=True, eq=False)
class _Affine:
    """``scale * (const + points @ coefs)``."""

    scale: float
    const: float
    coefs: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        return self.scale * (self.const + points @ self.coefs)

    def times(self, factor: float) -> _Affine:
        return _Affine(self.scale * factor, self.const, self.coefs)


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
    macs: tuple[tuple[_Affine, _Affine], ...]
    moved: tuple[_Affine, ...]
    weights: tuple[tuple[_Affine, _Affine], ...]
    ends: tuple[_Affine, _Affine] | None

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
    graph = OnnxGraph(piece.model)
    macs: list[tuple[_Affine, _Affine]] = []
    weights: list[tuple[_Affine, _Affine]] = []
    kind, ends = "", None
    for node in piece.model.graph.node:
        if node.op_type not in ANCHORS or node.input[0] not in size.shapes:
            continue
        out, into = size.of(node.output[0]), _reads(node, size, graph)
        macs.append((out, into))
        made = size.channels(node.output[0])
        if not kind:
            kind, ends = _kind(node, graph), (size.channels(node.input[0]), made)
        weight = graph.initializers.get(node.input[1])
        if weight is not None:
            per_pair = math.prod(weight.dims) / max(1.0, math.prod(float(e.at(size.dense)[0]) for e in (made, into)))
            weights.append((made.times(per_pair), into))
    kind = kind or piece.model.graph.node[0].op_type
    seen = {n: None for node in piece.model.graph.node for n in (*node.input, *node.output) if n in size.shapes}
    active = [n for n in seen if n not in graph.initializers]
    return Work(kind, tuple(macs), tuple(size.of(n) for n in active), tuple(weights), ends)


class _Sizes:
    """Sizes of a piece's values as affine functions of its extents."""

    def __init__(self, piece: Piece, analysis: Analysis) -> None:
        self.analysis, self.shapes = analysis, analysis.shapes
        self.place = {group: k for k, extent in enumerate(piece.extents) for group, _ in extent.coefs}
        sizes: Mapping[str, int] = {group.name: group.size for group in analysis.groups}
        self.dense = np.array([[float(extent.at(sizes)) for extent in piece.extents]])

    def channels(self, value: str) -> _Affine:
        """The last labelled axis of the value, or else its second, or else nothing to speak of."""
        found, shape = next(reversed(compositions_of(self.analysis, value)), None), self.shapes[value]
        if found is None:
            plain = shape[1] if len(shape) > 2 else shape[-1] if shape else 1
            return _Affine(1.0, float(plain), np.zeros(self.dense.shape[1]))
        coefs = np.zeros(self.dense.shape[1])
        for group, coef in found.coefs.items():
            coefs[self.place[group]] = coef
        return _Affine(1.0, float(found.fixed), coefs)

    def of(self, value: str) -> _Affine:
        """The elements of the value."""
        channels = self.channels(value)
        return channels.times(math.prod(self.shapes[value]) / max(1.0, float(channels.at(self.dense)[0])))


def _reads(node: onnx.NodeProto, size: _Sizes, graph: OnnxGraph) -> _Affine:
    """Products behind every element that an anchor makes."""
    nothing = np.zeros(size.dense.shape[1])
    weight = graph.initializers.get(node.input[1])
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None:
        dims: Sequence[int] = list(weight.dims)
        area = float(math.prod(dims[2:]))
        into = size.channels(node.input[0])
        group = attributes(node).get("group", 1)
        if node.op_type == "ConvTranspose":  # every element that is read is spread out
            area *= math.prod(size.shapes[node.input[0]][2:]) / math.prod(size.shapes[node.output[0]][2:])
        if group > 1 and dims[1] == 1:
            return _Affine(area, 1.0, nothing)
        return into.times(area / group)
    shape = size.shapes[node.input[0]]
    into = size.channels(node.input[0])
    if float(into.at(size.dense)[0]) == shape[-1]:
        return into
    return _Affine(1.0, float(shape[-1]), nothing)


def _kind(node: onnx.NodeProto, graph: OnnxGraph) -> str:
    weight = graph.initializers.get(node.input[1])
    if weight is None or node.op_type not in ("Conv", "ConvTranspose"):
        return node.op_type
    depthwise = attributes(node).get("group", 1) > 1 and weight.dims[1] == 1
    return f"{node.op_type} {'x'.join(map(str, weight.dims[2:]))}" + (" depthwise" if depthwise else "")
