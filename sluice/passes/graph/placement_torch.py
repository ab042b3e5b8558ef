"""The tensors that the mask of an axis group multiplies, so that a closed channel carries nothing.

A channel may be cut when, with its gates closed, no consumer of its axis can see it. Walk backwards from every
consumer (an operator that contracts the axis), once for every group that lies on the axis:

1. A norm with an affine stops the walk: scale and shift are multiplied, *after* the normalisation, which would undo
   a mask before it. A weight that produces the axis with no norm behind it is multiplied itself, with its bias.
2. Operators that map 0 to 0 and leave channels apart (ReLU, pooling, reshapes, concatenation, ...) pass the demand
   on; an addition passes it to all its operands, a product to one of them.
3. Where the walk meets any other operator, one with f(0) != 0 (sigmoid) for example, the mask goes onto the consumer's
   own weight, along its input axis. This is exact for all operators before it. So heads are closed by the columns of
   the projection behind them: rows of zero in q and k would give uniform attention, not none, and masks between 0 and
   1 on them would change its temperature. A recurrent width is closed by the columns of the recurrent weights, which
   holds for any initial state, and by its readers.
4. Where two activations are multiplied and summed over the axis (q and k over the dimensions of a head), one of them
   is multiplied, the first for which there is a place; both would square the mask.

5. A group that some consumer can see, and for which there is no place, cannot be closed: `closable` leaves it alone.
6. Padding with -inf is the largest pool's own padding, written apart: what the pool gives is zero where its inner
   entries are, since no window lies in the padding alone.

Masks multiply tensors of the size of a weight, never activations. A layer, group or RMS norm over a gated axis takes
its statistics over the kept channels only, and so does a mean, sum, variance or norm over them, as in norms that are
written by hand; those nodes are listed too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sluice.passes.graph.aten_recurrent import GATES, layer_weights
from sluice.passes.graph.aten_walk import arguments, factors_of, keeps_zero, operator_name, reduced, where
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.groups import Analysis, ValueAxis, without_groups
from sluice.passes.graph.operators import Operator, aten_operator

__all__ = ["Norm", "Placement", "closable", "normed_axes", "normed_groups", "place_gates"]

Ref = tuple[str, int]  # (tensor, axis)


@dataclass(frozen=True, slots=True)
class Norm:
    """A node that takes statistics over axes that can be cut, and the value and axes that it takes them of."""

    node: str
    value: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Tensors whose axes are multiplied by masks, and nodes that need masked statistics.

    ``unplaced`` names, by group, a consumer before which there is no place for a mask (rule 5).
    """

    refs: frozenset[Ref]
    norms: tuple[Norm, ...]
    unplaced: Mapping[str, str]


def place_gates(gm: fx.GraphModule, analysis: Analysis) -> Placement:
    walk = _Walk(gm, analysis)
    refs: set[Ref] = set()
    norms: list[Norm] = []
    unplaced: dict[str, str] = {}
    for node in gm.graph.nodes:
        for values in walk.consumed(node):
            for group in sorted(frozenset.intersection(*(walk.groups(v, dim) for v, dim in values))):
                found = (walk.demand(value, group) for value, _ in values)
                own = next((own for own in found if own is not None), None)
                if own is None:
                    unplaced[analysis.groups[group].name] = where(node, values[-1][0])
                refs |= own or frozenset()
        refs |= walk.recurrent(node)
        norms += walk.normalised(node)
    return Placement(frozenset(refs), tuple(norms), unplaced)


def closable(gm: fx.GraphModule, analysis: Analysis) -> Analysis:
    """The analysis without the groups that no masks can close (rule 5)."""
    unplaced = place_gates(gm, analysis).unplaced
    told = "there is no tensor before {} that a mask could multiply to close its channels"
    return without_groups(analysis, {name: told.format(consumer) for name, consumer in unplaced.items()})


def normed_axes(analysis: Analysis, norm: Norm) -> list[ValueAxis]:
    """The axes over which the node takes its statistics and which can be cut."""
    return [axis for axis in analysis.values[norm.value] if axis.dim in norm.dims]


def normed_groups(analysis: Analysis, placement: Placement) -> set[int]:
    """The groups, by index, over whose channels some node takes its statistics: no weight can hold their masks."""
    return {g for norm in placement.norms for axis in normed_axes(analysis, norm) for g in axis.groups}


def _is(node: fx.Node, *names: str) -> bool:
    return node.op == "call_function" and operator_name(node) in names


