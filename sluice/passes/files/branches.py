"""Branches whose condition is known: the graph that runs takes the place of the If.

A condition is known if it is the same number at two sizings in which every open size differs. So it hangs on constants,
on fixed inputs, and on sizes that are not open, and on nothing that a caller may choose.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.passes.files.plain import constants_to_initializers, graphs_in, names_in
from sluice.passes.graph.onnx_graph import OnnxGraph, hollow, say_sizes
from sluice.passes.graph.static_shapes import static_graph

__all__ = ["fold_branches"]

BATCHES = (2, 3)


def fold_branches(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Replace every If whose condition is known, in place, until none is left.

    Args:
        sizes: of the open sizes beside the batch.
    """
    while any(node.op_type == "If" for node in model.graph.node):
        known = _known(model, sizes)
        if not known:
            return
        kept: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == "If" and node.input[0] in known:
                kept += _branch(model.graph, node, known[node.input[0]])
            else:
                kept.append(node)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        constants_to_initializers(model.graph)


def _known(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, bool]:
    """The conditions that are known, by name."""
    found: list[dict[str, bool]] = []
    skeleton = hollow(model)
    for turn, batch in enumerate(BATCHES):
        say_sizes(skeleton, {name: size + turn for name, size in sizes.items()})
        try:
            static = static_graph(skeleton, batch)
        except SluiceError:
            if not turn:
                return {}
            continue  # the graph does not run at such sizes
        read = OnnxGraph(static)
        wanted = {node.input[0] for node in static.graph.node if node.op_type == "If"}
        found.append({name: bool(read.scalar(name)) for name in wanted if read.scalar(name) is not None})
    if len(found) < len(BATCHES):
        return {}
    return {name: value for name, value in found[0].items() if found[1].get(name) == value}


def _branch(graph: onnx.GraphProto, node: onnx.NodeProto, condition: bool) -> Iterator[onnx.NodeProto]:
    """The nodes of the branch that runs; its values get names that nothing outside of it has."""
    wanted = "then_branch" if condition else "else_branch"
    body = onnx.GraphProto()
    body.CopyFrom(next(attribute.g for attribute in node.attribute if attribute.name == wanted))
    inside, everywhere = (Counter(n for part in graphs_in(g) for n in names_in(part)) for g in (body, graph))
    taken = {*everywhere, *(info.name for info in graph.input)}
    fresh: dict[str, str] = {}
    for name in sorted(name for name, times in inside.items() if everywhere[name] > times):
        fresh[name] = next(n for k in itertools.count(1) if (n := f"{name}.{k}") not in taken)
        taken.add(fresh[name])
    _rename(body, fresh)
    graph.initializer.extend(body.initializer)
    yield from body.node
    for output, inner in zip(node.output, body.output, strict=True):
        if output:
            yield helper.make_node("Identity", [inner.name], [output], name=f"{node.name}/{output}")


def _rename(graph: onnx.GraphProto, fresh: Mapping[str, str]) -> None:
    for part in graphs_in(graph):
        for init in part.initializer:
            init.name = fresh.get(init.name, init.name)
        for info in part.output:
            info.name = fresh.get(info.name, info.name)
        for node in part.node:
            for names in (node.input, node.output):
                names[:] = [fresh.get(name, name) for name in names]
