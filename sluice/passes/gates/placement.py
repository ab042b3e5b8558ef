"""The tensors that the mask of an axis group multiplies, so that a closed channel carries nothing.

A channel may be cut when, with its gates closed, no consumer of its axis can see it. Walk backwards from every
consumer (an operator that contracts the axis):

1. A norm with an affine stops the walk: scale and shift are multiplied, *after* the normalisation, which would undo
   a mask before it. A weight that produces the axis with no norm behind it is multiplied itself, with its bias.
2. Operators that map 0 to 0 and leave channels apart (ReLU, pooling, reshapes, concatenation, ...) pass the demand
   on; an addition passes it to all its operands, a product to one of them.
3. Where the walk meets any other operator, one with f(0) != 0 (sigmoid) for example, the mask goes onto the consumer's
   own weight, along its input axis. This is exact for all operators before it.

Masks multiply tensors of the size of a weight, never activations. A layer or group norm over a gated axis takes its
statistics over the kept channels only; those nodes are listed too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sluice.passes.graph.aten_walk import arguments, keeps_zero, operator_name
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.operators import Operator, aten_operator

__all__ = ["Placement", "place_gates"]

Ref = tuple[str, int]  # (tensor, axis)


@dataclass(frozen=True, slots=True)
class Placement:
    """Tensors whose axes are multiplied by masks, and norm nodes that need masked statistics."""

    refs: frozenset[Ref]
    norms: tuple[str, ...]


def place_gates(gm: fx.GraphModule, analysis: Analysis) -> Placement:
    walk = _Walk(gm, analysis)
    refs: set[Ref] = set()
    norms: list[str] = []
    for node in gm.graph.nodes:
        for source, weight, axis in walk.consumed(node):
            if walk.labelled(source):
                found = walk.demand(source)
                refs |= {(weight, axis)} if found is None else found
        if _is(node, "group_norm", "layer_norm") and walk.labelled(node) and walk.normalised(node):
            norms.append(node.name)
    return Placement(frozenset(refs), tuple(norms))


def _is(node: fx.Node, *names: str) -> bool:
    return node.op == "call_function" and operator_name(node) in names


class _Walk:
    def __init__(self, gm: fx.GraphModule, analysis: Analysis):
        self.analysis = analysis
        self.modules = dict(gm.named_modules())
        self.memo: dict[str, frozenset[Ref] | None] = {}

    def labelled(self, node: Any) -> bool:
        axis = self.analysis.values.get(node.name) if isinstance(node, fx.Node) else None
        return axis is not None and bool((axis.groups >= 0).any())

    def normalised(self, node: fx.Node) -> bool:
        """Does this layer or group norm mix the labelled axis?"""
        axis = self.analysis.values[node.name]
        a = arguments(node)
        rank = len(self.analysis.shapes[node.name])
        first = 1 if "num_groups" in a else rank - len(a["normalized_shape"])
        return axis.dim >= first

    def tensor(self, node: Any) -> str | None:
        is_tensor = isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self.analysis.tensors
        return str(node.target) if is_tensor else None

    def consumed(self, node: fx.Node) -> list[tuple[Any, str, int]]:
        """(input, weight, input axis of the weight) if the node contracts an axis with a named weight."""
        if node.op != "call_function":
            return []
        row = aten_operator(operator_name(node))
        weight = self.weight(node, row)
        if weight is None or self.depthwise(node, row):
            return []
        return [
            (arguments(node)["mat1"] if row.kind == "addmm" else node.args[0], weight, 1 - self.out_axis(node, row))
        ]

    def weight(self, node: fx.Node, row: Operator) -> str | None:
        return self.tensor(arguments(node)[row.weights[0]]) if row.weights else None

    def depthwise(self, node: fx.Node, row: Operator) -> bool:
        """Do channels stay apart."""
        weight = self.weight(node, row)
        grouped = row.kind == "conv" and arguments(node)["groups"] > 1
        return weight is not None and grouped and self.analysis.tensors[weight][1] == 1

    def out_axis(self, node: fx.Node, row: Operator) -> int:
        """The axis of the weight that makes channels."""
        if row.kind == "conv":
            return 1 if "transpose" in operator_name(node) and not self.depthwise(node, row) else 0
        return 0 if row.kind == "linear" else 1

    def demand(self, node: Any) -> frozenset[Ref] | None:
        """Tensors to multiply so that closed channels of this value are zero; None if there are none."""
        if not isinstance(node, fx.Node):
            return None
        if node.name not in self.memo:
            self.memo[node.name] = None  # graphs are acyclic; the entry only guards recursion
            self.memo[node.name] = self._demand(node)
        return self.memo[node.name]

    def _demand(self, node: fx.Node) -> frozenset[Ref] | None:
        if node.op == "get_attr":
            return frozenset({(str(node.target), self._axis_of(node))}) if self.labelled(node) else None
        if node.op == "call_module":
            if isinstance(self.modules[str(node.target)], BatchNorm):
                return self._affine(node.args[1:], 0)
            return self.demand(node.args[0])
        if node.op != "call_function":
            return None
        if node.target.__name__ == "getitem":  # type: ignore[union-attr]
            return self.demand(node.args[0])
        row, a = aten_operator(operator_name(node)), arguments(node)
        if row.kind == "cat":
            return self._all([t for t in a["tensors"] if self.labelled(t)])
        if row.zero == "sum":
            return self._all([a["self"], a["other"]])
        if row.zero == "mul":
            found = [r for v in (a["self"], a["other"]) if self.labelled(v) and (r := self.demand(v)) is not None]
            return min(found, key=len) if found else None
        if row.is_a("norm"):
            return self._norm(node, a)
        if row.weights:
            weight = self.weight(node, row)
            bias = a[row.weights[1]] if len(row.weights) > 1 else None
            return None if weight is None else self._produced(weight, self.out_axis(node, row), bias)
        if row.kind == "combine" and not self.labelled(node.args[0]):
            return None
        return self.demand(node.args[0]) if keeps_zero(row, node) else None

    def _all(self, operands: list[Any]) -> frozenset[Ref] | None:
        """Every operand must vanish; a number or a value without the labelled axis does not."""
        found: set[Ref] = set()
        for operand in operands:
            tensor = self.tensor(operand)
            if tensor is None and not self.labelled(operand):
                return None
            refs = self._tensor_refs(tensor) if tensor is not None else self.demand(operand)
            if refs is None:
                return None
            found |= refs
        return frozenset(found)

    def _tensor_refs(self, tensor: str) -> frozenset[Ref] | None:
        axes = {ref.axis for g in self.analysis.groups for ref in g.refs if ref.param == tensor}
        return frozenset({(tensor, axes.pop())}) if len(axes) == 1 else None

    def _axis_of(self, node: fx.Node) -> int:
        return self.analysis.values[node.name].dim

    def _affine(self, tensors: Any, axis: int) -> frozenset[Ref] | None:
        names = [self.tensor(t) for t in tensors]
        if all(t is None for t in tensors) or any(
            n is None and t is not None for n, t in zip(names, tensors, strict=True)
        ):
            return None
        return frozenset((name, axis) for name in names if name is not None)

    def _norm(self, node: fx.Node, a: dict[str, Any]) -> frozenset[Ref] | None:
        if not self.labelled(node):
            return None
        axis = self.analysis.values[node.name].dim
        first = len(self.analysis.shapes[node.name]) - len(a["normalized_shape"]) if "normalized_shape" in a else 1
        return self._affine((a["weight"], a["bias"]), axis - first) if axis >= first else None

    def _produced(self, weight: str, axis: int, bias: Any) -> frozenset[Ref] | None:
        refs = {(weight, axis)}
        if bias is not None:
            name = self.tensor(bias)
            if name is None:
                return None
            refs.add((name, 0))
        return frozenset(refs)
