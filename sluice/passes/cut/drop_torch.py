"""Drop residual branches from a captured network, and the closed network that equals it.

1. `view_torch` reads the graph: ATen calls, raised batch norms with their statistics, weights as ``get_attr`` nodes.
2. Every addition of a dropped branch is replaced by its shortcut, every activation that no longer changes anything by
   its input (`sluice.passes.graph.blocks`). The branch's nodes go, and parameters, buffers and modules that nothing
   reads any more.
3. An in-place operator that changed the addition's result would now change the shortcut under its other readers; it
   gets a copy to work on.
4. `close_block` writes zeros where the branch then ends in zero: the same function with all tensors in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Drop
from sluice.passes.cut.unused_torch import read_tensors, remove_unused
from sluice.passes.graph.blocks import Block, dropped_values, match_drops
from sluice.passes.graph.view_torch import view_torch

__all__ = ["close_block", "drop_torch"]


def drop_torch(gm: fx.GraphModule, drops: Sequence[Drop]) -> None:
    """Remove, in place, the branches that ``drops`` name from a captured (perhaps sliced) network.

    Raises:
        SluiceError: no residual block of the graph has the tensors of a drop; ``gm`` is left as it was.
    """
    view = view_torch(gm)
    blocks = match_drops(view, drops)
    taken = dropped_values(view, blocks)
    nodes = {node.name: node for node in gm.graph.nodes}
    before = read_tensors(gm)
    for value, source in taken.items():
        nodes[value].replace_all_uses_with(nodes[source])
    own = {nodes[out] for block in blocks for out in block.own}
    dead = {*(nodes[value] for value in taken), *(n.args[0] if n.target is operator.getitem else n for n in own)}
    for node in reversed(list(gm.graph.nodes)):
        part = node.target is operator.getitem and node.args[0] in dead
        if node in dead or part or (node.op == "get_attr" and not node.users):
            gm.graph.erase_node(node)
    for source in dict.fromkeys(taken.values()):
        _keep_apart(gm, nodes[source])
    gm.graph.eliminate_dead_code()
    remove_unused(gm, before)
    gm.graph.lint()
    gm.recompile()


def close_block(module: nn.Module, block: Block) -> None:
    """Make the branch end in zero, in place: with it, ``module`` computes in eval mode what it computes without it.

    Args:
        module: the network the block was found in, captured or as the user wrote it; the names are the same.
    Raises:
        SluiceError: the block cannot be closed, or the module lacks its tensors.
    """
    if block.closing is None:
        raise SluiceError(f"block {block.name!r} cannot be closed: {block.reason}; drop it instead")
    state = module.state_dict()
    missing = [name for name in block.closing if name not in state]
    if missing:
        raise SluiceError(f"block {block.name!r} ends in {missing[0]!r}, which the module lacks; give its own network")
    for name in block.closing:
        state[name].zero_()


def _keep_apart(gm: fx.GraphModule, source: fx.Node) -> None:
    """Give in-place operators that would change ``source`` under its other readers a copy."""
    for node, changed in list(_mutations(source)):
        if len(source.users) == 1 and changed is source:
            continue
        with gm.graph.inserting_before(node):
            copy = gm.graph.call_function(torch.ops.aten.clone.default, (changed,))
        copy.meta = dict(changed.meta)
        node.replace_input_with(changed, copy)


def _mutations(value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(in-place operator, the value it changes) for ``value`` and all views of it."""
    for node in value.users:
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if schema.is_mutable:
                if node.args[0] is value:
                    yield node, value
            elif any(r.alias_info is not None for r in schema.returns):
                yield from _mutations(node)
        elif node.op == "call_module" or node.target is operator.getitem:
            yield from _mutations(node)
