"""The dataflow view of a captured graph: ATen calls, raised batch norms with their statistics, weights as
``get_attr``."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from sluice.passes.graph.aten_walk import arguments, operator_name, static_shape
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.view import GraphView, Node

__all__ = ["view_torch"]

_LAYOUTS = """view reshape flatten unflatten squeeze unsqueeze _unsafe_view permute transpose t swapaxes clone
    contiguous detach alias to _to_copy type_as expand"""


_ZEROS = """leaky_relu prelu rrelu elu selu celu gelu silu hardswish mish tanh softsign hardshrink softshrink neg abs
    sqrt square sign erf sin floor ceil round dropout feature_dropout alpha_dropout feature_alpha_dropout max_pool1d
    max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d
    upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d mean sum amax amin chunk
    split split_with_sizes slice narrow select unbind glu pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d
    reflection_pad2d replication_pad2d div roll flip"""


_LAYOUT = frozenset(_LAYOUTS.split())


_ZERO = _LAYOUT | frozenset(_ZEROS.split())


_INERT = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


# Which arguments are weight and bias.
_WEIGHTED = {
    **dict.fromkeys([f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)], ("weight", "bias")),
    "linear": ("weight", "bias"),
    "addmm": ("mat2", "self"),
    "matmul": ("other",),
    "mm": ("mat2",),
}


_NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


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
        sized = n.op == "call_function" and name in ("sym_size", "sym_numel", "size")
        if sized or all(v in self.derived for v in reads):
            self.derived.update(outputs)
        first = n.args[0].name if n.args and isinstance(n.args[0], fx.Node) else ""
        if n.op == "call_function" and name in _LAYOUT and first in self.alias:
            self.alias[n.name] = self.alias[first]
        active = [v for v in reads if v not in self.derived]
        bounds = _bounds(n, name)
        kind, closes = self._kind(n, name, active, bounds)
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
            bounds,
            kind == "sum" and name == "add" and len(active) == 2 and arguments(n).get("alpha", 1) == 1,
        )

    def _kind(
        self, n: fx.Node, name: str, active: Sequence[str], bounds: tuple[float, float] | None
    ) -> tuple[str, tuple[str, ...] | None]:
        first = n.args[0].name if n.args and isinstance(n.args[0], fx.Node) else ""
        if n.op == "call_module":
            module = self.modules[str(n.target)]
            if isinstance(module, BatchNorm):
                return "norm", self._affine(n.args[1:3])
            return ("zero" if isinstance(module, _INERT) else "other"), None
        if not isinstance(n.target, torch._ops.OpOverload):
            return "other", None
        a = arguments(n)
        if name in _WEIGHTED:
            weight, *bias = (a[key] for key in _WEIGHTED[name])
            if len(active) == 1 and isinstance(weight, fx.Node) and weight.name in self.derived:
                return "weighted", self._affine((weight, *bias))
            return "other", None
        if name in _NORMS:
            return "norm", self._affine((a.get("weight"), a.get("bias")))
        if name in ("add", "sub", "mul") and "other" in a:
            rest = [v for v in (a["self"], a["other"]) if not (isinstance(v, fx.Node) and v.name in active)]
            return "mul" if name == "mul" else "sum", self._affine(rest) if rest else ()
        if name == "cat":
            return "sum", self._affine(rest) if (rest := [v for v in a["tensors"] if v.name not in active]) else ()
        if first not in active:
            return "other", None
        if bounds is not None:
            return ("zero" if bounds[0] <= 0.0 <= bounds[1] else "other"), None
        if name in ("pad", "constant_pad_nd"):
            return ("other" if a.get("value") else "zero"), None
        return ("zero" if name in _ZERO else "other"), None

    def _affine(self, tensors: Sequence[Any]) -> tuple[str, ...] | None:
        """The named tensors that these arguments are; None if there is none, or one is anything else."""
        given = [t for t in tensors if t is not None]
        known = [self.alias.get(t.name) for t in given if isinstance(t, fx.Node)]
        names = tuple(t for t in known if t is not None)
        return names if names and len(names) == len(given) else None


def _bounds(n: fx.Node, name: str) -> tuple[float, float] | None:
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name not in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        return None
    a = arguments(n)
    low, high = (a["min_val"], a["max_val"]) if name == "hardtanh" else (a.get("min"), a.get("max"))
    if any(isinstance(v, fx.Node) for v in (low, high)):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)
