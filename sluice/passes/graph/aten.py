"""The ATen front end of the coupling rules: captured ``torch.fx`` graph -> `Analysis`.

One literal table, operator name -> rule. An in-place variant has the rule of its base. What the table lacks freezes
its inputs with the operator's name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sluice.core.errors import SluiceError
from sluice.passes.graph import aten_layout as layout
from sluice.passes.graph.aten_walk import Args, Rule, Walk, arguments, operator_name, static_shape, unknown, where
from sluice.passes.graph.capture import BatchNorm
from sluice.passes.graph.coupling import Axis
from sluice.passes.graph.groups import Analysis, find_groups

__all__ = ["RULES", "analyze"]


def _conv(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    transposed = "transpose" in operator_name(n)
    out, into = (1, 0) if transposed else (0, 1)
    rank = len(w.size(a["input"]))
    dim = rank - len(w.size(a["weight"])) + 1
    bias = w.tensor(a["bias"])
    return w.coupling.contract(
        w.of(a["input"]), dim, rank, w.tensor(a["weight"]), out, into, bias, a["groups"], where(n, a["weight"])
    )


def _linear(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["input"]))
    bias = w.tensor(a.get("bias"))
    return w.coupling.contract(
        w.of(a["input"]), rank - 1, rank, w.tensor(a["weight"]), 0, 1, bias, 1, where(n, a["weight"])
    )


def _addmm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.contract(
        w.of(a["mat1"]), 1, 2, w.tensor(a["mat2"]), 1, 0, w.tensor(a["self"]), 1, where(n, a["mat2"])
    )


def _matmul(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, weight = a["self"], a.get("other", a.get("mat2"))
    if w.tensor(weight) is None or len(w.size(weight)) != 2:
        return unknown(w, n, a)
    rank = len(w.size(x))
    return w.coupling.contract(w.of(x), rank - 1, rank, w.tensor(weight), 1, 0, None, 1, where(n, weight))


def _computed(w: Walk, tensors: Sequence[Any]) -> bool:
    """Is one of the tensors of a norm neither absent nor a named tensor?"""
    return any(t is not None and w.tensor(t) is None for t in tensors)


def _instance_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    tensors = [a[k] for k in ("weight", "bias", "running_mean", "running_var")]
    if _computed(w, tensors):
        return unknown(w, n, a)
    return w.coupling.per_channel(w.of(a["input"]), 1, [w.tensor(t) for t in tensors], where(n))


def _group_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return unknown(w, n, a)
    names = [w.tensor(a["weight"]), w.tensor(a["bias"])]
    return w.coupling.group_norm(w.of(a["input"]), 1, a["num_groups"], names, where(n))


def _layer_norm(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return unknown(w, n, a)
    first = len(w.size(a["input"])) - len(a["normalized_shape"])
    return w.coupling.layer_norm(w.of(a["input"]), first, [w.tensor(a["weight"]), w.tensor(a["bias"])], where(n))


def _combine(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    operands = [(w.of(v), w.size(v), w.tensor(v)) for v in n.all_input_nodes if w.shape.get(v.name) is not None]
    return w.coupling.combine(operands, w.size(n), where(n))


def _unary(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.of(n.args[0])


def _prelu(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x = w.of(a["self"])
    if x is not None and w.size(a["weight"]) not in ((1,), ()):
        if _computed(w, [a["weight"]]):
            return unknown(w, n, a)
        return w.coupling.per_channel(x, 1, [w.tensor(a["weight"])], where(n))
    return x


def _reduce(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["self"]))
    dims = a.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else dims if isinstance(dims, Sequence) else [dims]
    axis = w.coupling.reduce(w.of(a["self"]), dims, rank, bool(a.get("keepdim", False)), where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):  # max and min with their positions
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _spatial(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    spatial_axes = next(int(c) for c in operator_name(n) if c.isdigit())
    axis = w.coupling.spatial(w.of(n.args[0]), len(w.size(n.args[0])) - spatial_axes, where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _pad(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank, pads = len(w.size(a["self"])), a["pad"] if "pad" in a else a["padding"]
    return w.coupling.spatial(w.of(a["self"]), rank - len(pads) // 2, where(n))


def _softmax(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.along(w.of(a["self"]), a["dim"] % len(w.size(a["self"])), where(n))


def _fixed(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return None


_UNARY = """relu relu6 hardtanh silu hardswish hardsigmoid gelu sigmoid tanh leaky_relu elu selu celu softplus mish
    log_sigmoid hardshrink softshrink threshold clamp clamp_min clamp_max neg abs exp log sqrt rsqrt pow square sign
    reciprocal erf sin cos clone contiguous detach alias to _to_copy type_as dropout feature_dropout alpha_dropout
    lift_fresh_copy floor ceil round positive rrelu"""
_BINARY = "add sub mul div rsub true_divide maximum minimum where pow fmod remainder lerp addcmul"
_RESHAPES = "view reshape flatten unflatten squeeze unsqueeze _unsafe_view"
_POOLS = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d"""
_CONVS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BINARY.split(), _combine),
    **dict.fromkeys(_RESHAPES.split(), layout.reshape),
    **dict.fromkeys(_POOLS.split(), _spatial),
    **dict.fromkeys(_CONVS.split(), _conv),
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "logsumexp", "norm", "linalg_vector_norm"],
        _reduce,
    ),
    **dict.fromkeys(["permute", "transpose", "t", "swapaxes"], layout.permute),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum", "_softmax"], _softmax),
    "pixel_shuffle": layout.pixel_shuffle,
    "pixel_unshuffle": layout.pixel_unshuffle,
    "channel_shuffle": layout.channel_shuffle,
    **dict.fromkeys(["pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"], _pad),
    **dict.fromkeys(["chunk", "split", "split_with_sizes"], layout.split),
    **dict.fromkeys(["cat", "concat", "concatenate"], layout.cat),
    **dict.fromkeys(["expand", "broadcast_to"], layout.expand),
    **dict.fromkeys(["expand_as", "view_as", "reshape_as"], layout.like),
    **dict.fromkeys(["ones_like", "zeros_like", "full_like"], _unary),
    **dict.fromkeys(["sym_size", "ones", "zeros", "full", "arange", "empty", "scalar_tensor"], _fixed),
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "slice": layout.slice_,
    "narrow": layout.narrow,
    "glu": layout.glu,
    "select": layout.select,
    "index_select": layout.index_select,
}


