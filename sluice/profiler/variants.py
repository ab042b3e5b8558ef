"""Restructured graphs: where the pieces of factorised layers and merged runs come from.

What would take a layer's place is cut out of the user's own graph as well: the graph is rewritten with *every* layer
that allows it in one form, at the largest rank worth measuring, and dissected like the dense one. The rank is then the
width of one more axis group, and a factorised layer is two pieces of that graph and the joint between them. Merged
runs that do not overlap share a graph in the same way.

1. Only layers that matter (`SHARE` of the dense cost) have variants.
2. The groups of a restructured graph are those of the dense one, found by the tensors they lie on.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import numpy_helper

from sluice.passes.factor import first_name, forms_of, random_factors, second_name, useful_rank
from sluice.passes.factor_onnx import factorize_onnx
from sluice.passes.merge_onnx import chains_onnx, merge_onnx
from sluice.passes.onnx_axes import attributes
from sluice.passes.options import Options, RankOption, groups_on, inside
from sluice.passes.segments import Segment, find_segments, folded_norms, swallowed
from sluice.passes.sites import module_of
from sluice.plan import FORMS, Factorize, Merge
from sluice.profiler.pieces import ANCHORS, Dissection, Piece, anchor_weight, dissect
from sluice.profiler.sweep import Staircase

__all__ = ["Alternatives", "Place", "Shown", "Variant", "is_excluded", "rank_layers", "rank_variants"]

SHARE = 0.004
MORE = 1.5
LARGEST = 9  # kernels beyond this have no fast algorithm anywhere
LEAST = 8  # a weight with fewer rows or columns has no rank to choose


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What takes the place of ``layers`` (weights) under ``switch``: pieces, and the tensors between them."""

    switch: str
    layers: tuple[str, ...]
    pieces: tuple[Piece, ...]
    inner: tuple[str, ...] = ()
    rank: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One restructured graph and the places it shows."""

    dissection: Dissection
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A place with the staircases of its graph; its pieces are measured at up to ``most`` points each."""

    place: Place
    dissection: Dissection
    stairs: Mapping[str, Staircase]
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class Alternatives:
    """The options worth offering, and the measured pieces of those that have any."""

    options: Options
    shown: tuple[Shown, ...] = ()
    without_weight: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by drop, pieces that go with it


@dataclass(frozen=True, slots=True, eq=False)
class MergeSite:
    """A run that may be merged, and every weight that goes (projections of swallowed blocks included).

    ``apart``: what the run keeps stays as several convolutions, linear between them, since those may be faster.
    """

    segment: Segment
    gone: tuple[str, ...]
    apart: bool = False

    @property
    def merge(self) -> Merge:
        return self.segment.merge(tuple((name,) for name in self.segment.kept) if self.apart else None)

    @property
    def switch(self) -> str:
        """The same for both ways to carry out the segment, as only the faster one is offered."""
        return f"{self.merge.name}|merge {'x'.join(map(str, self.segment.kernel))}"


