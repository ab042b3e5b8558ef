"""ONNX rules of operators that move channels about and compute nothing: joining, picking, reshaping, shuffling."""

from __future__ import annotations

from sluice.passes.graph.coupling import FIXED, Value
from sluice.passes.graph.onnx_walk import Attributes, Node, OnnxWalk, entry, unknown

__all__ = [
    "concat",
    "depth_to_space",
    "expand",
    "full",
    "gather",
    "gather_nd",
    "pad",
    "reshape",
    "slice_",
    "space_to_depth",
    "split",
    "tile",
    "transpose",
]


def concat(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.concat(w.operands(n.input), a["axis"], n.name)


def split(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, start = w.of(n.input[0]), 0
    dim = a.get("axis", 0) % len(x)
    for out in n.output:
        stop = start + w.shape[out][dim]
        w.value[out] = w.coupling.narrow(x, dim, start, stop)
        start = stop
    return w.value[n.output[0]]


def slice_(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, shape = w.operand(n.input[0])
    starts, ends = w.ints(n.input[1]), w.ints(n.input[2])
    axes = w.ints(entry(n, 3)) if entry(n, 3) else list(range(len(starts or [])))
    steps = w.ints(entry(n, 4)) if entry(n, 4) else [1] * len(starts or [])
    if axes is None:
        return unknown(w, n, a)
    for k, dim in enumerate(d % len(shape) for d in axes):
        if not x[dim]:
            continue
        if starts is None or ends is None or steps is None:
            return unknown(w, n, a)
        if steps[k] < 0:
            w.coupling.freeze(x[dim], f"{n.name} reverses the channels")
            x = (*x[:dim], FIXED, *x[dim + 1 :])
        else:
            start, stop, step = slice(starts[k], ends[k], steps[k]).indices(shape[dim])
            x = w.coupling.narrow(x, dim, start, stop, step, n.name)
    return x


def reshape(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.reshape(w.of(n.input[0]), w.shape[n.input[0]], w.shape[n.output[0]], n.name)


def transpose(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x = w.of(n.input[0])
    return w.coupling.permute(x, a.get("perm", list(range(len(x)))[::-1]))


def expand(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x, (before, after) = w.of(n.input[0]), (w.shape[name] for name in (n.input[0], n.output[0]))
    if n.input[1] in w.whole_shape_of and len(before) == before.count(1):  # zeros_like: cut as that value is
        return w.of(w.whole_shape_of[n.input[1]])
    return w.coupling.expand(x, before, after, [d for d, size in enumerate(after) if w.is_free(size)])


def tile(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    return w.coupling.repeat(w.of(n.input[0]), w.shape[n.input[0]], w.shape[n.output[0]])


def full(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """A value of one number: an axis whose size is no batch follows whatever it meets."""
    if n.input[0] in w.whole_shape_of:
        return w.of(w.whole_shape_of[n.input[0]])
    return tuple((w.coupling.new(size),) if w.is_free(size) else FIXED for size in w.shape[n.output[0]])


def gather(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """A scalar selects one position, and the axis is gone; any other value picks some of its positions."""
    data, indices = w.of(n.input[0]), w.of(n.input[1])
    dim = a.get("axis", 0) % len(data)
    if not w.shape[n.input[1]]:
        return w.coupling.reduce(data, [dim], False, n.name)
    name, table = n.name, n.input[0] in w.weights
    return w.coupling.pick(data, dim, indices, n.input[0] if table else name, table=table)


def gather_nd(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """Positions of the first axes, each written as a list of one number for each of these axes."""
    data, indices, dims = w.of(n.input[0]), w.of(n.input[1]), w.shape[n.input[1]][-1]
    if a.get("batch_dims", 0) or dims > len(data):
        return unknown(w, n, a)
    w.coupling.unknown([indices], f"{n.name} reads it as positions")
    table = n.input[0] in w.weights
    return w.coupling.pick(data, 0, indices[:-1], n.input[0] if table else n.name, table=table, dims=dims)


def pad(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    x = w.of(n.input[0])
    pads, axes = w.ints(entry(n, 1)), w.ints(entry(n, 3)) if entry(n, 3) else list(range(len(x)))
    if pads is None or axes is None:
        return unknown(w, n, a)
    pairs = {axis % len(x): (pads[k], pads[k + len(axes)]) for k, axis in enumerate(axes)}
    pairs = {d: pair for d, pair in pairs.items() if pair != (0, 0)}
    if a.get("mode", b"constant") in (b"constant", "constant") and all(min(pair) >= 0 for pair in pairs.values()):
        return w.coupling.pad(x, pairs)
    return w.coupling.beside(x, pairs, n.name)


def depth_to_space(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    (b, c, h, v), r, x = w.shape[n.input[0]], a["blocksize"], w.of(n.input[0])
    if a.get("mode", b"DCR") in (b"CRD", "CRD"):
        x = w.coupling.tie_runs(x, 1, c // r**2)
        inner, order = (b, c // r**2, r, r, h, v), [0, 1, 4, 2, 5, 3]
    else:
        inner, order = (b, r, r, c // r**2, h, v), [0, 3, 4, 1, 5, 2]
    return w.coupling.shuffle(x, (b, c, h, v), inner, order, w.shape[n.output[0]], n.name)


def space_to_depth(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    (b, c, h, v), r = w.shape[n.input[0]], a["blocksize"]
    inner, order = (b, c, h // r, r, v // r, r), [0, 3, 5, 1, 2, 4]
    return w.coupling.shuffle(w.of(n.input[0]), (b, c, h, v), inner, order, w.shape[n.output[0]], n.name)