def _is_least(node: Any) -> bool:
    """Is it padded with -inf (rule 6)."""
    return _is(node, "pad", "constant_pad_nd") and arguments(node).get("value") == -math.inf


class _Walk:
    def __init__(self, gm: fx.GraphModule, analysis: Analysis):
        self.analysis = analysis
        self.modules = dict(gm.named_modules())
        self.memo: dict[tuple[str, int], frozenset[Ref] | None] = {}
        self.weights: set[str] = set()  # nodes computed from named tensors alone
        for node in gm.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (inputs and all(v.name in self.weights for v in inputs)):
                self.weights.add(node.name)
        self.lies: dict[tuple[str, int], list[int]] = {}  # (tensor, group) -> axes of the tensor
        for index, group in enumerate(analysis.groups):
            for ref in group.refs:
                self.lies.setdefault((ref.param, index), []).append(ref.axis)

    def groups(self, node: Any, dim: int | None = None) -> frozenset[int]:
        """The groups that lie on a value, or on one axis of it."""
        if not isinstance(node, fx.Node):
            return frozenset()
        if dim is None:
            return self.analysis.groups_on(node.name)
        axis = self.analysis.axis(node.name, dim % len(self.analysis.shapes.get(node.name, (0,))))
        return frozenset() if axis is None else axis.groups

    def normalised(self, node: fx.Node) -> list[Norm]:
        """The node, if it takes statistics over axes that can be cut."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return []
        kind, x = aten_operator(operator_name(node)).kind, node.args[0] if node.args else None
        if kind not in ("layer_norm", "group_norm", "rms_norm", "statistic") or not isinstance(x, fx.Node):
            return []
        a, rank = arguments(node), len(self.analysis.shapes[x.name])
        if kind == "statistic":
            over = reduced(a, rank)
        else:
            if a.get("num_groups") == self.analysis.shapes[x.name][1]:
                return []  # every channel by itself
            over = list(range(1 if kind == "group_norm" else rank - len(a["normalized_shape"]), rank))
        dims = tuple(d for d in sorted(over) if self.groups(x, d))
        return [Norm(node.name, x.name, dims)] if dims else []

    def consumed(self, node: fx.Node) -> list[tuple[tuple[Any, int], ...]]:
        """The values, and an axis of each, that the node multiplies and sums over."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return []
        row, a = aten_operator(operator_name(node)), arguments(node)
        if row.kind == "conv" and not self.depthwise(node):
            rank, weight = len(self.analysis.shapes[node.name]), a["weight"]
            dim = rank - len(self.analysis.shapes[weight.name]) + 1
            return [((a["input"], dim), (weight, 0 if "transpose" in operator_name(node) else 1))]
        if row.kind == "linear":
            return [((a["input"], -1), (a["weight"], 1))]
        if row.kind in ("addmm", "matmul"):
            x, y = factors_of(a) if row.kind == "addmm" else node.args[:2]
            return [((x, -1), (y, -2 if len(self.analysis.shapes[y.name]) > 1 else -1))]  # type: ignore[union-attr,index]
        if row.kind == "sdpa":
            return [((a["query"], -1), (a["key"], -1))]
        if row.kind == "einsum":
            terms, _, out = a["equation"].replace(" ", "").partition("->")
            places = [
                (t, d, c) for t, term in zip(a["tensors"], terms.split(","), strict=True) for d, c in enumerate(term)
            ]
            return [
                tuple((t, d) for t, d, c in places if c == letter) for letter in sorted(set(terms) - set(out) - {","})
            ]
        if row.kind == "cell":
            return [((a["input"], -1), (a["w_ih"], 1))]
        if row.kind == "lstm":
            return [((a["input"], 2), (weights[0], 1)) for weights in layer_weights(a)[0]]
        return []

    def recurrent(self, node: fx.Node) -> frozenset[Ref]:
        """The columns of the recurrent weights, and of those that read the layer before inside the operator."""
        if not _is(node, *GATES):
            return frozenset()
        a = arguments(node)
        layers = [[[a["w_ih"], a["w_hh"]]]] if "w_hh" in a else layer_weights(a)
        first = {id(weights[0]) for weights in layers[0]}
        read = [w for layer in layers for each in layer for w in each[:2]]
        found = [w for w in read if id(w) not in first and w.op == "get_attr" and self.groups(w, 1)]
        return frozenset((str(w.target), 1) for w in found)

    def depthwise(self, node: fx.Node) -> bool:
        """Do channels stay apart."""
        a = arguments(node)
        return a["groups"] != 1 and self.analysis.shapes[a["weight"].name][1] == 1

    def demand(self, node: Any, group: int) -> frozenset[Ref] | None:
        """Tensors to multiply so that closed channels of this value are zero; None if there are none."""
        if not isinstance(node, fx.Node) or group not in self.groups(node):
            return None
        key = (node.name, group)
        if key not in self.memo:
            self.memo[key] = None  # graphs are acyclic; the entry only guards recursion
            self.memo[key] = self._demand(node, group)
        return self.memo[key]

    def _demand(self, node: fx.Node, group: int) -> frozenset[Ref] | None:
        if node.op == "get_attr":
            name = str(node.target)
            return frozenset((name, axis) for axis in self.lies.get((name, group), ())) or None
        if node.op == "call_module":
            if isinstance(self.modules[str(node.target)], BatchNorm):
                return self._affine(node.args[1:], group)
            return self.demand(node.args[0], group)
        if node.op != "call_function":
            return None
        if node.target.__name__ == "getitem":  # type: ignore[union-attr]
            return self._demand_of_part(node, group)
        row, a = aten_operator(operator_name(node)), arguments(node)
        if row.kind in ("cat", "stack"):
            return self._all([t for t in a["tensors"] if row.kind == "stack" or group in self.groups(t)], group)
        if row.zero == "sum":
            return self._all([a["self"], a["other"]], group)
        if row.zero == "mul":
            return self._least([a["self"], a["other"]], group)
        if row.is_a("norm"):
            return self._norm(node, a, group)
        if row.kind in ("matmul", "einsum"):  # of two activations, the reader's columns are the better place
            return self._least([v for v in node.all_input_nodes if v.name in self.weights], group)
        if row.kind == "embedding":
            return self.demand(a["weight"], group)
        if row.weights:
            return self._produced(node, row, a, group)
        if row.kind == "pad" and keeps_zero(row, node) and group not in self.groups(node.args[0]):
            return frozenset()  # zeros that stand beside what is padded
        if row.kind == "combine" and group not in self.groups(node.args[0]):
            return None
        if "max_pool" in operator_name(node) and _is_least(node.args[0]):
            return self.demand(node.args[0].args[0], group)  # type: ignore[union-attr]
        return self.demand(node.args[0], group) if keeps_zero(row, node) else None

    def _demand_of_part(self, node: fx.Node, group: int) -> frozenset[Ref] | None:
        """A part of a split value lies on fewer channels, and the whole is zero where it is."""
        whole = node.args[0]
        assert isinstance(whole, fx.Node)
        row = aten_operator(operator_name(whole))
        return self.demand(whole.args[0], group) if keeps_zero(row, whole) else None

    def _least(self, operands: Iterable[Any], group: int) -> frozenset[Ref] | None:
        """One factor of a product must vanish."""
        found = [refs for v in operands if (refs := self.demand(v, group)) is not None]
        return min(found, key=len) if found else None

    def _all(self, operands: Iterable[Any], group: int) -> frozenset[Ref] | None:
        """Every operand must vanish; a number or a value without the labelled axis does not."""
        found: set[Ref] = set()
        for operand in operands:
            refs = self.demand(operand, group)
            if refs is None:
                return None
            found |= refs
        return frozenset(found)

    def _affine(self, tensors: Any, group: int) -> frozenset[Ref] | None:
        """Scale and shift of a norm, either of which may be absent, but not both."""
        given = [t for t in tensors if t is not None]
        return self._all(given, group) if given else None

    def _norm(self, node: fx.Node, a: dict[str, Any], group: int) -> frozenset[Ref] | None:
        first = len(self.analysis.shapes[node.name]) - len(a["normalized_shape"]) if "normalized_shape" in a else 1
        on = [axis.dim for axis in self.analysis.values[node.name] if group in axis.groups]
        return self._affine((a["weight"], a.get("bias")), group) if min(on) >= first else None

    def _produced(self, node: fx.Node, row: Operator, a: dict[str, Any], group: int) -> frozenset[Ref] | None:
        """The rows of a weight with its bias."""
        weight, bias = a[row.weights[0]], a[row.weights[1]] if len(row.weights) > 1 else None
        return self._all([weight] if bias is None else [weight, bias], group)
