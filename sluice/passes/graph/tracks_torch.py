"""Which channels of which layer a value of a captured graph holds, followed through operators that only move entries.

1. The output of a linear layer is a *track*: for every entry the number of the channel. Operators that change shape or
   order, and products with a number, are carried out on these numbers as they are on the values.
2. A product of two activations, and attention, sum over the rows of their last operand: entry d of the result holds
   what entry d of every row there holds. So its track goes on, and every matrix of the result is a *head*.
3. Everything else that reads a track is a `Use`, and so is each operand of a product. Where a network reads channels in
   no other way than those that are looked for, what they mean is a matter of the layers at the ends alone.

The graph is run once, on the inputs that it was captured with.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sluice.passes.graph.aten_walk import arguments, operator_name

__all__ = ["LINEAR", "MOVES", "PRODUCTS", "SDPA", "Track", "Tracks", "Use", "is_operator", "moved"]

SDPA = frozenset(["scaled_dot_product_attention"])
PRODUCTS = frozenset(["matmul", "bmm"])
LINEAR = frozenset(["linear", "addmm"])
VIEWS = frozenset(["view", "_unsafe_view"])
SIZES = frozenset(["sym_size", "sym_numel", "sym_stride"])
MOVES = frozenset([
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "mT", "adjoint", "movedim", "swapaxes", "unsqueeze",
    "squeeze", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten",
    "expand", "expand_as", "contiguous", "clone", "alias", "detach", "repeat_interleave",
])  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Channels of the layer ``source`` by entry, behind a product the number of the head as well; times a number?"""

    source: fx.Node
    channels: Tensor
    heads: Tensor | None = None
    scaled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """A track that an operator reads.

    ``place``: ``input`` of a linear layer, ``left`` or ``right`` of a product, ``query`` or ``key`` of attention,
    ``value`` of either where rule 2 holds; another name anywhere else.
    """

    reader: fx.Node
    place: str
    track: Track


def is_operator(node: Any, names: frozenset[str]) -> bool:
    """Is it a node of one of these operators?"""
    called = isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return called and operator_name(node) in names


def moved(node: fx.Node, index: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operator of `MOVES` makes of its first operand, carried out on ``index``."""
    assert callable(node.target)
    if is_operator(node, VIEWS):  # the numbers may lie in memory in another way than the values
        return index.reshape(args[1])
    return node.target(index, *args[1:], **kwargs)


def _is_scaling(node: fx.Node) -> bool:
    alone = len(node.args) == 2 and isinstance(node.args[1], (int, float)) and not node.kwargs
    return alone and is_operator(node, frozenset(["mul", "div"]))


class Tracks(fx.Interpreter):
    """Runs a graph; ``found`` holds the tracks of nodes, ``uses`` who reads them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.found: dict[fx.Node, Track | list[Track]] = {}
        self.uses: list[Use] = []

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        track = self._of(n, value, args, kwargs)
        if track is not None:
            self.found[n] = track
        return value

    def _one(self, node: Any) -> Track | None:
        track = self.found.get(node) if isinstance(node, fx.Node) else None
        return track if isinstance(track, Track) else None

    def _of(self, n: fx.Node, value: Any, args: Any, kwargs: Any) -> Track | list[Track] | None:
        first = n.args[0] if n.args else None
        source = self.found.get(first) if isinstance(first, fx.Node) else None
        if n.target is operator.getitem and isinstance(source, list) and isinstance(n.args[1], int):
            return source[n.args[1]]
        if isinstance(source, Track) and _is_scaling(n):
            return replace(source, scaled=True)
        if isinstance(source, Track) and is_operator(n, MOVES):
            channels = moved(n, source.channels, args, kwargs)
            heads = None if source.heads is None else moved(n, source.heads, args, kwargs)
            if isinstance(channels, Tensor):
                return replace(source, channels=channels, heads=heads)
            pairs = zip(channels, heads or [None] * len(channels), strict=True)
            return [replace(source, channels=c, heads=h) for c, h in pairs]
        if is_operator(n, LINEAR):
            a = arguments(n)
            x = a.get("input", a.get("self")) if operator_name(n) == "linear" else a["mat1"]
            self._read(n, {"input": x})
            return Track(n, torch.arange(value.shape[-1]).expand(value.shape))
        if is_operator(n, PRODUCTS):
            product = self._product(self._one(n.args[1]), value)
            self._read(n, {"left": n.args[0], "right" if product is None else "value": n.args[1]})
            return product
        if is_operator(n, SDPA):
            a = arguments(n)
            product = self._product(self._one(a["value"]), value)
            last = "unknown" if product is None else "value"
            self._read(n, {"query": a["query"], "key": a["key"], last: a["value"], "mask": a["attn_mask"]})
            return product
        if not is_operator(n, SIZES):
            self._read(n, {str(k): node for k, node in enumerate(n.all_input_nodes)})
        return None

    def _read(self, n: fx.Node, operands: dict[str, Any]) -> None:
        placed = set(operands.values())
        others = {f"other {node.name}": node for node in n.all_input_nodes if node not in placed}
        for place, node in {**operands, **others}.items():
            tracks = self.found.get(node) if isinstance(node, fx.Node) else None
            for track in tracks if isinstance(tracks, list) else [tracks]:
                if track is not None:
                    self.uses.append(Use(n, place, track))

    @staticmethod
    def _product(right: Track | None, value: Tensor) -> Track | None:
        """Rule 2: every row of a matrix on the right must hold the same channels."""
        if right is None or right.channels.ndim < 2 or value.ndim < right.channels.ndim:
            return None
        rows = right.channels[..., :1, :]
        if not bool((right.channels == rows).all()):
            return None
        if rows.ndim > 2 and value.shape[-3] != rows.shape[-3]:  # several heads of the left share one
            if rows.shape[-3] == 0 or value.shape[-3] % rows.shape[-3]:
                return None
            rows = rows.repeat_interleave(value.shape[-3] // rows.shape[-3], -3)
        matrices = value.shape[:-2]
        heads = torch.arange(max(1, matrices.numel())).reshape(*matrices, 1, 1).expand(value.shape)
        return replace(right, channels=rows.expand(value.shape), heads=heads)
