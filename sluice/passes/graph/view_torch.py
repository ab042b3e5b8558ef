"""The dataflow view of a captured graph: ATen calls, raised batch norms with their statistics, weights as
``get_attr``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sluice.passes.graph.aten_walk import arguments, keeps_zero, limits, operator_name, static_shape
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.operators import UNKNOWN, Operator, aten_operator
from sluice.passes.graph.view import GraphView, Node

__all__ = ["view_torch"]

_INERT = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


def view_torch(gm: fx.GraphModule) -> GraphView:
    """The captured graph as `sluice.passes.graph.blocks` reads it; values are named by their nodes."""
    reader = _Reader(gm)
    nodes: list[Node] = []
    outputs: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "output":
            outputs |= {n.name for n in node.all_input_nodes}
        elif node.op in ("call_function", "call_module") and node.target is not operator.getitem:
            nodes.append(reader.node(node))
    return GraphView(tuple(nodes), frozenset(outputs), frozenset(reader.derived), reader.shapes)


class _Reader:
    """State of one walk: which values are derived, and which of those are a named tensor in another layout."""

    def __init__(self, gm: fx.GraphModule):
        self.modules = dict(gm.named_modules())
        state = gm.state_dict()
        gets = [n for n in gm.graph.nodes if n.op == "get_attr"]
        self.derived = {n.name for n in gets}
        named = {n.name: str(n.target) for n in gets if n.target in state and state[n.target].is_floating_point()}
        self.tensor = named
        self.alias = dict(named)
        self.state = set(state)
        values = {n.name: n.meta.get("val") for n in gm.graph.nodes}
        self.shapes = {name: static_shape(v) for name, v in values.items() if isinstance(v, torch.Tensor)}

    def node(self, n: fx.Node) -> Node:
        reads = [v.name for v in n.all_input_nodes]
        outputs = tuple(u.name for u in n.users if u.target is operator.getitem) or (n.name,)
        name = operator_name(n) if n.op == "call_function" else type(self.modules[str(n.target)]).__name__
        row = aten_operator(name) if n.op == "call_function" else UNKNOWN
        sized = n.op == "call_function" and name in ("sym_size", "sym_numel", "size")
        if sized or all(v in self.derived for v in reads):
            self.derived.update(outputs)
        first = n.args[0].name if n.args and isinstance(n.args[0], fx.Node) else ""
        if row.is_a("layout") and first in self.alias:
            self.alias[n.name] = self.alias[first]
        active = [v for v in reads if v not in self.derived]
        kind, closes = self._kind(n, row, active)
        tensors = list(dict.fromkeys(self.alias[v] for v in reads if v in self.alias))
        module = self.modules[str(n.target)] if n.op == "call_module" else None
        if isinstance(module, BatchNorm):
            tensors += [f"{n.target}.{leaf}" for leaf in ("running_mean", "running_var")]
        return Node(
            name,
            kind,
            outputs,
            tuple(v for v in reads if v not in self.tensor),
            tuple(t for t in tensors if t in self.state),
            closes,
            limits(row, n),
            kind == "sum" and name == "add" and len(active) == 2 and arguments(n).get("alpha", 1) == 1,
        )

    def _kind(self, n: fx.Node, row: Operator, active: Sequence[str]) -> tuple[str, tuple[str, ...] | None]:
        first = n.args[0].name if n.args and isinstance(n.args[0], fx.Node) else ""
        if n.op == "call_module":
            module = self.modules[str(n.target)]
            if isinstance(module, BatchNorm):
                return "norm", self._affine(n.args[1:3])
            return ("zero" if isinstance(module, _INERT) else "other"), None
        if not isinstance(n.target, torch._ops.OpOverload):
            return "other", None
        a = arguments(n)
        if row.weights:
            weight, *bias = (a[key] for key in row.weights)
            if len(active) == 1 and isinstance(weight, fx.Node) and weight.name in self.derived:
                return "weighted", self._affine((weight, *bias))
            return "other", None
        if row.is_a("norm"):
            return "norm", self._affine((a.get("weight"), a.get("bias")))
        if row.zero in ("sum", "mul", "choice"):
            operands = a["tensors"] if "tensors" in a else (a["self"], a["other"])
            rest = [v for v in operands if (v.name not in active if isinstance(v, fx.Node) else v != 0)]
            return row.zero, self._affine(rest) if rest else ()
        return ("zero" if first in active and keeps_zero(row, n) else "other"), None

    def _affine(self, tensors: Sequence[Any]) -> tuple[str, ...] | None:
        """The named tensors that these arguments are; None if there is none, or one is anything else."""
        given = [t for t in tensors if t is not None]
        known = [self.alias.get(t.name) for t in given if isinstance(t, fx.Node)]
        names = tuple(t for t in known if t is not None)
        return names if names and len(names) == len(given) else None
