"""Merges on an ONNX graph; numpy and onnx only.

Every run of a merge (`sluice.passes.cut.merge_region`) becomes one ``Conv`` with bias under the name of its last
weight; batch norms, inner activations, removed convolutions and folded shortcuts go, with their initialisers. The
merged graph computes the same as the network that `sluice.passes.cut.merge_torch` makes of the plan in two steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.cut.compose import Conv
from sluice.passes.cut.merge_region import (
    FoldedBlock,
    MergeRegion,
    Run,
    bias_name,
    compose_run,
    find_region,
    layers_of,
    merged_shape,
)
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph, infer_checked

__all__ = ["MergedNodes", "merge_onnx", "random_weight", "replaced", "replacement"]


def merge_onnx(model: onnx.ModelProto, merges: Sequence[Merge], *, values: bool = True) -> onnx.ModelProto:
    """The merged graph, a copy.

    Args:
        values: compose the weights. False gives them random numbers, which is quick and enough for timing.
    Raises:
        SluiceError: a merge does not fit the graph.
    """
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for merge in merges:
        _apply(done, find_region(chains_onnx(done), merge), values)
    if merges:
        infer_checked(done)
    return done


def _apply(model: onnx.ModelProto, region: MergeRegion, values: bool) -> None:
    graph, there = model.graph, OnnxGraph(model)
    tensors = {n: init for n, init in there.initializers.items() if n in region.tensors}
    arrays = {n: numpy_helper.to_array(init) for n, init in tensors.items()} if values else {}
    new = replacement(region, there.initializers.keys())
    nodes = list(graph.node)
    kept = replaced(nodes, there.outputs.keys(), region, new)
    weights: dict[str, np.ndarray] = {}
    for name, run in new.runs.items():
        conv = compose_run(run, arrays) if values else _random(run)
        dtype = helper.tensor_dtype_to_np_dtype(tensors[name].data_type)
        weights[name], weights[bias_name(name)] = conv.weight.astype(dtype), conv.bias.astype(dtype)
    before = {name for node in nodes for name in (*node.input, *node.output)}
    read = {name for node in kept for name in (*node.input, *node.output)}
    gone = (before - read) | weights.keys()
    initializers = [init for init in graph.initializer if init.name not in gone]
    initializers += [numpy_helper.from_array(array, name) for name, array in weights.items()]
    infos = [info for info in graph.value_info if info.name not in gone]
    for target, items in ((graph.node, kept), (graph.initializer, initializers), (graph.value_info, infos)):
        del target[:]
        target.extend(items)


@dataclass(frozen=True, slots=True)
class MergedNodes:
    """The nodes that take a region's place, and the run behind every weight that they read."""

    nodes: Sequence[onnx.NodeProto]
    runs: Mapping[str, Run]


def replacement(region: MergeRegion, taken: Collection[str]) -> MergedNodes:
    """The nodes that take the region's place.

    Args:
        taken: names of all initialisers.
    Raises:
        SluiceError: a bias that a merged convolution gets would have the name of another tensor.
    """
    new = _Emitter(region, taken)
    new.emit(region.units, region.source, region.value)
    return MergedNodes(new.nodes, new.runs)


def replaced(
    nodes: Sequence[onnx.NodeProto], outputs: Collection[str], region: MergeRegion, new: MergedNodes
) -> list[onnx.NodeProto]:
    """A graph's nodes with the region's replaced; ``outputs`` are the values that leave the graph."""
    rest = list(nodes)
    place = next(index for index, node in enumerate(rest) if region.value in node.output)
    old = rest.pop(place)
    return _alive([*rest[:place], *new.nodes, *rest[place:]], outputs, [old])


def _alive(
    nodes: list[onnx.NodeProto], outputs: Collection[str], gone: Sequence[onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The nodes without those that only led to the nodes ``gone``."""
    uses = Counter(name for node in nodes for name in node.input)
    dead = {name for node in gone for name in node.input}
    kept = []
    for node in reversed(nodes):
        if any(name in dead for name in node.output) and not any(uses[n] or n in outputs for n in node.output):
            uses.subtract(node.input)
            dead.update(node.input)
        else:
            kept.append(node)
    return kept[::-1]


@dataclass(slots=True)
class _Emitter:
    """Nodes of a region's units, and the runs that they carry out, by weight."""

    region: MergeRegion
    taken: Collection[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)

    def emit(self, units: Sequence[Run | FoldedBlock], x: str, out: str) -> None:
        for index, unit in enumerate(units):
            y = out if index == len(units) - 1 else f"{out}::{index}"
            if isinstance(unit, Run):
                self.run(unit, x, y)
            else:
                side = x
                if unit.span.shortcut is not None:
                    side = f"{y}::shortcut"
                    self.run(Run((unit.span.shortcut,)), x, side)
                self.emit(unit.units, x, f"{y}::branch")
                self.nodes.append(helper.make_node("Add", [f"{y}::branch", side], [y], name=y))
            x = y

    def run(self, run: Run, x: str, out: str) -> None:
        name = layers_of(run.parts)[-1].weight
        bias = bias_name(name)
        if bias in self.taken and bias not in self.region.tensors:
            raise SluiceError(f"cannot merge into {name!r}: its bias would take the name {bias!r}; rename that tensor")
        shape, stride, pad, groups = merged_shape(run)
        self.runs[name] = run
        self.nodes.append(
            helper.make_node(
                "Conv",
                [x, name, bias],
                [out],
                name=out,
                kernel_shape=shape[2:],
                strides=stride,
                pads=pad * 2,
                dilations=(1,) * len(pad),
                group=groups,
            )
        )


def _random(run: Run) -> Conv:
    shape, stride, pad, groups = merged_shape(run)
    return Conv(random_weight(shape), np.zeros(shape[0], np.float32), stride, pad, groups)


def random_weight(shape: tuple[int, ...]) -> np.ndarray:
    """A weight (out, in / groups, *kernel) that keeps the scale of its input; always the same."""
    return np.random.default_rng(0).standard_normal(shape, np.float32) / np.sqrt(prod(shape[1:]))
