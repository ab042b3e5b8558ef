"""The partition of the user's own exported graph into the pieces that are timed.

1. A piece is an anchor operator and what a runtime fuses with it (`sluice.profiler.pieces.split`).
2. Pieces of one identity (`sluice.profiler.pieces.identity`), in one network or in several, are timed once.
3. A piece at given widths is the same sub-graph, cut by the rewriter that will cut the whole graph.
4. A source (`sluice.profiler.pieces.sources`) makes each input that meets another operator than an anchor, if a
   convolution laid it out in the network. What a matrix product, a norm over the last axis or a reshape made is plain
   there, and needs none. A concatenated input has no source either. It is plain in the network too, unless all widths
   are whole blocks, and then its joint tells the difference. So it is marked (`sluice.runtime.base.runner`, 6).
5. Images that enter or leave the network are plain there, whatever lies inside. They are marked where pieces follow
   kernels, so that a piece at an end of the network has the change of layout that the network has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.passes.graph.groups import Analysis, agreeing, rename_groups
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, reads
from sluice.passes.graph.static_shapes import static_graph
from sluice.profiler.pieces.identity import identify
from sluice.profiler.pieces.split import ANCHORS, RECURRENT, Part, anchored_pads, split
from sluice.profiler.pieces.weightless import with_weights
from sluice.runtime.base.runner import PLAIN

FEWER = 4
IMAGE = 4  # axes
CONVOLUTIONS = frozenset(["Conv", "ConvTranspose"])
LAYS_OUT = frozenset(["Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"])
PLAINLY = frozenset(["Einsum", "Expand", "Flatten", "Gather", "LayerNormalization", "Reshape", "Squeeze", "Transpose",
                     "Unsqueeze"])  # fmt: skip

__all__ = [
    "Partition",
    "Piece",
    "anchor_weight",
    "build_piece",
    "cut_out",
    "ends_of",
    "of_parts",
    "partition_graph",
    "partition_static",
    "parts_of",
    "spread_widths",
    "static_at",
    "weights_of",
    "with_small",
]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One piece at dense widths. ``inputs``/``outputs`` are the activations it shares with other pieces."""

    name: str
    key: str
    description: str
    model: onnx.ModelProto
    extents: tuple[Extent, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bare: tuple[str, ...] = ()  # inputs that need a source (rule 4)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(group for extent in self.extents for group, _ in extent.coefs)


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """A graph at one batch, its analysis and its pieces in execution order.

    ``small`` is the same graph at a smaller batch, for its joints; without it joints are measured at this batch.
    ``by_kernels``: its pieces follow the kernels of engines (`sluice.profiler.pieces.fused`), but for those
    ``in_several`` pieces.
    """

    model: onnx.ModelProto
    analysis: Analysis
    pieces: tuple[Piece, ...]
    batch: int
    small: Partition | None = None
    by_kernels: bool = False
    in_several: tuple[frozenset[str], ...] = ()

    @property
    def dense(self) -> dict[str, int]:
        return {group.name: group.size for group in self.analysis.groups}

    def masks(self, widths: Mapping[str, int]) -> list[np.ndarray]:
        """Keep the first ``widths[g]`` channels of every group (all where it is not named)."""
        return [np.arange(g.size) < widths.get(g.name, g.size) for g in self.analysis.groups]


def partition_graph(
    model: onnx.ModelProto,
    batch: int,
    *,
    like: Analysis | None = None,
    names: Mapping[tuple[str, int], str] | None = None,
    base: Analysis | None = None,
    by_kernels: bool = False,
) -> Partition:
    """All pieces of a dense model with named initialisers.

    Args:
        like: the groups whose widths may be chosen, and their names; all groups of the graph by default.
        names, base: other names for groups, by a (tensor, axis) that they lie on, or of a graph that has them as well.
        by_kernels: mark the ends of the network (rule 5).
    Raises:
        SluiceError: the model fixes another batch.
    """
    static = static_at(model, batch)
    analysis = rename_groups(analyze_onnx(static, dims=any(a.dims for a in (like, base) if a)), names or {}, base)
    if like is not None:
        analysis = replace(agreeing(analysis, like, "is left alone"), frozen=like.frozen)
    return of_parts(parts_of(static), static, analysis, batch, ends_of(static) if by_kernels else ())


def partition_static(static: onnx.ModelProto, analysis: Analysis, batch: int) -> Partition:
    """All pieces of what `static_at` returned; ``analysis`` is of that graph."""
    return of_parts(parts_of(static), static, analysis, batch)


def parts_of(static: onnx.ModelProto) -> list[Part]:
    """The parts of what `static_at` returned, one for every piece."""
    graph = OnnxGraph(static)
    entering, leaving = {info.name for info in static.graph.input}, set(graph.outputs)
    return split(static.graph.node, entering, leaving, _means(static.graph.node, graph))


def of_parts(
    parts: Sequence[Part], static: onnx.ModelProto, analysis: Analysis, batch: int, ends: Collection[str] = ()
) -> Partition:
    """The partition of a graph into given parts; ``ends`` are marked as plain (rule 5)."""
    graph = OnnxGraph(static)
    pieces = cut_out(parts, range(len(parts)), static, analysis, graph.initializers, graph.infos, ends)
    return Partition(static, analysis, pieces, batch)


def ends_of(static: onnx.ModelProto) -> frozenset[str]:
    """The images among inputs and outputs of a graph (rule 5)."""
    infos = (*static.graph.input, *static.graph.output)
    return frozenset(info.name for info in infos if len(info.type.tensor_type.shape.dim) == IMAGE)


def with_small(partition: Partition, model: onnx.ModelProto) -> Partition:
    """The partition of ``model`` with that at a smaller batch (`Partition.small`), if its batch is free."""
    other = max(1, partition.batch // FEWER)
    if other == partition.batch or _is_static(model):
        return partition
    return replace(partition, small=partition_graph(model, other, like=partition.analysis))


def static_at(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The graph at one batch, all sizes known; an input beside those with the batch may have rows of its own.

    Raises:
        SluiceError: the model fixes another batch.
    """
    rows = [(info.name, dims[0].dim_value) for info in model.graph.input if (dims := info.type.tensor_type.shape.dim)]
    if rows and _is_static(model) and batch not in [fixed for _, fixed in rows]:
        name, fixed = rows[0]
        raise SluiceError(
            f"the model fixes its batch: input {name!r} has {fixed} rows, not {batch}; profile it at batch={fixed}, or "
            "change its forward() so that the batch stays free"
        )
    return static_graph(model, batch)


def cut_out(
    parts: Sequence[Part],
    wanted: Iterable[int],
    like: onnx.ModelProto,
    analysis: Analysis,
    tensors: Mapping[str, onnx.TensorProto],
    infos: Mapping[str, onnx.ValueInfoProto],
    ends: Collection[str] = (),
) -> tuple[Piece, ...]:
    """The pieces of some of a graph's parts, by index, with the operator sets of the model ``like``.

    Args:
        tensors: the graph's initialisers.
        infos: types and sizes of the graph's activations.
        ends: inputs and outputs of the network that are marked as plain (rule 5).
    """
    anchors = [next((n for n in part.nodes if n.op_type in ANCHORS), part.nodes[0]) for part in parts]
    producers = {name: node for part in parts for node in part.nodes for name in node.output}
    behind = [weights_of(node, producers, tensors) if node.op_type in ANCHORS else () for node in anchors]
    names = [(w[0] if w else n.output[0]).removesuffix(".weight") for w, n in zip(behind, anchors, strict=True)]
    joined = _concatenated(node for part in parts for node in part.nodes)
    laid = _laid(node for part in parts for node in part.nodes)
    pieces = []
    for index in wanted:
        part, name = parts[index], names[index]
        used = {n for node in part.nodes for n in reads(node)}
        graph = helper.make_graph(
            part.nodes,
            "piece",
            [infos[n] for n in part.inputs],
            [infos[n] for n in part.outputs],
            [tensors[n] for n in tensors if n in used],
            value_info=[infos[n] for n in part.made if n in infos and n not in part.outputs],
        )
        for info in graph.input:
            info.doc_string = PLAIN if info.name in joined or info.name in ends else ""
        for info in graph.output:
            info.doc_string = PLAIN if info.name in ends else ""
        model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
        before = names[:index].count(name)  # one weight, used again
        own = name if not before else f"{name}#{before + 1}"
        meets = _bare(part, joined)
        bare = tuple(n for n in meets if n in laid)
        same = identify(graph, analysis, part.inputs, part.outputs, joined, unlaid=set(meets) - laid, ends=ends)
        pieces.append(Piece(own, same.key, same.description, model, same.extents, part.inputs, part.outputs, bare))
    return tuple(pieces)


def anchor_weight(piece: Piece) -> str | None:
    """The named tensor that the piece's anchor reads, directly or as part of a packed one; None where there is none."""
    graph = OnnxGraph(piece.model)
    for node in piece.model.graph.node:
        if node.op_type in ANCHORS and len(node.input) > 1:
            return next(iter(weights_of(node, graph.producers, graph.initializers)), None)
    return None


def weights_of(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], tensors: Collection[str]) -> list[str]:
    """The named tensors behind an anchor's weights, through operators that lay them out."""
    found, names = dict[str, None](), list(reversed(node.input[1:3] if node.op_type in RECURRENT else node.input[1:2]))
    while names:
        name = names.pop()
        if name in tensors:
            found[name] = None
        elif (maker := producers.get(name)) is not None and maker.op_type in LAYS_OUT:
            names += reversed(maker.input if maker.op_type == "Concat" else maker.input[:1])
    return list(found)


def _is_static(model: onnx.ModelProto) -> bool:
    dims = [dim for info in model.graph.input for dim in info.type.tensor_type.shape.dim]
    return all(dim.HasField("dim_value") for dim in dims)


def build_piece(partition: Partition, piece: Piece, widths: Mapping[str, int]) -> onnx.ModelProto:
    """The piece with the first ``widths[g]`` channels of its groups, without sources; no tensor is weightless."""
    model = with_weights(cut_graph(piece.model, partition.analysis, partition.masks(widths)))
    marks = {info.name: info.doc_string for info in (*piece.model.graph.input, *piece.model.graph.output)}
    for info in (*model.graph.input, *model.graph.output):
        info.doc_string = marks[info.name]
    return model


def spread_widths(piece: Piece, values: Sequence[int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Group widths with the given extents; a total is shared out in proportion to the dense sizes."""
    widths: dict[str, int] = {}
    for extent, value in zip(piece.extents, values, strict=True):
        names = [group for group, _ in extent.coefs]
        full = sum(sizes[n] for n in names)
        shares = [max(1, min(sizes[n], round(value * sizes[n] / full))) for n in names]
        order = sorted(range(len(names)), key=lambda i: -sizes[names[i]])
        while (gap := value - sum(shares)) != 0:
            before = sum(shares)
            for i in order:
                step = int(np.sign(value - sum(shares)))
                if step and 1 <= shares[i] + step <= sizes[names[i]]:
                    shares[i] += step
            if sum(shares) == before:
                raise AssertionError(f"extent {extent} cannot be {value} (off by {gap})")
        widths.update(zip(names, shares, strict=True))
    return widths


def _bare(part: Part, joined: Collection[str]) -> tuple[str, ...]:
    """Inputs that need a source (rule 4) if they are laid out in blocks."""
    padded = anchored_pads(part.nodes, part.outputs)
    others = [n for n in part.nodes if n.op_type not in ANCHORS and not padded.keys() & set(n.output)]
    return tuple(n for n in part.inputs if n not in joined and any(n in node.input for node in others))


def _laid(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Activations that a convolution made, directly or through operators that keep its layout."""
    found: set[str] = set()
    for node in nodes:
        anchor = node.op_type in ANCHORS
        if node.op_type in CONVOLUTIONS or (
            not anchor and node.op_type not in PLAINLY and found.intersection(node.input)
        ):
            found.update(node.output)
    return found


def _means(nodes: Sequence[onnx.NodeProto], graph: OnnxGraph) -> set[str]:
    """Reductions over positions of what no convolution laid out; those over the last axis belong to norms."""
    laid, found = _laid(nodes), set[str]()
    for node in nodes:
        if node.op_type.startswith("Reduce") and node.input[0] not in laid and node.input[0] in graph.infos:
            axes = attributes(node).get("axes", graph.literals.get(node.input[1] if len(node.input) > 1 else ""))
            rank = len(graph.infos[node.input[0]].type.tensor_type.shape.dim)
            if axes is not None and rank - 1 not in {int(axis) % rank for axis in axes}:
                found.add(node.output[0])
    return found


def _concatenated(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Activations that a concatenation made, directly or through operators that are no anchors."""
    found: set[str] = set()
    for node in nodes:
        if node.op_type == "Concat" or (node.op_type not in ANCHORS and found.intersection(node.input)):
            found.update(node.output)
    return found
