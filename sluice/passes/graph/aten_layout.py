"""ATen rules of operators that move channels about and compute nothing: joining, picking, reshaping, shuffling."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from sluice.passes.graph.aten_walk import Args, Walk, operator_name, static_shape, unknown, where
from sluice.passes.graph.coupling import FIXED, Value, fixed

__all__ = [
    "cat",
    "channel_shuffle",
    "expand",
    "flip",
    "full",
    "getitem",
    "glu",
    "index",
    "index_select",
    "like",
    "narrow",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "reshape",
    "roll",
    "select",
    "slice_",
    "split",
    "stack",
    "unbind",
]


def cat(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.coupling.concat(w.operands(a["tensors"]), a["dim"], where(n))


def stack(w: Walk, n: fx.Node, a: Args) -> Value:
    """Side by side along a new axis, of which every position is a value of its own."""
    dim = a["dim"] % len(w.size(n))
    found = w.coupling.combine(w.operands(a["tensors"]), len(w.size(n)) - 1, where(n))
    return (*found[:dim], FIXED, *found[dim:])


def unbind(w: Walk, n: fx.Node, a: Args) -> Value:
    each = w.coupling.reduce(w.of(a["self"]), [a["dim"]], False, where(n))
    w.parts[n.name] = [each] * len(n.meta["val"])
    return ()


def split(w: Walk, n: fx.Node, a: Args) -> Value:
    x, rank = w.of(a["self"]), len(w.size(a["self"]))
    dim, start, parts = a["dim"] % rank, 0, []
    for value in n.meta["val"]:
        stop = start + static_shape(value, w.batch)[dim]
        parts.append(w.coupling.narrow(x, dim, start, stop))
        start = stop
    w.parts[n.name] = parts
    return ()


def getitem(w: Walk, n: fx.Node, a: Args) -> Value:
    parts = w.parts.get(n.args[0].name)  # type: ignore[union-attr,arg-type]
    if parts is not None and isinstance(n.args[1], int):
        return parts[n.args[1]]
    w.coupling.unknown([w.of(n.args[0])], f"{where(n)} picks from several outputs")
    return fixed(w.size(n))


def slice_(w: Walk, n: fx.Node, a: Args) -> Value:
    x, size = w.of(a["self"]), w.size(a["self"])
    dim = a["dim"] % len(size)
    if not x[dim]:
        return x
    start, stop, step = a.get("start") or 0, a.get("end"), a.get("step", 1)
    if not isinstance(start, int) or not isinstance(stop, (int, type(None))) or not isinstance(step, int):
        w.coupling.freeze(x[dim], f"{where(n)} takes channels from a place that is computed")
        return (*x[:dim], FIXED, *x[dim + 1 :])
    start, stop, step = slice(start, stop, step).indices(size[dim])
    return w.coupling.narrow(x, dim, start, stop, step, where(n))


def narrow(w: Walk, n: fx.Node, a: Args) -> Value:
    x, size = w.of(a["self"]), w.size(a["self"])
    dim = a["dim"] % len(size)
    if not x[dim]:
        return x
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        return unknown(w, n, a)
    start = a["start"] % size[dim]
    return w.coupling.narrow(x, dim, start, start + a["length"])


def glu(w: Walk, n: fx.Node, a: Args) -> Value:
    """Channel i of the first half is multiplied by the gate made of channel i of the second: they go together."""
    x, size = w.of(a["self"]), w.size(a["self"])
    dim = a["dim"] % len(size)
    half = size[dim] // 2
    first, second = (w.coupling.narrow(x, dim, start, start + half) for start in (0, half))
    w.coupling.unite(first[dim], second[dim], where(n))
    return first


def select(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.coupling.reduce(w.of(a["self"]), [a["dim"]], False, where(n))


def roll(w: Walk, n: fx.Node, a: Args) -> Value:
    """Positions that leave an axis at one end come in at the other."""
    x, rank = w.of(a["self"]), len(w.size(a["self"]))
    if not a["dims"]:  # without dims all axes are one
        return unknown(w, n, a)
    shifts = [sum(s for s, d in zip(a["shifts"], a["dims"], strict=True) if d % rank == k) for k in range(rank)]
    return tuple(tuple(np.roll(layer, shift) for layer in layers) for layers, shift in zip(x, shifts, strict=True))


def flip(w: Walk, n: fx.Node, a: Args) -> Value:
    x = w.of(a["self"])
    gone = {d % len(x) for d in a["dims"]}
    for d in gone:
        w.coupling.freeze(x[d], f"{where(n)} reverses the channels")
    return tuple(FIXED if d in gone else layers for d, layers in enumerate(x))


def index_select(w: Walk, n: fx.Node, a: Args) -> Value:
    x, table = w.of(a["self"]), w.is_weight(a["self"])
    return w.coupling.pick(x, a["dim"] % len(x), w.of(a["index"]), where(n, a["self"]), table=table)


def index(w: Walk, n: fx.Node, a: Args) -> Value:
    """Along one axis, or some in a row, by a tensor of numbers for each."""
    given = [(d, tensor) for d, tensor in enumerate(a["indices"]) if tensor is not None]
    (first, longest), (last, _) = given[0], given[-1]
    if last - first >= len(given) or any(tensor.meta["val"].dtype is torch.bool for _, tensor in given):
        return unknown(w, n, a)
    for _, tensor in given:
        w.coupling.unknown([w.of(tensor)], f"{where(n)} reads it as positions")
        longest = max(longest, tensor, key=lambda t: len(w.of(t)))
    table = w.is_weight(a["self"])
    return w.coupling.pick(w.of(a["self"]), first, w.of(longest), where(n, a["self"]), table=table, dims=len(given))


def reshape(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.coupling.reshape(w.of(n.args[0]), w.size(n.args[0]), w.size(n), where(n))


def permute(w: Walk, n: fx.Node, a: Args) -> Value:
    rank = len(w.size(n.args[0]))
    order = list(range(rank))
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    elif operator_name(n) == "numpy_T":
        order.reverse()
    elif "source" in a:
        source, target = ([d % rank for d in np.atleast_1d(a[side])] for side in ("source", "destination"))
        order = [d for d in order if d not in source]
        for place, d in sorted(zip(target, source, strict=True)):
            order.insert(place, d)
    elif rank >= 2:
        i, j = next(((a[f"{word}0"], a[f"{word}1"]) for word in ("dim", "axis") if f"{word}0" in a), (0, 1))
        order[i % rank], order[j % rank] = order[j % rank], order[i % rank]
    return w.coupling.permute(w.of(n.args[0]), order)


def expand(w: Walk, n: fx.Node, a: Args) -> Value:
    sizes = a.get("size") or ()
    return w.coupling.expand(w.of(n.args[0]), w.size(n.args[0]), w.size(n), w.free(sizes))


def repeat(w: Walk, n: fx.Node, a: Args) -> Value:
    return w.coupling.repeat(w.of(a["self"]), w.size(a["self"]), w.size(n))


def full(w: Walk, n: fx.Node, a: Args) -> Value:
    """A value of one number: an axis whose size is a plain number follows whatever it meets."""
    free = w.free(a["size"])
    return tuple((w.coupling.new(size),) if d in free else FIXED for d, size in enumerate(w.size(n)))


def like(w: Walk, n: fx.Node, a: Args) -> Value:
    """The shape of another value: both must be cut alike."""
    rule = expand if "expand" in operator_name(n) else reshape
    x, other = rule(w, n, a), w.of(a["other"])
    why = f"{where(n)} takes its shape from a value that is cut differently"
    before = (1,) * (len(x) - len(w.size(n.args[0]))) + w.size(n.args[0])
    found = []
    for d, (ours, theirs) in enumerate(zip(x, other, strict=True)):
        if ours and theirs:
            w.coupling.unite(ours, theirs, where(n))
        elif ours or rule is reshape or before[d] != 1:
            w.coupling.freeze(ours or theirs, why)
        found.append(ours or theirs)
    return tuple(found)


def channel_shuffle(w: Walk, n: fx.Node, a: Args) -> Value:
    shape, groups = w.size(a["self"]), a["groups"]
    inner = (shape[0], groups, shape[1] // groups, *shape[2:])
    order = [0, 2, 1, *range(3, len(inner))]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), where(n))


def pixel_shuffle(w: Walk, n: fx.Node, a: Args) -> Value:
    shape, r, x = w.size(a["self"]), a["upscale_factor"], w.of(a["self"])
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    x = w.coupling.tie_runs(x, k, c // r**2)
    inner, order = (*shape[:k], c // r**2, r, r, h, v), [*lead, k, k + 3, k + 1, k + 4, k + 2]
    return w.coupling.shuffle(x, shape, inner, order, w.size(n), where(n))


def pixel_unshuffle(w: Walk, n: fx.Node, a: Args) -> Value:
    shape, r = w.size(a["self"]), a["downscale_factor"]
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    inner, order = (*shape[:k], c, h // r, r, v // r, r), [*lead, k, k + 2, k + 4, k + 1, k + 3]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), where(n))
