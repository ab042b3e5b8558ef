"""Means over all positions become ``GlobalAveragePool``, as a runtime expects them; padding stays what it is.

The exporter writes a pool to one position as ``ReduceMean`` over the last axes, one of a 1-D network between an
``Unsqueeze`` and its ``Squeeze``. Runtimes have a kernel for the pool in the layout of convolutions, and change the
layout for a mean: ONNX Runtime reorders the whole feature map.

1. ``ReduceMean(x)`` over the axes ``2 .. rank - 1`` that keeps them is ``GlobalAveragePool(x)``.
2. ``Squeeze(ReduceMean(Unsqueeze(x)))`` is ``GlobalAveragePool(x)`` where ``Unsqueeze`` puts in one spatial axis,
   ``Squeeze`` takes out the same, nobody else reads what lies between, and rule 1 holds for the mean.
3. A mean that goes into a sum, a quotient or a root is a step of a norm that is written by hand, and stays.
4. ``MaxPool(Pad(x))`` names the axes that are padded. ONNX Runtime 1.31 moves padding of all axes by 0 into the pool,
   where it counts as -inf: another result wherever a window at the border is negative. It does not move padding of
   named axes. Where x is never negative both are the same, and the padding stays as it is.
5. A file of others keeps its padding: what it computes is what the runtime gives. `padded_pools` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, reads
from sluice.passes.graph.operators import onnx_operator

__all__ = ["padded_pools", "with_global_pools", "with_padded_axes"]

_NORM = ("Add", "Sub", "Div", "Sqrt")


def with_global_pools(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model``, changed in place, with the means of rules 1 and 2 as pools; values keep their names."""
    nodes, graph = model.graph.node, OnnxGraph(model)
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*model.graph.value_info, *model.graph.input)}
    readers = Counter(name for node in nodes for name in reads(node))
    readers.update(value.name for value in model.graph.output)
    made = {node.output[0]: node for node in nodes if len(node.output) == 1}
    sole = {node.input[0]: node for node in nodes if node.input and readers[node.input[0]] == 1}
    gone: list[onnx.NodeProto] = []
    for node in nodes:
        rank = ranks.get(node.input[0], 0) if node.op_type == "ReduceMean" else 0
        if rank < 3 or not attributes(node).get("keepdims", 1) or _axes(graph, node, rank) != [*range(2, rank)]:
            continue
        if any(reader.op_type in _NORM for reader in graph.readers.get(node.output[0], ())):
            continue
        before, after = made.get(node.input[0]), sole.get(node.output[0])
        source, result = node.input[0], node.output[0]
        if before and after and readers[source] == 1 and _opposite(graph, before, after, rank):
            gone += [before, after]
            source, result = before.input[0], after.output[0]
        node.CopyFrom(onnx.helper.make_node("GlobalAveragePool", [source], [result], name=node.name))
    for node in gone:
        nodes.remove(node)
    _without_unread(model, {name for name in graph.initializers if readers[name]})
    return model


def with_padded_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model``, changed in place, with the axes named that are padded before a largest pool (rule 4)."""
    graph, read = OnnxGraph(model), {name for node in model.graph.node for name in reads(node)}
    for node, pairs in _padded(graph):
        padded = np.flatnonzero(pairs.any(axis=0))
        given = {"pads": pairs[:, padded].reshape(-1), "axes": padded}
        names = {what: graph.fresh(f"{node.output[0]}.{what}") for what in given}
        for what, values in given.items():
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.int64), names[what]))
        value = node.input[2] if len(node.input) > 2 else ""
        node.input[:] = [node.input[0], names["pads"], value, names["axes"]]
    _without_unread(model, read & graph.initializers.keys())
    return model


def padded_pools(model: onnx.ModelProto) -> dict[str, str]:
    """By name of a padding what the runtime makes of it (rules 4 and 5)."""
    graph, found = OnnxGraph(model), dict[str, str]()
    for node, pairs in _padded(graph):
        value = graph.scalar(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
        readers = graph.readers[node.output[0]]
        if value == 0.0 and len(readers) == 1 and not pairs[:, :2].any():
            found[node.name or node.output[0]] = (
                f"pads by zeros in front of MaxPool {readers[0].name!r}, and ONNX Runtime 1.31 counts them as the "
                f"least number there, so the file is measured by the outputs that the runtime gives"
            )
    return found


def _padded(graph: OnnxGraph) -> Iterator[tuple[onnx.NodeProto, np.ndarray]]:
    """Paddings of all axes that a largest pool reads, and that what comes in may be below; front and behind by axis."""
    for node in graph.graph.node:
        pads = graph.array(node.input[1]) if node.op_type == "Pad" and not any(node.input[3:]) else None
        before = graph.producers.get(node.input[0]) if node.input else None
        if pads is None or (before is not None and onnx_operator(before.op_type, before.domain).is_a("nonnegative")):
            continue
        if pads.any() and any(reader.op_type == "MaxPool" for reader in graph.readers.get(node.output[0], ())):
            yield node, pads.reshape(2, -1)


def _opposite(graph: OnnxGraph, before: onnx.NodeProto, after: onnx.NodeProto, rank: int) -> bool:
    """Whether ``before`` puts in a spatial axis of a value of ``rank`` and ``after`` takes it out again."""
    axes = _axes(graph, before, rank)
    kinds = before.op_type == "Unsqueeze" and after.op_type == "Squeeze"
    return kinds and axes is not None and len(axes) == 1 and axes[0] >= 2 and axes == _axes(graph, after, rank)


def _axes(graph: OnnxGraph, node: onnx.NodeProto, rank: int) -> list[int] | None:
    """The constant axes that a node names of a value of ``rank``, from the front, sorted; None if they are computed."""
    if len(node.input) < 2:
        return None
    init = graph.initializers.get(node.input[1])
    return None if init is None else sorted(int(axis) % rank for axis in numpy_helper.to_array(init).reshape(-1))


def _without_unread(model: onnx.ModelProto, before: set[str]) -> None:
    """Remove the initializers that were read and no longer are."""
    now = {name for node in model.graph.node for name in reads(node)}
    for init in [init for init in model.graph.initializer if init.name in before and init.name not in now]:
        model.graph.initializer.remove(init)
