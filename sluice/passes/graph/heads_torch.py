"""Where only the product of two weights counts, head by head: values with the output projection, queries with keys.

1. *Values*: a linear layer whose channels, moved but not changed, are the last operand of a product, whose result a
   linear layer reads. *Scores*: two linear layers whose channels are summed over in a product. Several heads of the
   left may share one of the right.
2. Every channel of such heads is read there and nowhere else, and so is every entry of the weights, which may be parts
   of a packed one. Else the pair is none.
3. A head is two factors ``A B^T``, each of them blocks of entries of named tensors, one column per dimension; the bias
   is a block of one row. Whoever changes both factors and not the product changes nothing.
4. `Fold` is a value bias that is a constant of the output: rows of attention weights sum to one. They do behind a
   softmax, and in attention, without dropout in training, whose mask is none, causal, or provably finite.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sluice.passes.graph.aten_walk import arguments, operator_name
from sluice.passes.graph.tracks_torch import MOVES, PRODUCTS, Tracks, Use, is_operator, moved

__all__ = ["Block", "Fold", "Head", "Pair", "find_pairs"]

Block = tuple[str, Tensor]  # a named tensor, and which of its entries, by number
Head = tuple[list[Block], list[Block]]
SOFTMAX = frozenset(["softmax"])
ARITHMETIC = frozenset(["mul", "sub", "rsub", "add"])
FINITE = MOVES | {"neg", "masked_fill", "where", "ones", "zeros", "zeros_like", "full", "to", "_to_copy"}


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A constant of the output: entries of the value bias by column of ``weight``, and of the bias that takes it."""

    bias: Block
    weight: Block
    into: Block


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """``kind``: values or scores; the weights by name; heads with the same number of dimensions (rule 3)."""

    kind: str
    outer: str
    inner: str
    heads: tuple[Head, ...]
    fold: Fold | None = None

    def tensors(self) -> set[str]:
        """The names of all tensors whose entries they are."""
        blocks = [block for head in self.heads for side in head for block in side]
        return {name for name, _ in [*blocks, *(() if self.fold is None else (self.fold.bias, self.fold.into))]}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The entries of a linear layer's weight, (outputs, inputs), and of its bias."""

    weight: Block
    bias: Block | None = None

    def rows(self, channels: Tensor) -> list[Block]:
        """The blocks of outputs."""
        found = [(self.weight[0], self.weight[1][channels].t())]
        return found if self.bias is None else [*found, (self.bias[0], self.bias[1][channels].unsqueeze(0))]


def find_pairs(gm: fx.GraphModule, tracks: Tracks) -> tuple[Pair, ...]:
    """All pairs of a graph that has been followed, in its order."""
    found = []
    for use in tracks.uses:
        if use.place == "input" and use.track.heads is not None:
            found.append(_values(gm, tracks, use))
        elif use.place in ("left", "query"):
            other = next((u for u in tracks.uses if u.reader is use.reader and u.place in ("right", "key")), None)
            found.append(None if other is None else _scores(gm, tracks, use, other))
    return tuple(pair for pair in found if pair is not None)


def _values(gm: fx.GraphModule, tracks: Tracks, use: Use) -> Pair | None:
    """The pair that ends in the linear layer that reads ``use``."""
    assert use.track.heads is not None
    source, size = use.track.source, use.track.channels.shape[-1]
    channels, heads = (t.reshape(-1, size) for t in (use.track.channels, use.track.heads))
    if not len(channels) or not bool((channels == channels[:1]).all()):
        return None
    columns: dict[tuple[int, ...], list[Tensor]] = {}
    for head in heads[0].unique():
        own = (heads[0] == head).nonzero().flatten()
        if not bool((heads[:, own] == heads[:, own[:1]]).all()):
            return None
        order = channels[0][own].argsort()
        columns.setdefault(tuple(channels[0][own][order].tolist()), []).append(own[order])
    taken = _channels(list(columns))
    if taken is None or not _read_only(tracks, source, taken, lambda u: u.place == "value" or u.reader is use.reader):
        return None
    outer, inner = _layer(gm, use.reader), _layer(gm, source)
    if outer is None or inner is None or not _alone(gm, inner, source, taken):
        return None
    if not _alone(gm, Layer(outer.weight), use.reader, None):
        return None
    made = tuple(
        ([(outer.weight[0], outer.weight[1][:, own]) for own in each], inner.rows(torch.tensor(rows)))
        for rows, each in columns.items()
    )
    fold = None
    summed = all(_sums_to_one(u.reader) for u in tracks.uses if u.track.source is source and u.place == "value")
    through = {u.reader for u in tracks.uses if u.place == "value" and u.track.source is source and _meets(u, taken)}
    plain = summed and len(through) == 1 and not use.track.scaled
    if inner.bias is not None and outer.bias is not None and plain and _alone(gm, Layer(outer.bias), use.reader, None):
        fold = Fold((inner.bias[0], inner.bias[1][channels[0]]), outer.weight, outer.bias)
    return Pair("values", outer.weight[0], inner.weight[0], made, fold)