def analyze(gm: fx.GraphModule, exclude: Sequence[str] = (), *, needed: bool = True) -> Analysis:
    """Read a captured graph: groups, what is frozen and why, the labelled axis of every node.

    Args:
        needed: False for a network whose widths may all be fixed, since something else is done to it.
    Raises:
        SluiceError: no width can be cut, and one is needed.
    """
    w = Walk(gm)
    modules = dict(gm.named_modules())
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            w.shape[node.name] = static_shape(value)
        if node.op == "get_attr":
            w.axis[node.name] = w.vector(node)
        elif node.op == "call_function":
            if node.target is operator.getitem:
                w.axis[node.name] = layout.getitem(w, node, {})
            elif isinstance(node.target, torch._ops.OpOverload):
                rule = RULES.get(operator_name(node), unknown)
                w.axis[node.name] = rule(w, node, arguments(node))
            elif any(w.of(v) is not None for v in node.all_input_nodes):
                unknown(w, node, {})
        elif node.op == "call_module":
            x = node.args[0]
            w.axis[node.name] = w.of(x)
            if isinstance(modules[node.target], BatchNorm):
                own = [f"{node.target}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
                names = [name for name in own if name in w.coupling.tensors]
                w.axis[node.name] = w.coupling.per_channel(w.of(x), 1, names, str(node.target))
        elif node.op == "output":
            w.coupling.unknown([w.of(v) for v in node.all_input_nodes], "is an output of the model")
    analysis = find_groups(w.coupling, w.axis, w.shape, exclude)
    if needed and not analysis.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(analysis.frozen.items())[:4])
        raise SluiceError(
            f"nothing in this model can be cut ({reasons or 'it has no layer with a weight'}); "
            "give a model with an inner width that nothing outside depends on"
        )
    return analysis
