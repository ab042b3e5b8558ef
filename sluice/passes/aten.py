"""The ATen front end of the coupling rules: captured ``torch.fx`` graph -> `Analysis`.

One literal table, operator name -> rule. An in-place variant has the rule of its base. What the table lacks freezes
its inputs with the operator's name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sluice.errors import SluiceError
from sluice.passes.axes import Axis, Coupling, Shape
from sluice.passes.capture import BatchNorm
from sluice.passes.sites import Analysis, find_groups

__all__ = ["analyze", "arguments", "operator_name", "static_shape"]

BATCH = 10_007  # stands for a dynamic size: prime, so that products stay recognisable


class _Walk:
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
Rule = Callable[[_Walk, fx.Node, Args], Axis | None]


def _conv(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    transposed = "transpose" in operator_name(n)
    out, into = (1, 0) if transposed else (0, 1)
    rank = len(w.size(a["input"]))
    dim = rank - len(w.size(a["weight"])) + 1
    bias = w.tensor(a["bias"])
    return w.coupling.contract(
        w.of(a["input"]), dim, rank, w.tensor(a["weight"]), out, into, bias, a["groups"], _where(n, a["weight"])
    )


def _linear(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["input"]))
    bias = w.tensor(a.get("bias"))
    return w.coupling.contract(
        w.of(a["input"]), rank - 1, rank, w.tensor(a["weight"]), 0, 1, bias, 1, _where(n, a["weight"])
    )


def _addmm(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.contract(
        w.of(a["mat1"]), 1, 2, w.tensor(a["mat2"]), 1, 0, w.tensor(a["self"]), 1, _where(n, a["mat2"])
    )


def _matmul(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x, weight = a["self"], a.get("other", a.get("mat2"))
    if w.tensor(weight) is None or len(w.size(weight)) != 2:
        return _unknown(w, n, a)
    rank = len(w.size(x))
    return w.coupling.contract(w.of(x), rank - 1, rank, w.tensor(weight), 1, 0, None, 1, _where(n, weight))


def _computed(w: _Walk, tensors: Sequence[Any]) -> bool:
    """Is one of the tensors of a norm neither absent nor a named tensor?"""
    return any(t is not None and w.tensor(t) is None for t in tensors)


def _instance_norm(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    tensors = [a[k] for k in ("weight", "bias", "running_mean", "running_var")]
    if _computed(w, tensors):
        return _unknown(w, n, a)
    return w.coupling.per_channel(w.of(a["input"]), 1, [w.tensor(t) for t in tensors], _where(n))


def _group_norm(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return _unknown(w, n, a)
    names = [w.tensor(a["weight"]), w.tensor(a["bias"])]
    return w.coupling.group_norm(w.of(a["input"]), 1, a["num_groups"], names, _where(n))


def _layer_norm(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    if _computed(w, [a["weight"], a["bias"]]):
        return _unknown(w, n, a)
    first = len(w.size(a["input"])) - len(a["normalized_shape"])
    return w.coupling.layer_norm(w.of(a["input"]), first, [w.tensor(a["weight"]), w.tensor(a["bias"])], _where(n))


def _combine(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    operands = [(w.of(v), w.size(v), w.tensor(v)) for v in n.all_input_nodes if w.shape.get(v.name) is not None]
    return w.coupling.combine(operands, w.size(n), _where(n))


def _unary(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.of(n.args[0])


def _prelu(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x = w.of(a["self"])
    if x is not None and w.size(a["weight"]) not in ((1,), ()):
        if _computed(w, [a["weight"]]):
            return _unknown(w, n, a)
        return w.coupling.per_channel(x, 1, [w.tensor(a["weight"])], _where(n))
    return x


def _cat(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.concat([(w.of(t), w.size(t)) for t in a["tensors"]], a["dim"], _where(n))


def _split(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x, rank = w.of(a["self"]), len(w.size(a["self"]))
    dim, start, parts = a["dim"] % rank, 0, []
    for value in n.meta["val"]:
        stop = start + static_shape(value)[dim]
        parts.append(w.coupling.narrow(x, dim, start, stop, _where(n)))
        start = stop
    w.parts[n.name] = parts
    return None


def _getitem(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    parts = w.parts.get(n.args[0].name)  # type: ignore[union-attr,arg-type]
    if parts is not None and isinstance(n.args[1], int):
        return parts[n.args[1]]
    w.coupling.freeze(w.of(n.args[0]), f"{_where(n)} picks from several outputs")
    return None


def _slice(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x, size = w.of(a["self"]), w.size(a["self"])
    dim = a["dim"] % len(size)
    if x is None or x.dim != dim:
        return x
    start, stop, step = a.get("start") or 0, a.get("end"), a.get("step", 1)
    if step != 1 or not isinstance(start, int) or not isinstance(stop, (int, type(None))):
        w.coupling.freeze(x, f"{_where(n)} takes every {step}th channel")
        return None
    start, stop, _ = slice(start, stop).indices(size[dim])
    return w.coupling.narrow(x, dim, start, stop, _where(n))


def _narrow(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x = w.of(a["self"])
    dim = a["dim"] % len(w.size(a["self"]))
    if x is None or x.dim != dim:
        return x
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        return _unknown(w, n, a)
    start = a["start"] % len(x.atoms)
    return w.coupling.narrow(x, dim, start, start + a["length"], _where(n))


def _select(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    size = w.size(a["self"])
    return w.coupling.reduce(w.of(a["self"]), [a["dim"]], len(size), False, _where(n))


def _reshape(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.reshape(w.of(n.args[0]), w.size(n.args[0]), w.size(n), _where(n))


def _permute(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(n.args[0]))
    if "dims" in a:
        order = list(a["dims"])
    else:
        order = list(range(rank))
        i, j = (a["dim0"], a["dim1"]) if "dim0" in a else (0, 1)
        if rank >= 2:
            order[i % rank], order[j % rank] = order[j % rank], order[i % rank]
    return w.coupling.permute(w.of(n.args[0]), order)


def _expand(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    x, before, after = w.of(n.args[0]), w.size(n.args[0]), w.size(n)
    if x is None:
        return None
    dim = x.dim + len(after) - len(before)
    if len(x.atoms) != after[dim]:
        w.coupling.freeze(x, f"{_where(n)} broadcasts a single channel")
        return None
    return Axis(dim, x.atoms)


def _like(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    """The shape of another value: both must be cut alike."""
    rule = _expand if "expand" in operator_name(n) else _reshape
    x, other = rule(w, n, a), w.of(a["other"])
    if x is not None and other is not None and x.dim == other.dim and len(x.atoms) == len(other.atoms):
        w.coupling.union(x.atoms, other.atoms)
        return x
    for axis in (x, other):
        w.coupling.freeze(axis, f"{_where(n)} takes its shape from a value that is cut differently")
    return x


def _reduce(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(a["self"]))
    dims = a.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else dims if isinstance(dims, Sequence) else [dims]
    axis = w.coupling.reduce(w.of(a["self"]), dims, rank, bool(a.get("keepdim", False)), _where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):  # max and min with their positions
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _spatial(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    spatial_axes = next(int(c) for c in operator_name(n) if c.isdigit())
    axis = w.coupling.spatial(w.of(n.args[0]), len(w.size(n.args[0])) - spatial_axes, _where(n))
    if isinstance(n.meta.get("val"), (tuple, list)):
        w.parts[n.name] = [axis] * len(n.meta["val"])
        return None
    return axis


def _pad(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    rank, pads = len(w.size(a["self"])), a["pad"] if "pad" in a else a["padding"]
    return w.coupling.spatial(w.of(a["self"]), rank - len(pads) // 2, _where(n))


def _softmax(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.along(w.of(a["self"]), a["dim"] % len(w.size(a["self"])), _where(n))


def _channel_shuffle(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, groups = w.size(a["self"]), a["groups"]
    inner = (shape[0], groups, shape[1] // groups, *shape[2:])
    order = [0, 2, 1, *range(3, len(inner))]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), _where(n))


def _pixel_shuffle(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, r, x = w.size(a["self"]), a["upscale_factor"], w.of(a["self"])
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    x = w.coupling.tie_runs(x, c // r**2) if x is not None and x.dim == k else x
    inner, order = (*shape[:k], c // r**2, r, r, h, v), [*lead, k, k + 3, k + 1, k + 4, k + 2]
    return w.coupling.shuffle(x, shape, inner, order, w.size(n), _where(n))


def _pixel_unshuffle(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, r = w.size(a["self"]), a["downscale_factor"]
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    inner, order = (*shape[:k], c, h // r, r, v // r, r), [*lead, k, k + 2, k + 4, k + 1, k + 3]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), _where(n))


def _fixed(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    return None


def _unknown(w: _Walk, n: fx.Node, a: Args) -> Axis | None:
    w.coupling.unknown([w.of(v) for v in n.all_input_nodes], f"unknown operator {operator_name(n)} ({n.name})")
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
    **dict.fromkeys(_RESHAPES.split(), _reshape),
    **dict.fromkeys(_POOLS.split(), _spatial),
    **dict.fromkeys(_CONVS.split(), _conv),
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "logsumexp", "norm", "linalg_vector_norm"],
        _reduce,
    ),
    **dict.fromkeys(["permute", "transpose", "t", "swapaxes"], _permute),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum", "_softmax"], _softmax),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    **dict.fromkeys(["pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"], _pad),
    **dict.fromkeys(["chunk", "split", "split_with_sizes"], _split),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    **dict.fromkeys(["expand", "broadcast_to"], _expand),
    **dict.fromkeys(["expand_as", "view_as", "reshape_as"], _like),
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
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
}


def analyze(gm: fx.GraphModule, exclude: Sequence[str] = ()) -> Analysis:
    """Read a captured graph: groups, what is frozen and why, the labelled axis of every node.

    Raises:
        SluiceError: nothing in the model can be cut.
    """
    w = _Walk(gm)
    modules = dict(gm.named_modules())
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            w.shape[node.name] = static_shape(value)
        if node.op == "get_attr":
            w.axis[node.name] = w.vector(node)
        elif node.op == "call_function":
            if node.target is operator.getitem:
                w.axis[node.name] = _getitem(w, node, {})
            elif isinstance(node.target, torch._ops.OpOverload):
                rule = RULES.get(operator_name(node), _unknown)
                w.axis[node.name] = rule(w, node, arguments(node))
            elif any(w.of(v) is not None for v in node.all_input_nodes):
                _unknown(w, node, {})
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
    if not analysis.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(analysis.frozen.items())[:4])
        raise SluiceError(
            f"nothing in this model can be cut ({reasons or 'it has no layer with a weight'}); see `sluice inspect`"
        )
    return analysis


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
    """``aten.relu_.default -> relu``."""
    name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
    return name if name.startswith("_") else name.removesuffix("_")


def arguments(node: fx.Node) -> Args:
    """Arguments by name in the order of the schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**{arg.name: value for arg, value in zip(schema, node.args, strict=False)}, **node.kwargs}
    return {arg.name: given.get(arg.name, arg.default_value) for arg in schema}


def _where(node: fx.Node, weight: Any = None) -> str:
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0] or str(weight.target)
    return f"{operator_name(node)} ({node.name})"
