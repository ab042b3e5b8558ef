"""Where the mask of an axis group has to multiply so that a closed channel carries nothing.

A channel may be cut when, with its gates closed, no consumer of its axis can see it. Walk backwards from every
consumer (an operator that contracts the axis):

1. A norm with an affine stops the walk: scale and shift are multiplied, *after* the normalisation, which would undo
   a mask before it. A weight that produces the axis with no norm behind it is multiplied itself, with its bias.
2. Operators that map 0 to 0 and leave channels apart (ReLU, pooling, reshapes, concatenation, ...) pass the demand
   on; an addition passes it to all its operands, a product to one of them.
3. Where the walk meets anything else, f(0) != 0 (sigmoid) for example, the mask goes onto the consumer's own weight,
   along its input axis: exact for whatever comes before.

Masks multiply tensors of the size of a weight, never activations. A layer or group norm over a gated axis takes its
statistics over the kept channels only; those nodes are listed too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sluice.passes.graph.aten_walk import arguments, operator_name
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.groups import Analysis

__all__ = ["Placement", "place_gates"]

_ZERO_PRESERVING = frozenset(
    [
        "relu",
        "relu6",
        "silu",
        "hardswish",
        "gelu",
        "tanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "mish",
        "hardshrink",
        "softshrink",
        "neg",
        "abs",
        "sqrt",
        "square",
        "sign",
        "erf",
        "sin",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "prelu",
        "rrelu",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "swapaxes",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "max_pool1d_with_indices",
        "max_pool2d_with_indices",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_bilinear2d",
        "upsample_linear1d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "mean",
        "sum",
        "amax",
        "amin",
        "chunk",
        "split",
        "split_with_sizes",
        "slice",
        "glu",
        "narrow",
        "select",
        "expand",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "reflection_pad1d",
        "reflection_pad2d",
        "replication_pad2d",
    ]
)
_CONTRACTIONS = frozenset(["linear", "addmm", "matmul", "mm"])
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
        name = operator_name(node)
        if name.startswith("conv") and (weight := self.tensor(node.args[1])):
            a = arguments(node)
            transposed = "transpose" in name
            if a["groups"] > 1 and self.analysis.tensors[weight][1] == 1:
                return []  # depthwise: channels stay apart
            return [(node.args[0], weight, 0 if transposed else 1)]
        if name == "addmm" and (weight := self.tensor(node.args[2])):
            return [(node.args[1], weight, 0)]
        if name in _CONTRACTIONS and (weight := self.tensor(node.args[1])):
            return [(node.args[0], weight, 1 if name == "linear" else 0)]
        return []

    def demand(self, node: Any) -> frozenset[Ref] | None:
        """Tensors to multiply so that closed channels of this value are zero; None if that cannot be had."""
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
        name, a = operator_name(node), arguments(node)
        if name in ("add", "sub"):
            return self._all([v for v in (a["self"], a["other"])])
        if name in ("mul", "div"):
            operands = [a["self"], a["other"]] if name == "mul" else [a["self"]]
            found = [r for r in (self.demand(v) for v in operands if self.labelled(v)) if r is not None]
            return min(found, key=len) if found else None
        if name == "cat":
            return self._all([t for t in a["tensors"] if self.labelled(t)])
        if name in ("group_norm", "layer_norm", "instance_norm"):
            return self._norm(node, a)
        if name.startswith("conv") and (weight := self.tensor(node.args[1])):
            depthwise = a["groups"] > 1 and self.analysis.tensors[weight][1] == 1
            return self._produced(weight, 1 if "transpose" in name and not depthwise else 0, a["bias"])
        if name in _CONTRACTIONS or name == "addmm":
            operand = node.args[2] if name == "addmm" else node.args[1]
            weight = self.tensor(operand)
            bias = a.get("bias") if name == "linear" else a["self"] if name == "addmm" else None
            return None if weight is None else self._produced(weight, 0 if name == "linear" else 1, bias)
        if name in ("pad", "constant_pad_nd"):
            return self.demand(a["self"]) if not a.get("value") else None
        if name == "hardtanh":
            return self.demand(a["self"]) if a["min_val"] <= 0 <= a["max_val"] else None
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = a.get("min"), a.get("max")
            return self.demand(a["self"]) if (low is None or low <= 0) and (high is None or high >= 0) else None
        return self.demand(node.args[0]) if name in _ZERO_PRESERVING else None

    def _all(self, operands: list[Any]) -> frozenset[Ref] | None:
        """Every operand must vanish; a number or a value without the labelled axis does not."""
        found: set[Ref] = set()
        for operand in operands:
            tensor = self.tensor(operand)
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
