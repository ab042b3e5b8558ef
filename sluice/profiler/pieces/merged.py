"""Merged runs: the pieces that they become, in graphs that show every run once.

A graph with merged runs differs from the dense one in a few nodes, so it is made without data: the nodes of the dense
graph but for those, labels that follow from the dense ones (`sluice.profiler.pieces.merged_groups`), and hollow weights
(`sluice.profiler.pieces.weightless`). Only the pieces that take the place of the runs are cut out of it.

1. Runs that do not overlap share a graph.
2. The groups of such a graph are those of the dense one, found by the tensors they lie on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx
from onnx import helper

from sluice.passes.cut.merge_onnx import MergedNodes, replaced, replacement
from sluice.passes.cut.merge_region import MergeRegion, bias_name, find_region, merged_shape
from sluice.passes.cut.merge_ties import groups_on, inside
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.groups import rename_groups
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import LITERAL, OnnxGraph, attributes
from sluice.passes.merge_sites import MergeSite
from sluice.profiler.pieces.merged_groups import Change, relabel
from sluice.profiler.pieces.partition import Partition, anchor_weight, cut_out
from sluice.profiler.pieces.split import split
from sluice.profiler.pieces.variants import LayerReplacement, RestructuredGraph
from sluice.profiler.pieces.weightless import weightless

__all__ = ["merge_variants", "names_in"]


def merge_variants(base: Partition, sites: Sequence[MergeSite]) -> Iterator[tuple[RestructuredGraph, list[MergeSite]]]:
    """Graphs that show every site once, and the sites of each (rule 1)."""
    shelves: list[list[MergeSite]] = []
    for site in sites:
        shelf = next((s for s in shelves if not any(set(site.gone) & set(other.gone) for other in s)), None)
        if shelf is None:
            shelves.append([site])
        else:
            shelf.append(site)
    dense, small = _Dense(base), None if base.small is None else _Dense(base.small)
    for shelf in shelves:
        variant = _merge_variant(dense, shelf)
        if small is not None and any(place.inner for place in variant.places):
            less = _merge_variant(small, shelf).partition
            variant = replace(variant, partition=replace(variant.partition, small=less))
        yield variant, shelf


def names_in(base: Partition, sites: Sequence[MergeSite]) -> dict[tuple[str, int], str]:
    """What the groups on a (tensor, axis) are called where the sites are merged (rule 2)."""
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
    return names


class _Dense:
    """The dense graph, as all graphs with merged runs need it."""

    def __init__(self, base: Partition) -> None:
        graph = OnnxGraph(base.model)
        self.base = base
        self.chains = chains_onnx(base.model)
        # What was excluded is no matter for a merge.
        self.analysis = rename_groups(analyze_onnx(base.model), groups_on(base.analysis))
        self.entering, self.leaving = set(graph.inputs), set(graph.outputs)
        self.tensors, self.infos = graph.initializers, graph.infos
        self.uses = Counter(name for node in base.model.graph.node for name in node.input)


def _merge_variant(dense: _Dense, sites: Sequence[MergeSite]) -> RestructuredGraph:
    nodes, changes = list(dense.base.model.graph.node), []
    new_tensors: dict[str, onnx.TensorProto] = {}
    infos = dict(dense.infos)
    for site in sites:
        region = find_region(dense.chains, site.merge)
        new = replacement(region, dense.tensors.keys())
        nodes = replaced(nodes, dense.leaving, region, new)
        change = _change(dense, region, site.segment.start, new)
        dtype = dense.tensors[site.merge.layers[0]].data_type
        new_tensors |= {name: weightless(name, dtype, shape) for name, shape in change.tensors.items()}
        infos |= {n: helper.make_tensor_value_info(n, dtype, s) for n, s in change.shapes.items() if n not in infos}
        changes.append(change)
    gone = (dense.uses.keys() - Counter(name for node in nodes for name in node.input)) | new_tensors.keys()
    tensors = {name: tensor for name, tensor in dense.tensors.items() if name not in gone} | new_tensors
    infos = {name: info for name, info in infos.items() if name not in gone}
    model = _skeleton(dense.base.model, nodes, tensors, infos)
    parts = split(nodes, dense.entering, dense.leaving)
    runs = {run[-1] for site in sites for run in site.merge.runs}
    shown = [k for k, part in enumerate(parts) if any(n.op_type == "Conv" and n.input[1] in runs for n in part.nodes)]
    names, known = names_in(dense.base, sites), {group.name for group in dense.base.analysis.groups}
    seen = {name for k in shown for name in (*parts[k].inputs, *parts[k].made)}
    shared = any(dense.uses[name] > 1 for change in changes for name in change.region.tensors)
    analysis = None if shared else relabel(dense.analysis, changes, names, known, seen)
    analysis = analysis or rename_groups(analyze_onnx(model), names)
    cut = Partition(model, analysis, cut_out(parts, shown, model, analysis, tensors, infos), dense.base.batch)
    by_weight = {anchor_weight(piece): piece for piece in cut.pieces}
    places = []
    for site in sites:
        pieces = tuple(by_weight[run[-1]] for run in site.merge.runs)
        inner = tuple(tensor for piece in pieces[:-1] for tensor in piece.outputs)
        places.append(LayerReplacement(site.switch, site.gone, pieces, inner))
    return RestructuredGraph(cut, tuple(places))


def _change(dense: _Dense, region: MergeRegion, start: int, new: MergedNodes) -> Change:
    sizes = {region.source: dense.base.analysis.shapes[region.source]}
    tensors: dict[str, tuple[int, ...]] = {}
    for weight, run in new.runs.items():
        shape = merged_shape(run)[0]
        tensors |= {weight: shape, bias_name(weight): shape[:1]}
    for node in new.nodes:
        batch, *into = sizes[node.input[0]]
        if node.op_type == "Conv":
            a = attributes(node)
            spatial = zip(into[1:], a["pads"], a["kernel_shape"], a["strides"], strict=False)  # pads: before, after
            into = [tensors[node.input[1]][0], *((n + 2 * pad - k) // step + 1 for n, pad, k, step in spatial)]
        sizes[node.output[0]] = (batch, *into)
    if sizes[region.value] != dense.base.analysis.shapes[region.value]:
        raise AssertionError(f"{region.value} has changed its shape to {sizes[region.value]}")
    return Change(region, start, new.nodes, tensors, sizes)


def _skeleton(
    dense: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
    infos: Mapping[str, onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A model whose larger tensors have no data, whatever they had."""
    light = [
        init if math.prod(init.dims) <= LITERAL else weightless(init.name, init.data_type, init.dims)
        for init in tensors.values()
    ]
    ends = {info.name for info in [*dense.graph.input, *dense.graph.output]}
    inner = [info for name, info in infos.items() if name not in ends]
    graph = helper.make_graph(nodes, dense.graph.name, dense.graph.input, dense.graph.output, light, value_info=inner)
    return helper.make_model(graph, opset_imports=dense.opset_import, ir_version=dense.ir_version)
