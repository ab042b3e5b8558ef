"""Drop residual branches from an ONNX graph; needs onnx and numpy, not torch.

1. `view_onnx` reads the graph. Weights keep their names through transposes, casts and reshapes; a linear layer is a
   MatMul with a weight, whose bias is a sum of its own.
2. Every addition of a dropped branch is replaced by its shortcut, every activation that no longer changes anything by
   its input (`sluice.passes.graph.blocks`). Then nodes that no output needs go, and initialisers that nothing reads.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import onnx
from onnx import helper

from sluice.core.plan import Drop
from sluice.passes.graph.blocks import dropped_values, match_drops
from sluice.passes.graph.onnx_graph import OnnxGraph, reads
from sluice.passes.graph.view_onnx import view_onnx

__all__ = ["drop_onnx"]


def drop_onnx(model: onnx.ModelProto, drops: Sequence[Drop], named: Container[str] | None = None) -> onnx.ModelProto:
    """A copy without the branches that ``drops`` name.

    Args:
        model: dense or sliced; its initialisers carry the parameter names of the plan.
        named: the tensors of the plan's model, to tell them from an exporter's constants.
    Raises:
        SluiceError: no residual block of the graph has the tensors of a drop.
    """
    view = view_onnx(model, named, shapes=False)
    taken = dropped_values(view, match_drops(view, drops))
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    if not taken:
        return slim
    before = OnnxGraph(model).readers
    kept = [node for node in slim.graph.node if not taken.keys() & set(node.output)]
    for node in kept:
        node.input[:] = [taken.get(name, name) for name in node.input]
    # Values that the graph returns, or a body of control flow reads, keep their names.
    kept += [helper.make_node("Identity", [taken[v]], [v]) for v in taken if v in view.outputs]
    kept = _alive(kept, {info.name for info in slim.graph.output})
    read = {name for node in kept for name in reads(node)}
    made = {name for node in kept for name in node.output}
    tensors = [i for i in slim.graph.initializer if i.name in read or i.name not in before]
    infos = [i for i in slim.graph.value_info if i.name in made | {t.name for t in tensors}]
    for field, items in (("node", _sorted(kept)), ("initializer", tensors), ("value_info", infos)):
        items = [type(item).FromString(item.SerializeToString()) for item in items]
        slim.graph.ClearField(field)
        getattr(slim.graph, field).extend(items)
    onnx.checker.check_model(slim)
    return slim


def _alive(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    maker = {name: index for index, node in enumerate(nodes) for name in node.output}
    needed: set[int] = set()
    stack = list(outputs)
    while stack:
        index = maker.get(stack.pop())
        if index is not None and index not in needed:
            needed.add(index)
            stack += list(reads(nodes[index]))
    return [node for index, node in enumerate(nodes) if index in needed]


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Every node behind the ones it reads; the order of before where that allows it."""
    made = {name for node in nodes for name in node.output}
    done: set[str] = set()
    order: list[onnx.NodeProto] = []
    rest = list(nodes)
    while rest:
        ready = next(node for node in rest if all(name in done or name not in made for name in reads(node)))
        rest.remove(ready)
        order.append(ready)
        done.update(ready.output)
    return order
