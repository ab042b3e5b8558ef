"""A graph as both front ends see it: nodes in execution order, the values they read, the named tensors they read.

1. A *named tensor* is a parameter or a floating-point buffer of the model; constants that an exporter made are none.
2. A *derived* value depends on no activation: sizes, constants, a transposed weight. It is an *alias* of one named
   tensor if only the layout differs (zero stays zero).
3. The kind of a node says when its output is zero:

       zero            f(0) = 0: its first input vanishes
       mul             one of its inputs vanishes, or the tensor in ``closes`` is zero
       sum             all its inputs vanish and all tensors in ``closes`` are zero (an addition, a concatenation)
       choice          as a sum, but for its first input, which chooses between the others
       weighted norm   the tensors in ``closes`` are zero (weight and bias; ``weighted``: convolution or linear)
       other           not known

   ``closes`` is None where no zeroing of named tensors suffices.
4. The *own* nodes of a value read by one node are those that reach an output of the graph only through that value.

`view_onnx` and `view_torch` read the graph; nothing here knows which of them it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from sluice.passes.graph.coupling import Shape

__all__ = ["KINDS", "GraphView", "Node"]

KINDS = ("zero", "mul", "sum", "choice", "weighted", "norm", "other")
Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. ``inputs`` are values of other nodes or of the graph, ``tensors`` all named tensors it reads.

    ``residual``: the plain sum of two activations. ``bounds``: the operator limits every entry to this range.
    """

    op: str
    kind: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    closes: tuple[str, ...] | None = None
    bounds: Bounds | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass(frozen=True, slots=True, eq=False)
class GraphView:
    """Nodes in execution order; the values that the graph returns (or reads inside the bodies of control flow)."""

    nodes: tuple[Node, ...]
    outputs: frozenset[str]
    derived: frozenset[str]
    shapes: Mapping[str, Shape]
    producer: Mapping[str, int] = field(init=False)
    readers: Mapping[str, frozenset[int]] = field(init=False)

    def __post_init__(self) -> None:
        producer = {value: index for index, node in enumerate(self.nodes) for value in node.outputs}
        readers: dict[str, set[int]] = {}
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                readers.setdefault(value, set()).add(index)
        object.__setattr__(self, "producer", producer)
        object.__setattr__(self, "readers", {value: frozenset(found) for value, found in readers.items()})

    def tensors(self, nodes: Iterable[int] | None = None) -> set[str]:
        """Named tensors that the given nodes read, all nodes by default."""
        chosen = range(len(self.nodes)) if nodes is None else nodes
        return {name for index in chosen for name in self.nodes[index].tensors}

    def weighted(self, nodes: Iterable[int]) -> int:
        """Number of convolutions and linear layers."""
        return sum(self.nodes[index].kind == "weighted" for index in nodes)

    def own(self, value: str, reader: int) -> list[int]:
        """Nodes, in order, that reach an output of the graph only through ``value`` as an input of ``reader``."""
        last = self.producer.get(value)
        if last is None or self.readers.get(value, frozenset()) != {reader} or value in self.outputs:
            return []
        found: set[int] = set()
        for index in range(last, -1, -1):
            outputs = self.nodes[index].outputs
            read_by = frozenset().union(*(self.readers.get(out, frozenset()) for out in outputs))
            allowed = found | {reader} if value in outputs else found
            if read_by and read_by <= allowed and not self.outputs.intersection(outputs):
                found.add(index)
        return sorted(found)

    def entries(self, nodes: Collection[int]) -> set[str]:
        """Activations that the given nodes read and do not make."""
        made = {out for index in nodes for out in self.nodes[index].outputs}
        return {v for index in nodes for v in self.nodes[index].inputs} - made - self.derived

    def before(self, value: str) -> tuple[set[int], set[str]]:
        """All nodes that an activation depends on, and all activations among their inputs, itself included."""
        nodes: set[int] = set()
        values = {value}
        stack = [value]
        while stack:
            index = self.producer.get(stack.pop())
            if index is None or index in nodes:
                continue
            nodes.add(index)
            new = set(self.nodes[index].inputs) - self.derived - values
            values |= new
            stack += new
        return nodes, values

    def between(self, sources: Collection[str], value: str) -> list[int]:
        """Nodes on the ways from ``sources`` to ``value``."""
        before, _ = self.before(value)
        reached, found = set(sources), []
        for index in sorted(before):
            node = self.nodes[index]
            if reached.intersection(node.inputs) and not reached.issuperset(node.outputs):
                found.append(index)
                reached.update(node.outputs)
        return found
