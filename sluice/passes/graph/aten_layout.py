"""ATen rules of operators that move channels about and compute nothing: joining, picking, reshaping, shuffling."""

from __future__ import annotations

import numpy as np
from torch import fx

from sluice.passes.graph.aten_walk import Args, Walk, operator_name, static_shape, unknown, where
from sluice.passes.graph.coupling import Axis

__all__ = [
    "cat",
    "channel_shuffle",
    "expand",
    "flip",
    "getitem",
    "glu",
    "index_select",
    "like",
    "narrow",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reshape",
    "roll",
    "select",
    "slice_",
    "split",
]


def cat(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.concat([(w.of(t), w.size(t)) for t in a["tensors"]], a["dim"], where(n))


def split(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, rank = w.of(a["self"]), len(w.size(a["self"]))
    dim, start, parts = a["dim"] % rank, 0, []
    for value in n.meta["val"]:
        stop = start + static_shape(value)[dim]
        parts.append(w.coupling.narrow(x, dim, start, stop, where(n)))
        start = stop
    w.parts[n.name] = parts
    return None


def getitem(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    parts = w.parts.get(n.args[0].name)  # type: ignore[union-attr,arg-type]
    if parts is not None and isinstance(n.args[1], int):
        return parts[n.args[1]]
    w.coupling.freeze(w.of(n.args[0]), f"{where(n)} picks from several outputs")
    return None


def slice_(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, size = w.of(a["self"]), w.size(a["self"])
    dim = a["dim"] % len(size)
    if x is None or x.dim != dim:
        return x
    start, stop, step = a.get("start") or 0, a.get("end"), a.get("step", 1)
    if step != 1 or not isinstance(start, int) or not isinstance(stop, (int, type(None))):
        w.coupling.freeze(x, f"{where(n)} takes every {step}th channel")
        return None
    start, stop, _ = slice(start, stop).indices(size[dim])
    return w.coupling.narrow(x, dim, start, stop, where(n))


def narrow(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x = w.of(a["self"])
    dim = a["dim"] % len(w.size(a["self"]))
    if x is None or x.dim != dim:
        return x
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        return unknown(w, n, a)
    start = a["start"] % len(x.atoms)
    return w.coupling.narrow(x, dim, start, start + a["length"], where(n))


def glu(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    """Channel i of the first half is multiplied by the gate made of channel i of the second: they go together."""
    x = w.of(a["self"])
    if x is None or x.dim != a["dim"] % len(w.size(a["self"])):
        return x
    half = len(x.atoms) // 2
    w.coupling.union(x.atoms[:half], x.atoms[half:])
    return Axis(x.dim, x.atoms[:half])


def select(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    size = w.size(a["self"])
    return w.coupling.reduce(w.of(a["self"]), [a["dim"]], len(size), False, where(n))


def roll(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    """Positions that leave the labelled axis at one end come in at the other."""
    x = w.of(a["self"])
    if x is None or not a["dims"]:  # without dims all axes are one
        return unknown(w, n, a) if x is not None else None
    rank = len(w.size(a["self"]))
    shift = sum(s for s, d in zip(a["shifts"], a["dims"], strict=True) if d % rank == x.dim)
    return Axis(x.dim, np.roll(x.atoms, shift))


def flip(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, rank = w.of(a["self"]), len(w.size(a["self"]))
    if x is not None and x.dim in [d % rank for d in a["dims"]]:
        w.coupling.freeze(x, f"{where(n)} reverses the channels")
        return None
    return x


def index_select(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.pick(w.of(a["self"]), a["dim"] % len(w.size(a["self"])), w.of(a["index"]), where(n))


def reshape(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    return w.coupling.reshape(w.of(n.args[0]), w.size(n.args[0]), w.size(n), where(n))


def permute(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    rank = len(w.size(n.args[0]))
    if "dims" in a:
        order = list(a["dims"])
    else:
        order = list(range(rank))
        i, j = (a["dim0"], a["dim1"]) if "dim0" in a else (0, 1)
        if rank >= 2:
            order[i % rank], order[j % rank] = order[j % rank], order[i % rank]
    return w.coupling.permute(w.of(n.args[0]), order)


def expand(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    x, before, after = w.of(n.args[0]), w.size(n.args[0]), w.size(n)
    if x is None:
        return None
    dim = x.dim + len(after) - len(before)
    if len(x.atoms) != after[dim]:
        w.coupling.freeze(x, f"{where(n)} broadcasts a single channel")
        return None
    return Axis(dim, x.atoms)


def like(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    """The shape of another value: both must be cut alike."""
    rule = expand if "expand" in operator_name(n) else reshape
    x, other = rule(w, n, a), w.of(a["other"])
    if x is not None and other is not None and x.dim == other.dim and len(x.atoms) == len(other.atoms):
        w.coupling.union(x.atoms, other.atoms)
        return x
    for axis in (x, other):
        w.coupling.freeze(axis, f"{where(n)} takes its shape from a value that is cut differently")
    return x


def channel_shuffle(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, groups = w.size(a["self"]), a["groups"]
    inner = (shape[0], groups, shape[1] // groups, *shape[2:])
    order = [0, 2, 1, *range(3, len(inner))]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), where(n))


def pixel_shuffle(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, r, x = w.size(a["self"]), a["upscale_factor"], w.of(a["self"])
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    x = w.coupling.tie_runs(x, c // r**2) if x is not None and x.dim == k else x
    inner, order = (*shape[:k], c // r**2, r, r, h, v), [*lead, k, k + 3, k + 1, k + 4, k + 2]
    return w.coupling.shuffle(x, shape, inner, order, w.size(n), where(n))


def pixel_unshuffle(w: Walk, n: fx.Node, a: Args) -> Axis | None:
    shape, r = w.size(a["self"]), a["downscale_factor"]
    lead = list(range(len(shape) - 3))
    k = len(lead)
    c, h, v = shape[k:]
    inner, order = (*shape[:k], c, h // r, r, v // r, r), [*lead, k, k + 2, k + 4, k + 1, k + 3]
    return w.coupling.shuffle(w.of(a["self"]), shape, inner, order, w.size(n), where(n))
