"""The state of a walk over a captured graph, and how a node is read; shared by the rules of the ATen front end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from sluice.core.algebra import prime_beside
from sluice.passes.graph.coupling import Coupling, Operand, Shape, Value, fixed
from sluice.passes.graph.operators import ATEN, Operator

__all__ = [
    "Args",
    "OperatorRule",
    "Walk",
    "arguments",
    "correction_of",
    "each_axis",
    "factors_of",
    "keeps_zero",
    "limits",
    "operator_name",
    "padding",
    "reduced",
    "static_shape",
    "unknown",
    "where",
]

BATCH = 10_007  # stands for a dynamic size: prime, so that products stay recognisable


class Walk:
    """State of one walk over a graph: labels and sizes by node."""

    def __init__(self, gm: fx.GraphModule):
        state = gm.state_dict(keep_vars=True)
        first: dict[int, str] = {}  # one tensor under several names is one tensor
        read = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
        self.names = {name: first.setdefault(id(state[name]), name) for name in read if name in state}
        self.coupling = Coupling({name: tuple(t.shape) for name, t in state.items()})
        self.batch = stand_in(gm)
        self.value: dict[str, Value] = {}
        self.shape: dict[str, Shape] = {}
        self.parts: dict[str, list[Value]] = {}  # nodes with several outputs
        self.weights: set[str] = set()  # nodes computed from named tensors alone

    def of(self, node: Any) -> Value:
        """The labels of a node, of a number among the arguments as well."""
        found = self.value.get(node.name) if isinstance(node, fx.Node) else None
        return fixed(self.size(node)) if found is None else found

    def size(self, node: Any) -> Shape:
        return self.shape.get(node.name, ()) if isinstance(node, fx.Node) else ()

    def operand(self, node: Any) -> Operand:
        return self.of(node), self.size(node)

    def operands(self, nodes: Sequence[Any]) -> list[Operand]:
        """Of those that are tensors."""
        return [self.operand(node) for node in nodes if isinstance(node, fx.Node)]

    def is_weight(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.name in self.weights

    def free(self, sizes: Sequence[Any]) -> list[int]:
        """The places of sizes that are plain numbers."""
        return [d for d, size in enumerate(sizes) if isinstance(size, int) and size > 1]

    def parameter(self, node: fx.Node) -> Value:
        """A tensor that the network holds; one that it does not save is fixed."""
        name = self.names.get(str(node.target))
        return fixed(self.size(node)) if name is None else self.coupling.value(name)


Args = dict[str, Any]
OperatorRule = Callable[[Walk, fx.Node, Args], Value]


def unknown(w: Walk, n: fx.Node, a: Args, why: str = "") -> Value:
    """Everything that the operator reads stays whole."""
    why = why or f"unknown operator {operator_name(n)} ({n.name})"
    w.coupling.unknown([w.of(v) for v in n.all_input_nodes], why)
    for weight in (v for v in n.all_input_nodes if w.is_weight(v) and len(w.size(v)) > 1):
        w.coupling.produce(w.of(weight)[0])
    return fixed(w.size(n))


def stand_in(gm: fx.GraphModule) -> int:
    """A prime that divides no size of the graph, to stand for a free batch."""
    sizes: set[int] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor):
                sizes.update(size for size in tensor.shape if isinstance(size, int))
        for argument in node.args:
            for size in argument if isinstance(argument, (tuple, list)) else (argument,):
                if isinstance(size, int):
                    sizes.add(abs(size))
    return prime_beside(sizes)


def static_shape(value: torch.Tensor, batch: int = BATCH) -> Shape:
    """Sizes as ints; every symbol counts as ``batch``."""
    sizes = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
        else:
            expr = size.node.expr
            whole = batch if expr.is_Symbol else int(expr.subs(dict.fromkeys(expr.free_symbols, batch)))
            sizes.append(whole)
    return tuple(sizes)


def operator_name(node: fx.Node) -> str:
    """``aten.relu_.default -> relu``; with the overload where the table has a row for it: ``max.other``."""
    return _name_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


@cache
def _name_of(target: torch._ops.OpOverload) -> str:
    _, name, overload = str(target).split(".")
    name = name if name.startswith("_") else name.removesuffix("_")
    full = f"{name}.{overload}"
    return full if full in ATEN else name


def arguments(node: fx.Node) -> Args:
    """Arguments by name in the order of the schema, defaults filled in."""
    names, defaults = _schema_of(node.target)
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@cache
def _schema_of(target: torch._ops.OpOverload) -> tuple[tuple[str, ...], Args]:
    """Names of the arguments, and what they are where nothing is given."""
    schema = target._schema.arguments
    return tuple(arg.name for arg in schema), {arg.name: arg.default_value for arg in schema}


def correction_of(a: Mapping[str, Any]) -> float:
    """By how much a variance divides by less than the number of entries, of the arguments of its operator."""
    correction = a.get("correction", a.get("unbiased", True))
    return 1.0 if correction is None else float(correction)


def factors_of(a: Args) -> tuple[fx.Node, fx.Node]:
    """The two factors of an operator that adds their product to something."""
    return (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])


def padding(a: Args, rank: int) -> dict[int, tuple[int, int]]:
    """By axis what an operator pads it with in front and behind, of its arguments; only where it does."""
    pads = a["pad"] if "pad" in a else a["padding"]
    pairs = {rank - 1 - k: (pads[2 * k], pads[2 * k + 1]) for k in range(len(pads) // 2)}
    return {d: pair for d, pair in pairs.items() if pair != (0, 0)}


def reduced(a: Mapping[str, Any], rank: int) -> list[int]:
    """The axes that a sum, a mean or a maximum runs over, of the arguments of its operator."""
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []


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