def is_excluded(param: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern means this tensor, its module or one around it, as for widths."""
    module = module_of(param)
    return any(fnmatch.fnmatchcase(n, p) for n in (param, module) for p in exclude) or any(
        module.startswith(p + ".") for p in exclude
    )


def rank_layers(base: Dissection, dense_ms: Mapping[str, float], exclude: Sequence[str] = ()) -> dict[str, Piece]:
    """Weights that may be factorised, and the dense piece of each (``dense_ms``: milliseconds by piece name)."""
    readers: dict[str, int] = {}
    for node in base.model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    total = sum(dense_ms.values())
    found: dict[str, Piece] = {}
    for piece in base.pieces:
        weight = anchor_weight(piece)
        if weight is None or readers[weight] != 1 or dense_ms[piece.name] < SHARE * total:
            continue
        shape = base.analysis.tensors[weight]
        anchor = next(n for n in piece.model.graph.node if n.op_type in ANCHORS)
        grouped = attributes(anchor).get("group", 1) != 1 or anchor.op_type == "ConvTranspose"
        if not grouped and not is_excluded(weight, exclude) and min(shape[0], math.prod(shape[1:])) >= LEAST:
            found[weight] = piece
    return found


def rank_variants(base: Dissection, layers: Mapping[str, Piece], batch: int) -> list[Variant]:
    """One variant per form that any of the layers can take."""
    variants = []
    for form in FORMS:
        edits = [
            Factorize(weight, form, _most(base, weight, piece, form))
            for weight, piece in layers.items()
            if form in forms_of(base.analysis.tensors[weight])
        ]
        if edits:
            variants.append(_rank_variant(base, edits, batch))
    return variants


def _rank_variant(base: Dissection, edits: Sequence[Factorize], batch: int) -> Variant:
    names, flipped = groups_on(base.analysis), _flipped(base)
    for edit in edits:
        first, second = first_name(edit.param), second_name(edit.param)
        out, into = (1, 0) if edit.param in flipped else (0, 1)  # factors lie as their weight does
        for own, of in (((second, out), (edit.param, out)), ((first, into), (edit.param, into))):
            if of in names:
                names[own] = names[of]
        names[(first, out)] = names[(second, into)] = RankOption(edit.param, edit.form).rank
    cut = dissect(factorize_onnx(base.model, edits, split=random_factors), batch, names=names)
    by_weight = {anchor_weight(piece): piece for piece in cut.pieces}
    sizes = cut.dense
    places = []
    for edit in edits:
        option = RankOption(edit.param, edit.form)
        pieces = (by_weight[first_name(edit.param)], by_weight[second_name(edit.param)])
        if option.rank in sizes:  # a rank of one has no axis to choose on
            places.append(Place(option.switch, (edit.param,), pieces, pieces[0].outputs, option.rank))
    return Variant(cut, tuple(places))


def _flipped(base: Dissection) -> set[str]:
    """Weights of matrix products that are stored as (in, out)."""
    return {
        node.input[1]
        for node in base.model.graph.node
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB"))
    }


def merge_segments(base: Dissection, exclude: Sequence[str] = (), *, widths_vary: bool = True) -> list[MergeSite]:
    """The merged runs worth timing, and where layers are removed from a run also what is left of it unmerged.

    A run is left out if its convolution alone multiplies more than `MORE` times what the layers do that it replaces,
    or if it removes a layer between two widths that are chosen apart (``widths_vary``).
    """
    tensors = {init.name: numpy_helper.to_array(init) for init in base.model.graph.initializer}
    on = groups_on(base.analysis)
    found = []
    for chain in chains_onnx(base.model):
        banned = {layer.weight for layer in chain.layers if is_excluded(layer.weight, exclude)}
        for segment in find_segments(chain, folded_norms(chain, tensors), banned):
            if len(segment.layers) < 2:
                continue
            within = inside(base.analysis, segment.layers, segment.kept, on)
            if widths_vary and any(len(within.outer(together)) > 1 for together in within.tied):
                continue
            spans = swallowed(chain, segment.start, segment.end)
            gone = (*segment.layers, *(s.shortcut.weight for s in spans if s.shortcut is not None))
            first, last = (base.analysis.tensors[segment.layers[k]] for k in (0, -1))
            out = base.analysis.shapes[chain.layers[segment.end - 1].value]
            channels = last[0] * (1 if segment.depthwise else first[1])
            macs = math.prod(out[2:]) * channels * math.prod(segment.kernel)
            replaced = sum(
                math.prod(base.analysis.shapes[layer.value][2:]) * math.prod(base.analysis.tensors[layer.weight])
                for layer in chain.layers[segment.start : segment.end]
            )
            if macs <= MORE * replaced and max(segment.kernel) <= LARGEST:
                found.append(MergeSite(segment, gone))
            if 1 < len(segment.kept) < len(segment.layers) and len(gone) == len(segment.layers):
                found.append(MergeSite(segment, gone, apart=True))
    return found


def merge_variants(
    base: Dissection, sites: Sequence[MergeSite], batch: int
) -> Iterator[tuple[Variant, list[MergeSite]]]:
    """Graphs that show every site once, and the sites of each; those that do not overlap share one."""
    shelves: list[list[MergeSite]] = []
    for site in sites:
        shelf = next((s for s in shelves if not any(set(site.gone) & set(other.gone) for other in s)), None)
        if shelf is None:
            shelves.append([site])
        else:
            shelf.append(site)
    for shelf in shelves:  # one at a time: every graph holds the network's weights
        yield _merge_variant(base, shelf, batch), shelf


def _merge_variant(base: Dissection, sites: Sequence[MergeSite], batch: int) -> Variant:
    on = groups_on(base.analysis)
    names = dict(on)
    for site in sites:
        merge = site.merge
        own = {key: names.pop(key) for layer in merge.layers for key in ((layer, 0), (layer, 1)) if key in names}
        within = inside(base.analysis, merge.layers, site.segment.kept, on)
        # An inner group that removed layers tie to one that others see goes by its name.
        called: dict[str, str | None] = {group: group for group in own.values() if group not in within.inner}
        for together in within.tied:
            lead = next(iter(within.outer(together)), None)
            called |= {group: lead for group in within.inner & together}
        ends = {(merge.runs[0][-1], 1): (merge.layers[0], 1), (merge.runs[-1][-1], 0): (merge.layers[-1], 0)}
        for key in ((run[-1], axis) for run in merge.runs for axis in (0, 1)):
            group = own.get(ends.get(key, key))
            if group is not None:  # what nothing outside sees stays as wide as it is
                names[key] = called.get(group) or f"{group} in {site.switch}"
    cut = dissect(merge_onnx(base.model, [site.merge for site in sites], values=False), batch, names=names)
    by_weight = {anchor_weight(piece): piece for piece in cut.pieces}
    places = []
    for site in sites:
        pieces = tuple(by_weight[run[-1]] for run in site.merge.runs)
        inner = tuple(tensor for piece in pieces[:-1] for tensor in piece.outputs)
        places.append(Place(site.switch, site.gone, pieces, inner))
    return Variant(cut, tuple(places))


def _most(base: Dissection, weight: str, piece: Piece, form: str) -> int:
    anchor = next(n for n in piece.model.graph.node if n.op_type in ANCHORS)
    shapes = base.analysis.shapes
    into, out = shapes[anchor.input[0]], shapes[anchor.output[0]]
    areas = (math.prod(out[2:]), math.prod(into[2:])) if anchor.op_type == "Conv" else (1, 1)
    return useful_rank(base.analysis.tensors[weight], form, out_area=areas[0], in_area=areas[1])