def _scores(gm: fx.GraphModule, tracks: Tracks, left: Use, right: Use) -> Pair | None:
    """The pair of a product that sums over the channels of both."""
    q, k = left.track.channels, right.track.channels
    if left.track.heads is not None or right.track.heads is not None or min(q.ndim, k.ndim) < 2:
        return None
    k = k if right.place == "key" else k.transpose(-2, -1)
    if q.shape[-1] != k.shape[-1] or not all(bool((t == t[..., :1, :]).all()) for t in (q, k)):
        return None
    q, k = q[..., 0, :], k[..., 0, :]
    if right.place == "key" and q.ndim > 1 and q.shape[-2] != k.shape[-2]:
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
    lead = torch.broadcast_shapes(q.shape, k.shape)
    pairs = torch.cat([q.expand(lead), k.expand(lead)], -1).reshape(-1, 2 * lead[-1]).unique(dim=0)
    shared: dict[tuple[int, ...], list[Tensor]] = {}
    for row in pairs:
        one, two = row.split(lead[-1])
        shared.setdefault(tuple(two.tolist()), []).append(one)
    sides = []
    for use, tuples in ((left, [tuple(t.tolist()) for each in shared.values() for t in each]), (right, list(shared))):
        taken, layer = _channels(tuples), _layer(gm, use.track.source)
        if taken is None or layer is None or not _alone(gm, layer, use.track.source, taken):
            return None
        if not _read_only(tracks, use.track.source, taken, partial(operator.is_, use)):
            return None
        sides.append(layer)
    outer, inner = sides
    made = tuple(
        ([block for one in each for block in outer.rows(one)], inner.rows(torch.tensor(two)))
        for two, each in shared.items()
    )
    return Pair("scores", outer.weight[0], inner.weight[0], made)


def _channels(heads: Sequence[tuple[int, ...]]) -> Tensor | None:
    """The channels of heads; None unless each has several, as many as the others, and none has another's."""
    every = [channel for head in heads for channel in head]
    if not heads or len({len(head) for head in heads}) > 1 or len(heads[0]) < 2 or len(set(every)) != len(every):
        return None
    return torch.tensor(every)


def _meets(use: Use, channels: Tensor) -> bool:
    return bool(torch.isin(use.track.channels, channels).any())


def _read_only(tracks: Tracks, source: fx.Node, channels: Tensor, right: Callable[[Use], bool]) -> bool:
    """Does nobody read these channels of the layer but those uses that are ``right``?"""
    return all(right(u) or not _meets(u, channels) for u in tracks.uses if u.track.source is source)


def _layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    a = arguments(node)
    linear = operator_name(node) == "linear"
    if not linear and (a["beta"] != 1 or a["alpha"] != 1):
        return None
    weight, given = _entries(gm, a["weight" if linear else "mat2"]), a["bias" if linear else "self"]
    bias = None if given is None else _entries(gm, given)
    if weight is None or (given is not None and (bias is None or bias[1].ndim != 1)):
        return None
    return Layer(weight if linear else (weight[0], weight[1].t()), bias)


def _entries(gm: fx.GraphModule, node: Any) -> Block | None:
    """The named tensor that a node holds entries of, moved but not changed, and which."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if not is_operator(node, MOVES) and not _is_item(node):
            return None
        path.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    name = str(node.target)
    tensor = gm.state_dict(keep_vars=True).get(name)
    if tensor is None or not tensor.is_floating_point():
        return None
    index: Any = torch.arange(tensor.numel()).reshape(tensor.shape)
    for step in reversed(path):
        if any(isinstance(a, fx.Node) for a in step.args[1:]):
            return None
        index = index[step.args[1]] if _is_item(step) else moved(step, index, step.args, dict(step.kwargs))
    return (name, index) if isinstance(index, Tensor) else None


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[1], int)


def _alone(gm: fx.GraphModule, layer: Layer, reader: fx.Node, channels: Tensor | None) -> bool:
    """Does no other node read the entries of these outputs, of all of them if None?"""
    for name, index in (layer.weight, *([] if layer.bias is None else [layer.bias])):
        own = index if channels is None else index[channels]
        for node in gm.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                for end, held in _ends(gm, node):
                    if end is not reader and (held is None or bool(torch.isin(own, held).any())):
                        return False
    return True


def _ends(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, Tensor | None]]:
    """Who reads a named tensor, behind operators that move its entries, and which entries; None: maybe all."""
    for user in node.users:
        if is_operator(user, MOVES) or _is_item(user):
            yield from _ends(gm, user)
        else:
            block = _entries(gm, node)
            yield user, None if block is None else block[1]


def _sums_to_one(product: fx.Node) -> bool:
    """Do the rows of the left operand of a product, or of its attention, sum to one, in training as well?"""
    a = arguments(product)
    if is_operator(product, PRODUCTS):
        left = product.args[0]
        return is_operator(left, SOFTMAX) and arguments(left)["dim"] in (-1, left.meta["val"].ndim - 1)  # type: ignore
    mask = a["attn_mask"]
    hides = isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
    return a["dropout_p"] == 0.0 and not hides and _is_finite(mask)


def _is_finite(mask: Any) -> bool:
    """Is a mask that is added made of integers, finite numbers and one tensor at a time?"""
    if isinstance(mask, (list, tuple)):
        return all(_is_finite(each) for each in mask)
    if not isinstance(mask, fx.Node):
        return not isinstance(mask, float) or math.isfinite(mask)
    value = mask.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    several = sum(isinstance(each, fx.Node) for each in mask.args) > 1 and is_operator(mask, ARITHMETIC)
    return not several and is_operator(mask, ARITHMETIC | FINITE) and all(_is_finite(each) for each in mask.args)
