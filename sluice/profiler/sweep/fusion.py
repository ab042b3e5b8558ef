"""The pieces of a network by the kernels of its engines, where the runtime tells them (`Runner`, rule 8).

The dense engine and `RANDOM` engines of random widths are built before anything is measured. Their kernels are kept in
the table: a table serves where nothing can be built, and a later call must find the same pieces.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.passes.search_space import SearchSpace
from sluice.profiler.pieces.engine import build_engine, model_key
from sluice.profiler.pieces.fused import Kernel, in_several, name_of, regroup, states_of
from sluice.profiler.pieces.levels import group_levels
from sluice.profiler.pieces.partition import Partition, ends_of, of_parts, parts_of
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.runner import Runner
from sluice.runtime.trt.inspect import owners

__all__ = ["by_kernels", "kernels_of", "regrouped"]

RANDOM = 2
NAME = "kernels of network "


def by_kernels(
    partition: Partition,
    table: LatencyTable,
    runner: Runner | None,
    space: SearchSpace | None = None,
    methods: Collection[str] = ("filter",),
) -> Partition:
    """The partition regrouped by the kernels that the table knows or the runner tells; else itself.

    Args:
        runner: None where nothing can be built.
        space, methods: what may leave the dense network.
    """
    name = NAME + model_key(partition, partition.dense)
    blob = table.get_blob(name)
    if blob is not None:
        kernels = [frozenset(own) for own in json.loads(blob)]
    elif runner is None or not hasattr(runner, "fused"):
        return partition
    else:
        kernels = kernels_of(partition, runner, table.fingerprint)
        table.put_blob(name, json.dumps([sorted(own) for own in kernels]).encode())
    return regrouped(partition, kernels, space, methods)


def regrouped(
    partition: Partition,
    kernels: Sequence[Kernel],
    space: SearchSpace | None = None,
    methods: Collection[str] = ("filter",),
) -> Partition:
    """The partition with parts that follow these kernels."""
    static, parts = partition.model, parts_of(partition.model)
    leaving = {info.name for info in static.graph.output}
    found = regroup(parts, static.graph.node, leaving, partition.analysis, kernels, states_of(parts, space, methods))
    cut = of_parts(found, static, partition.analysis, partition.batch, ends_of(static))
    return replace(cut, by_kernels=True, in_several=tuple(in_several(found, kernels)))


def kernels_of(partition: Partition, runner: Any, form: Fingerprint) -> list[Kernel]:
    """The kernels of the dense engine and of random ones, each as the operators that it computes.

    Args:
        runner: one that has `fused` (`sluice.runtime.base.runner`, 8).
    """
    rng, levels = np.random.default_rng(0), group_levels(partition, form.precision, {})
    drawn = [{name: int(rng.choice(values)) for name, values in levels.items()} for _ in range(RANDOM)]
    found: dict[Kernel, None] = {}
    for widths in ({}, *drawn):
        model = build_engine(partition, {**partition.dense, **widths})
        deployed = to_precision(model, form.precision, target=form.runtime, threads=form.threads)
        try:
            told = runner.fused(deployed, batch=partition.batch)
        except SluiceError:
            if not widths:
                raise
            continue  # an engine that does not build tells nothing
        origin = owners(deployed.graph, _single(model))
        found |= dict.fromkeys(frozenset(origin[name] for name in own if name in origin) for own in told)
    return [own for own in found if own]


def _single(model: onnx.ModelProto) -> Mapping[str, onnx.GraphProto]:
    """Every operator as a graph of its own."""
    weights = {init.name: onnx.TensorProto(name=init.name) for init in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        own = [weights[name] for name in node.input if name in weights]
        found[name_of(node)] = onnx.GraphProto(node=[node], initializer=own)
    return found
