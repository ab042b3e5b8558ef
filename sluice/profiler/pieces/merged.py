"""Merged runs: the pieces that they become, all of them in one graph.

The graph is the dense one with a *branch* for every site: the pieces in which the site's merged convolutions would lie,
under names of their own. Nothing reads a branch, and the graph is never run, so its larger weights have no data
(`sluice.profiler.pieces.weightless`).

1. What a run makes is tied to the value that it would make in the dense graph, by an addition that is in no piece. So
   the values at both ends of a run have the labels that they have in the dense graph. These count, since an engine is
   cut by the groups of the dense graph before its runs are merged (`sluice.profiler.pieces.engine`).
2. Groups between the merged convolutions of one site are those of the dense graph, by the weights they lie on. Groups
   that nothing outside the site sees stay as wide as they are, so they go by a name of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from sluice.passes.cut.merge_onnx import replaced, replacement
from sluice.passes.cut.merge_region import bias_name, find_region, merged_shape
from sluice.passes.cut.merge_ties import groups_on, inside
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.groups import Analysis, rename_groups
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import LITERAL, OnnxGraph, rename_reads
from sluice.passes.merge_sites import MergeSite
from sluice.profiler.pieces.joints import find_joints
from sluice.profiler.pieces.partition import Partition, anchor_weight, cut_out, ends_of
from sluice.profiler.pieces.split import Part, split
from sluice.profiler.pieces.variants import LayerReplacement, OfferedReplacement
from sluice.profiler.pieces.weightless import weightless

__all__ = ["inner_names", "merged_runs"]


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """The parts of a graph in which a site is merged, those of ``own`` (by index) under names with ``prefix``.

    ``tensors`` are the merged weights and biases, ``tie`` is the addition of rule 1.
    """

    site: MergeSite
    prefix: str
    parts: Sequence[Part]
    own: Sequence[int]
    tensors: Mapping[str, onnx.TensorProto]
    tie: onnx.NodeProto


def merged_runs(base: Partition, sites: Sequence[MergeSite]) -> list[OfferedReplacement]:
    """What takes the place of every site's layers, in order."""
    branches = _branches(base, sites)
    model = _with_branches(base.model, branches)
    on = groups_on(base.analysis)
    names = dict(on)
    for branch in branches:
        inner = inner_names(base, branch.site, on)
        names |= {(branch.prefix + tensor, axis): name for (tensor, axis), name in inner.items()}
    # What was excluded is no matter for a merge.
    analysis = rename_groups(analyze_onnx(model, dims=base.analysis.dims), names, base.analysis)
    light = {name: tensor for name, tensor in OnnxGraph(model).initializers.items() if name in base.analysis.tensors}
    found = [_offered(base, branch, model, analysis, light) for branch in branches]
    shared = [k for k, one in enumerate(found) if any(not joint.pair for joint in find_joints(one.partition))]
    if base.small is not None and shared:
        for k, less in zip(shared, merged_runs(base.small, [sites[k] for k in shared]), strict=True):
            found[k] = replace(found[k], partition=replace(found[k].partition, small=less.partition))
    return found


