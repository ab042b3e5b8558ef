"""A captured graph run as far as a node, batch by batch, and on from there later.

1. The values that nodes further on need are kept for every batch as long as they take at most `LIMIT` bytes together.
   Else the walk stays where it is, and every question is answered from there again: memory is bounded, time is not.
2. The graph's tensors may change between two questions, as long as only nodes that were not passed read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

__all__ = ["GraphWalk"]

LIMIT = 2**30


class GraphWalk:
    """``inputs``: for every batch the values of the graph's placeholders, in order."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> None:
        self._gm = gm
        self._nodes = list(gm.graph.nodes)
        self._index = {node: k for k, node in enumerate(self._nodes)}
        self._last = {node: max((self._index[u] for u in node.users), default=-1) for node in self._nodes}
        self._at = 0  # the first node that was not run
        places = [node for node in self._nodes if node.op == "placeholder"]
        self._batches: list[dict[fx.Node, Any]] = [dict(zip(places, one, strict=True)) for one in inputs]

    def values(self, wanted: fx.Node, *, moving: bool = False) -> Iterator[Any]:
        """The value of a node for every batch.

        Args:
            moving: remember the values that are live behind the node (rule 1); it and those before it run no more.
        """
        stop = self._index[wanted] + 1
        held = 0
        kept: list[dict[fx.Node, Any]] = []
        for batch in self._batches:
            live = self._run(batch, stop)
            yield live[wanted]
            if moving:
                ahead = {node: value for node, value in live.items() if self._last[node] >= stop}
                held += sum(
                    leaf.nbytes for leaf in pytree.tree_leaves(list(ahead.values())) if isinstance(leaf, Tensor)
                )
                kept = [*kept, ahead] if held <= LIMIT else []
        if moving and len(kept) == len(self._batches) and stop > self._at:
            self._at, self._batches = stop, kept

    def _run(self, batch: dict[fx.Node, Any], stop: int) -> dict[fx.Node, Any]:
        interpreter = fx.Interpreter(self._gm, garbage_collect_values=False)
        interpreter.env = dict(batch)
        for place in range(self._at, stop):
            node = self._nodes[place]
            if node.op != "placeholder":
                interpreter.env[node] = interpreter.run_node(node)
            for used in node.all_input_nodes:
                if self._last[used] <= place < stop - 1:
                    interpreter.env.pop(used, None)
        return interpreter.env
