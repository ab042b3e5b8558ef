"""Cut the user's own exported graph into the pieces that are timed.

1. What belongs to a piece is `sluice.profiler.pieces.split`'s: an anchor, and what a runtime fuses with it.
2. Pieces of one identity (`sluice.profiler.pieces.identity`), in one network or in several, are timed once.
3. A piece at given widths is the same sub-graph, cut by the rewriter that will cut the whole graph.
4. Inputs that meet an operator other than an anchor are made by a source (`sluice.profiler.pieces.sources`). Not so
   what was concatenated: it is plain in the network too, but where all widths are whole blocks, which its joint tells.
   So it is marked as plain (`sluice.runtime.base.runner`, 6).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent
from sluice.passes.cut.resolve import tensor_masks
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.passes.graph.groups import Analysis, rename_groups
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.graph.static_shapes import static_graph
from sluice.profiler.pieces.identity import identify
from sluice.profiler.pieces.split import ANCHORS, Part, anchored_pads, split
from sluice.profiler.pieces.weightless import with_weights
from sluice.runtime.base.runner import PLAIN

FEWER = 4

__all__ = [
    "Partition",
    "Piece",
    "anchor_weight",
    "build_piece",
    "cut_out",
    "partition_graph",
    "spread_widths",
    "weight_bytes",
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

    ``small`` is the same graph at a smaller batch, for its joints; where there is none, they are measured at this one.
    """

    model: onnx.ModelProto
    analysis: Analysis
    pieces: tuple[Piece, ...]
    batch: int
    small: Partition | None = None

    @property
    def dense(self) -> dict[str, int]:
        return {group.name: group.size for group in self.analysis.groups}

    def masks(self, widths: Mapping[str, int]) -> list[np.ndarray]:
        """Keep the first ``widths[g]`` channels of every group (all where it is not named)."""
        return [np.arange(g.size) < widths.get(g.name, g.size) for g in self.analysis.groups]


def partition_graph(
    model: onnx.ModelProto,
    batch: int,
    exclude: Sequence[str] = (),
    names: Mapping[tuple[str, int], str] | None = None,
    *,
    small: bool = False,
) -> Partition:
    """All pieces of a dense model with named initialisers.

    Args:
        names: other names for groups, by a (tensor, axis) that they lie on.
        small: partition_graph it at a smaller batch too, if its batch is free.
    """
    for info in model.graph.input:
        first = next(iter(info.type.tensor_type.shape.dim), None)
        if first is not None and first.HasField("dim_value") and first.dim_value != batch and _is_static(model):
            raise SluiceError(
                f"the model fixes its batch: input {info.name!r} has {first.dim_value} rows, not {batch}; profile it "
                f"at batch={first.dim_value}, or change its forward() so that the batch stays free"
            )
    static = static_graph(model, batch)
    analysis = rename_groups(analyze_onnx(static, exclude), names or {})
    graph = OnnxGraph(static)
    parts = split(static.graph.node, {info.name for info in static.graph.input}, set(graph.outputs))
    pieces = cut_out(parts, range(len(parts)), static, analysis, graph.initializers, graph.infos)
    other = max(1, batch // FEWER)
    less = partition_graph(model, other, exclude, names) if small and other < batch and not _is_static(model) else None
    return Partition(static, analysis, pieces, batch, less)


def cut_out(
    parts: Sequence[Part],
    wanted: Iterable[int],
    like: onnx.ModelProto,
    analysis: Analysis,
    tensors: Mapping[str, onnx.TensorProto],
    infos: Mapping[str, onnx.ValueInfoProto],
) -> tuple[Piece, ...]:
    """The pieces of some of a graph's parts, by index, with the operator sets of the model ``like``.

    Args:
        tensors: the graph's initialisers.
        infos: types and sizes of the graph's activations.
    """
    anchors = [next((n for n in part.nodes if n.op_type in ANCHORS), part.nodes[0]) for part in parts]
    names = [next((n for n in node.input if n in tensors), node.output[0]).removesuffix(".weight") for node in anchors]
    joined = _concatenated(node for part in parts for node in part.nodes)
    pieces = []
    for index in wanted:
        part, name = parts[index], names[index]
        used = {n for node in part.nodes for n in node.input}
        graph = helper.make_graph(
            part.nodes,
            "piece",
            [infos[n] for n in part.inputs],
            [infos[n] for n in part.outputs],
            [tensors[n] for n in tensors if n in used],
            value_info=[infos[n] for n in part.made if n in infos and n not in part.outputs],
        )
        for info in graph.input:
            info.doc_string = PLAIN if info.name in joined else ""
        model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
        before = names[:index].count(name)  # one weight, used again
        own = name if not before else f"{name}#{before + 1}"
        same = identify(graph, analysis, part.inputs, part.outputs, joined)
        bare = _bare(part, joined)
        pieces.append(Piece(own, same.key, same.description, model, same.extents, part.inputs, part.outputs, bare))
    return tuple(pieces)


def anchor_weight(piece: Piece) -> str | None:
    """The named tensor of the piece's anchor, read directly or through a transpose; None where there is none."""
    graph = OnnxGraph(piece.model)
    for node in piece.model.graph.node:
        if node.op_type in ANCHORS and len(node.input) > 1:
            maker = graph.producers.get(node.input[1])
            name = maker.input[0] if maker is not None and maker.op_type == "Transpose" else node.input[1]
            return name if name in graph.initializers else None
    return None


def _is_static(model: onnx.ModelProto) -> bool:
    dims = [dim for info in model.graph.input for dim in info.type.tensor_type.shape.dim]
    return all(dim.HasField("dim_value") for dim in dims)


def build_piece(partition: Partition, piece: Piece, widths: Mapping[str, int]) -> onnx.ModelProto:
    """The piece with the first ``widths[g]`` channels of its groups, without sources; hollow weights are filled."""
    model = cut_graph(with_weights(piece.model), partition.analysis, partition.masks(widths))
    marks = {info.name: info.doc_string for info in piece.model.graph.input}
    for info in model.graph.input:
        info.doc_string = marks[info.name]
    return model


def weight_bytes(partition: Partition, piece: Piece, widths: Mapping[str, int]) -> int:
    """Bytes of the piece's weights (tensors of two and more axes) at the given widths, four per element."""
    masks = tensor_masks(partition.analysis, partition.masks(widths))
    total = 0
    for init in piece.model.graph.initializer:
        if len(init.dims) >= 2:
            kept = [int(masks[(init.name, k)].sum()) if (init.name, k) in masks else n for k, n in enumerate(init.dims)]
            total += 4 * int(np.prod(kept))
    return total


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
    """Inputs that need a source (rule 4)."""
    padded = anchored_pads(part.nodes, part.outputs)
    others = [n for n in part.nodes if n.op_type not in ANCHORS and not padded.keys() & set(n.output)]
    return tuple(n for n in part.inputs if n not in joined and any(n in node.input for node in others))


def _concatenated(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Activations that a concatenation made, or what is no anchor of such."""
    found: set[str] = set()
    for node in nodes:
        if node.op_type == "Concat" or (node.op_type not in ANCHORS and found.intersection(node.input)):
            found.update(node.output)
    return found