def inner_names(base: Partition, site: MergeSite, on: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """What the groups on the (tensor, axis) pairs of a site's merged weights are called (rule 2)."""
    merge = site.merge
    own = {key: on[key] for layer in merge.layers for key in ((layer, 0), (layer, 1)) if key in on}
    within = inside(base.analysis, merge.layers, site.segment.kept, on)
    # An inner group that removed layers tie to one that others see goes by its name.
    called: dict[str, str | None] = {group: group for group in own.values() if group not in within.inner}
    for together in within.tied:
        lead = next(iter(within.outer(together)), None)
        called |= {group: lead for group in within.inner & together}
    ends = {(merge.runs[0][-1], 1): (merge.layers[0], 1), (merge.runs[-1][-1], 0): (merge.layers[-1], 0)}
    found = {}
    for key in ((run[-1], axis) for run in merge.runs for axis in (0, 1)):
        group = own.get(ends.get(key, key))
        if group is not None:
            found[key] = called.get(group) or f"{group} in {site.switch}"
    return found


def _branches(base: Partition, sites: Sequence[MergeSite]) -> list[_Branch]:
    graph, chains, nodes = OnnxGraph(base.model), chains_onnx(base.model), list(base.model.graph.node)
    entering, leaving = set(graph.inputs), set(graph.outputs)
    found = []
    for site in sites:
        region = find_region(chains, site.merge)
        new = replacement(region, graph.initializers.keys())
        shapes: dict[str, Sequence[int]] = {}
        for weight, run in new.runs.items():
            shape = merged_shape(run)[0]
            shapes |= {weight: shape, bias_name(weight): shape[:1]}
        parts = split(replaced(nodes, leaving, region, new), entering, leaving)
        made = {name for node in new.nodes for name in node.output}
        own = [index for index, part in enumerate(parts) if made.intersection(part.made)]
        prefix = f"{site.switch} apart/" if site.apart else f"{site.switch}/"
        called = {name: prefix + name for name in shapes} | {
            name: prefix + name for index in own for name in parts[index].made
        }
        for index in own:
            parts[index] = _renamed(parts[index], called)
        dtype = graph.initializers[site.merge.layers[0]].data_type
        tensors = {called[name]: weightless(called[name], dtype, shape) for name, shape in shapes.items()}
        tie = helper.make_node("Add", [called[region.value], region.value], [f"{prefix}tie"])
        found.append(_Branch(site, prefix, parts, own, tensors, tie))
    return found


def _renamed(part: Part, called: Mapping[str, str]) -> Part:
    nodes = []
    for node in part.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rename_reads(copy, lambda name: called.get(name, name))
        copy.output[:] = [called.get(name, name) for name in node.output]
        nodes.append(copy)
    names = ([called.get(name, name) for name in names] for names in (part.made, part.inputs, part.outputs))
    return Part(tuple(nodes), *map(tuple, names))


def _with_branches(dense: onnx.ModelProto, branches: Sequence[_Branch]) -> onnx.ModelProto:
    """The dense graph and all branches; its larger tensors have no data."""
    nodes, tensors = list(dense.graph.node), list(dense.graph.initializer)
    for branch in branches:
        own = [node for index in branch.own for node in branch.parts[index].nodes]
        # What depends on weights alone is in the dense graph already.
        nodes += [*(node for node in own if node.output[0].startswith(branch.prefix)), branch.tie]
        tensors += branch.tensors.values()
    light = [
        init if math.prod(init.dims) <= LITERAL else weightless(init.name, init.data_type, init.dims)
        for init in tensors
    ]
    infos = dense.graph.value_info
    graph = helper.make_graph(nodes, dense.graph.name, dense.graph.input, dense.graph.output, light, value_info=infos)
    return helper.make_model(graph, opset_imports=dense.opset_import, ir_version=dense.ir_version)


def _offered(
    base: Partition,
    branch: _Branch,
    model: onnx.ModelProto,
    analysis: Analysis,
    light: Mapping[str, onnx.TensorProto],
) -> OfferedReplacement:
    """The pieces of a branch that hold its merged convolutions; ``light`` are the tensors of the dense graph."""
    site = branch.site
    weights = [branch.prefix + run[-1] for run in site.merge.runs]
    shown = [
        index
        for index in branch.own
        if any(n.op_type == "Conv" and n.input[1] in weights for n in branch.parts[index].nodes)
    ]
    graph = OnnxGraph(base.model)
    infos = dict(graph.infos)
    dtype = branch.tensors[weights[0]].data_type
    for name in (name for index in shown for name in (*branch.parts[index].inputs, *branch.parts[index].made)):
        if name not in infos:
            there = graph.infos.get(name.removeprefix(branch.prefix))
            kind = dtype if there is None else there.type.tensor_type.elem_type
            infos[name] = helper.make_tensor_value_info(name, kind, analysis.shapes[name])
    ends = ends_of(base.model) if base.by_kernels else ()
    cut = cut_out(branch.parts, shown, model, analysis, {**light, **branch.tensors}, infos, ends)
    by_weight = {anchor_weight(piece): replace(piece, name=piece.name.removeprefix(branch.prefix)) for piece in cut}
    pieces = tuple(by_weight[weight] for weight in weights)
    inner = tuple(tensor for piece in pieces[:-1] for tensor in piece.outputs)
    last = tuple(tensor.removeprefix(branch.prefix) for tensor in pieces[-1].outputs)
    place = LayerReplacement(site.switch, site.gone, pieces, inner, ends=last)
    return OfferedReplacement(place, Partition(model, analysis, pieces, base.batch))
