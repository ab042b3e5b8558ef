"""The state of a walk over a captured graph, and how a node is read; shared by the rules of the ATen front end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sluice.passes.graph.coupling import Axis, Coupling, Shape
from sluice.passes.graph.operators import ATEN, Operator

__all__ = [
    "Args",
    "OperatorRule",
    "Walk",
    "arguments",
    "each_axis",
    "keeps_zero",
    "limits",
    "operator_name",
    "static_shape",
    "unknown",
    "where",
]

BATCH = 10_007  # stands for a dynamic size: prime, so that products stay recognisable


class Walk:
    """State of one walk over a graph: labelled axes and sizes by node."""

    def __init__(self, gm: fx.GraphModule):
        state = gm.state_dict(keep_vars=True)
        self.coupling = Coupling({name: tuple(t.shape) for name, t in state.items()})
        self.axis: dict[str, Axis | None] = {}
        self.shape: dict[str, Shape] = {}
        self.parts: dict[str, list[Axis | None]] = {}  # nodes with several outputs

    def of(self, node: Any) -> Axis | None:
        return self.axis.get(node.name) if isinstance(node, fx.Node) else None

    def size(self, node: Any) -> Shape:
        return self.shape.get(node.name, ()) if isinstance(node, fx.Node) else ()

    def tensor(self, node: Any) -> str | None:
        """Name of the state_dict tensor that the node reads, if it does."""
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self.coupling.tensors:
            return str(node.target)
        return None

    def vector(self, node: fx.Node) -> Axis | None:
        """A named tensor with one axis longer than 1, read as a value (a bias, a layer scale)."""
        name = self.tensor(node)
        long = [] if name is None else [d for d, size in enumerate(self.coupling.tensors[name]) if size > 1]
        return Axis(long[0], self.coupling.param(name, long[0])) if name is not None and len(long) == 1 else None


Args = dict[str, Any]
OperatorRule = Callable[[Walk, fx.Node, Args], Axis | None]


def unknown(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    w.coupling.unknown([w.of(v) for v in n.all_input_nodes], f"unknown operator {operator_name(n)} ({n.name})")
    return None


def static_shape(value: torch.Tensor) -> Shape:
    """Sizes as ints; every symbol counts as `BATCH`."""
    sizes = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
        else:
            expr = size.node.expr
            sizes.append(int(expr.subs(dict.fromkeys(expr.free_symbols, BATCH))))
    return tuple(sizes)


def operator_name(node: fx.Node) -> str:
    """``aten.relu_.default -> relu``; with the overload where the table has a row for it: ``max.other``."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    _, name, overload = str(node.target).split(".")
    name = name if name.startswith("_") else name.removesuffix("_")
    full = f"{name}.{overload}"
    return full if full in ATEN else name


def arguments(node: fx.Node) -> Args:
    """Arguments by name in the order of the schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**{arg.name: value for arg, value in zip(schema, node.args, strict=False)}, **node.kwargs}
    return {arg.name: given.get(arg.name, arg.default_value) for arg in schema}


def each_axis(value: Any, axes: int) -> tuple[int, ...]:
    """One number per axis, as operators also take one for all."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * axes if len(values) == 1 else values


def limits(row: Operator, node: fx.Node) -> tuple[float, float] | None:
    """The range that the operator limits every entry to; None if it does not, or computes it."""
    if row.limits is None or node.op != "call_function":
        return None
    low, high = (arguments(node).get(v) if isinstance(v, str) else v for v in row.limits)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def keeps_zero(row: Operator, node: fx.Node) -> bool:
    """Is the output zero where the first input is."""
    if row.limits is not None:
        bounds = limits(row, node)
        return bounds is not None and bounds[0] <= 0.0 <= bounds[1]
    if row.zero == "number":
        a = arguments(node)
        if "exponent" in a:
            return isinstance(a["exponent"], (int, float)) and a["exponent"] > 0
        return not a.get("value")  # the number that pads, or takes the place of small entries
    return row.zero == "zero"


def where(node: fx.Node, weight: Any = None) -> str:
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0] or str(weight.target)
    return f"{operator_name(node)} ({node.name})"
