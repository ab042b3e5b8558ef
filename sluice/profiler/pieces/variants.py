"""Restructured graphs: where the pieces of factorised layers come from (and, in `sluice.profiler.pieces.merged`, of
runs).

What would take a layer's place is cut out of the user's own graph as well: the graph is rewritten with *every* layer
that allows it in one form, at the largest rank that may pay, and dissected like the dense one. The rank is then the
width of one more axis group, and a factorised layer is two pieces of that graph and the joint between them.

1. Only layers that matter (`SHARE` of the dense cost) have variants. Their largest rank is the largest useful one that
   is a multiple of what kernels load at once, as all ranks that are tried.
2. The groups of a restructured graph are those of the dense one, found by the tensors they lie on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sluice.core.plan import FORMS, Factorize
from sluice.passes.cut.factor import first_name, forms_of, random_factors, second_name, useful_rank
from sluice.passes.cut.factor_onnx import factorize_onnx
from sluice.passes.cut.merge_ties import groups_on
from sluice.passes.graph.onnx_graph import attributes
from sluice.passes.search_space import SearchSpace
from sluice.profiler.pieces.levels import step_of
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight, partition_graph
from sluice.profiler.pieces.split import ANCHORS
from sluice.solver.options import EditSpace, RankOption

__all__ = [
    "Alternatives",
    "LayerReplacement",
    "OfferedReplacement",
    "RestructuredGraph",
    "rank_layers",
    "rank_variants",
]

SHARE = 0.004


@dataclass(frozen=True, slots=True, eq=False)
class LayerReplacement:
    """What takes the place of ``layers`` (weights) under ``switch``: pieces, and the tensors between them.

    ``ends`` are the tensors of the dense graph that the pieces of a merged run make.
    """

    switch: str
    layers: tuple[str, ...]
    pieces: tuple[Piece, ...]
    inner: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    rank: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RestructuredGraph:
    """One restructured graph, of which the partition holds at least the pieces of the places, and the places."""

    partition: Partition
    places: tuple[LayerReplacement, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OfferedReplacement:
    """A place that may pay, in its graph, and the ranks at which it may."""

    place: LayerReplacement
    partition: Partition
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Alternatives:
    """The options worth offering, and the pieces of those that have any."""

    options: EditSpace
    shown: tuple[OfferedReplacement, ...] = ()
    without_weight: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by drop, pieces that go with it


def rank_layers(base: Partition, dense_ms: Mapping[str, float], space: SearchSpace) -> dict[str, Piece]:
    """Weights whose forms may be offered, and the dense piece of each (``dense_ms``: milliseconds by piece name)."""
    total = sum(dense_ms.values())
    found: dict[str, Piece] = {}
    for piece in base.pieces:
        weight = anchor_weight(piece)
        if weight is not None and weight in space.ranks and dense_ms[piece.name] >= SHARE * total:
            found[weight] = piece
    return found


def rank_variants(base: Partition, layers: Mapping[str, Piece], precision: str) -> list[RestructuredGraph]:
    """One variant per form that any of the layers can take."""
    variants = []
    for form in FORMS:
        edits = [
            Factorize(weight, form, _most(base, weight, piece, form, precision))
            for weight, piece in layers.items()
            if form in forms_of(base.analysis.tensors[weight])
        ]
        if edits:
            variant = _rank_variant(base, edits)
            if base.small is not None:
                less = _rank_variant(base.small, edits).partition
                variant = replace(variant, partition=replace(variant.partition, small=less))
            variants.append(variant)
    return variants


def _rank_variant(base: Partition, edits: Sequence[Factorize]) -> RestructuredGraph:
    names, flipped = groups_on(base.analysis), _flipped(base)
    for edit in edits:
        first, second = first_name(edit.param), second_name(edit.param)
        out, into = (1, 0) if edit.param in flipped else (0, 1)  # factors lie as their weight does
        for own, of in (((second, out), (edit.param, out)), ((first, into), (edit.param, into))):
            if of in names:
                names[own] = names[of]
        names[(first, out)] = names[(second, into)] = RankOption(edit.param, edit.form).rank
    model = factorize_onnx(base.model, edits, split=random_factors)
    cut = partition_graph(model, base.batch, names=names, base=base.analysis, by_kernels=base.by_kernels)
    by_weight = {anchor_weight(piece): piece for piece in cut.pieces}
    sizes = cut.dense
    places = []
    for edit in edits:
        option = RankOption(edit.param, edit.form)
        pieces = (by_weight[first_name(edit.param)], by_weight[second_name(edit.param)])
        if option.rank in sizes:  # a rank of one has no axis to choose on
            places.append(LayerReplacement(option.switch, (edit.param,), pieces, pieces[0].outputs, rank=option.rank))
    return RestructuredGraph(cut, tuple(places))


def _flipped(base: Partition) -> set[str]:
    """Weights of matrix products that are stored as (in, out)."""
    return {
        node.input[1]
        for node in base.model.graph.node
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB"))
    }


def _most(base: Partition, weight: str, piece: Piece, form: str, precision: str) -> int:
    anchor = next(n for n in piece.model.graph.node if n.op_type in ANCHORS)
    shapes = base.analysis.shapes
    into, out = shapes[anchor.input[0]], shapes[anchor.output[0]]
    areas = (math.prod(out[2:]), math.prod(into[2:])) if anchor.op_type == "Conv" else (1, 1)
    rank = useful_rank(base.analysis.tensors[weight], form, out_area=areas[0], in_area=areas[1])
    return rank - rank % step_of(rank, precision)
