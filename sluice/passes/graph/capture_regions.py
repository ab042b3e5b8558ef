"""Regions of a captured graph that run in another mode of gradients or precision, written into the graph itself.

A network that computes a table under ``torch.no_grad()`` is captured with a call of a graph within the graph, whose
operators no reader sees. Its operators move to the place of the call. What a region without gradients returns is
detached there, which keeps its gradient at zero.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]

NO_GRAD, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


def inline_regions(gm: fx.GraphModule) -> None:
    """In place; a region in lower precision stays a call."""
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "name", lambda: "")() if node.op == "call_function" else ""
        if name == NO_GRAD:
            enabled, body, *given = node.args
            _inline(gm, node, body, given, detached=not enabled)
        elif name == AUTOCAST and not node.args[2]:
            _inline(gm, node, node.args[4], node.args[5:], detached=False)
    gm.graph.eliminate_dead_code()


def _inline(gm: fx.GraphModule, call: fx.Node, body: Any, given: Any, detached: bool) -> None:
    region = gm.get_submodule(str(body.target))
    assert isinstance(region, fx.GraphModule)
    inline_regions(region)
    known = dict(zip(region.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":  # a constant, under a name of its own in the graph around it
                name = f"{str(body.target).replace('.', '_')}_{node.target}"
                gm.register_buffer(name, getattr(region, str(node.target)), persistent=False)
                known[node] = gm.graph.get_attr(name)
            else:
                known[node] = gm.graph.node_copy(node, known.__getitem__)
        (output,) = region.graph.find_nodes(op="output")
        results = [known[result] for result in output.args[0]]
        if detached:
            results = [_detached(gm, result) for result in results]
    for reader in list(call.users):
        assert reader.target is operator.getitem
        reader.replace_all_uses_with(results[reader.args[1]])  # type: ignore[index]
        gm.graph.erase_node(reader)
    gm.graph.erase_node(call)
    gm.graph.erase_node(body)
    gm.delete_submodule(str(body.target))


def _detached(gm: fx.GraphModule, result: fx.Node) -> fx.Node:
    copied = gm.graph.call_function(torch.ops.aten.detach.default, (result,))
    copied.meta = dict(result.meta)
    return copied
