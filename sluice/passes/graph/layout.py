"""The rules of operators that combine values entry by entry, or move channels about and compute nothing.

An element-wise operator unites the axes of its operands. A reshape carries labels by index (`sluice.core.algebra`);
where it splits a layer over several axes, every atom becomes a product (`sluice.passes.graph.atoms`, 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sluice.core.algebra import kept_ones, reshape_parts, stepped
from sluice.passes.graph.atoms import FIXED, Atoms, Layers, Shape, Split, Value

__all__ = ["READS", "SHAPED", "Layout", "Operand", "fixed"]

Operand = tuple[Value, Shape]
SHAPED = "combines it with a value whose size is fixed"
READS = "reads a value whose size is fixed"


def fixed(shape: Shape) -> Value:
    """A value in which nothing can be cut."""
    return (FIXED,) * len(shape)


class Layout(Atoms):
    """The rules. Sizes are plain ints (a free batch is given some prime that divides no other size)."""

    def __init__(self, tensors: Mapping[str, Shape]):
        super().__init__(tensors)
        self.producers: dict[tuple[str, int], None] = {}  # axes of named tensors that make channels, in graph order

    def produce(self, layers: Layers) -> None:
        """These labels are the channels that a layer makes."""
        self.producers.update(dict.fromkeys(self.homes(layers)))

    def unknown(self, values: Iterable[Value], reason: str) -> None:
        for value in values:
            for layers in value:
                self.freeze(layers, reason)

    def match(self, parts: Sequence[tuple[Layers, int]], where: str, reason: str = SHAPED) -> Layers:
        """One axis on which several values lie, with their sizes; a size of 1 is broadcast. The first labels lead."""
        long = max((size for _, size in parts), default=1)
        met = [layers for layers, size in parts if size == long]
        for layers, size in parts:
            if size != long:
                self.freeze(layers, f"{where} broadcasts a single channel")
        labelled = [layers for layers in met if layers]
        if len(labelled) < len(met):
            for layers in labelled:
                self.freeze(layers, f"{where} {reason}")
        self.unite_all(labelled, where)
        return labelled[0] if labelled else FIXED

    def combine(self, operands: Sequence[Operand], rank: int, where: str) -> Value:
        """Element-wise operator with broadcasting."""
        found = []
        for back in range(rank, 0, -1):
            parts = [(value[-back], shape[-back]) for value, shape in operands if len(shape) >= back]
            found.append(self.match(parts, where))
        return tuple(found)

    def concat(self, parts: Sequence[Operand], dim: int, where: str) -> Value:
        rank = len(parts[0][1])
        dim %= rank
        found = [self.match([(v[d], s[d]) for v, s in parts], where) if d != dim else FIXED for d in range(rank)]
        if any(value[dim] for value, _ in parts):
            found[dim] = self.side_by_side([(value[dim], shape[dim]) for value, shape in parts], where)
        return tuple(found)

    def side_by_side(self, parts: Sequence[tuple[Layers, int]], where: str) -> Layers:
        """One axis behind the other; where a part has fewer layers than another, the rest says nothing."""
        pieces: list[Layers] = []
        for layers, size in parts:
            if not layers:
                layers = (self.new(size),)
                self.freeze(layers, f"{where} joins a value whose size is fixed")
            pieces.append(layers)
        depth = max(len(layers) for layers in pieces)
        return tuple(
            np.concatenate([p[k] if k < len(p) else np.full(len(p[0]), -1) for p in pieces]) for k in range(depth)
        )

    def narrow(self, x: Value, dim: int, start: int, stop: int, step: int = 1, where: str = "") -> Value:
        """Every ``step``-th position from ``start`` to ``stop`` along ``dim``: runs of ``step`` stay or go together."""
        for layer in x[dim] if step > 1 else ():
            like = stepped(len(layer), start, stop, step)
            if ((layer < 0) != (layer[like] < 0)).any():
                self.freeze((layer,), f"{where} takes every {step}th of channels that are cut differently")
            self.tie((layer,), like)
        return (*x[:dim], tuple(layer[start:stop:step] for layer in x[dim]), *x[dim + 1 :])

    def reshape(self, x: Value, before: Shape, after: Shape, where: str) -> Value:
        found: list[list[np.ndarray]] = [[] for _ in after]
        for dim, layers in enumerate(x):
            for layer in layers:
                for d, own in self._reshaped(layer, dim, before, after, where):
                    found[d].append(own)
        return tuple(tuple(layers) for layers in found)

    def _reshaped(
        self, layer: np.ndarray, dim: int, before: Shape, after: Shape, where: str
    ) -> list[tuple[int, np.ndarray]]:
        """Where a layer goes: output axis and layer, several of them where it is split."""
        parts = reshape_parts(dim, before, after)
        if parts is None:
            self.freeze((layer,), f"{where} reshapes {before} to {after}, which cannot be aligned")
            return []
        if len(layer) == 1:
            return [(d, layer) for d in kept_ones(dim, before, after)[:1]] or self._hidden(layer, where)
        labels = layer.reshape([part.size for part in parts])
        varying = _varying(labels)
        if len(varying) > 1 and len(roots := self.resolved((layer,))) == 1:  # atoms that are tied by now are alike
            labels = roots[0].reshape(labels.shape)
            varying = _varying(labels)
        if not varying:
            return self._hidden(layer, where)
        for k in range(labels.ndim):
            labels = labels if k in varying else labels.take([0], axis=k)
        factors = [labels.reshape(-1)]
        if len(varying) > 1:
            factors = [self.new(labels.shape[k]) for k in varying]
            self.splits.append(Split(tuple(factors), where))
            spread = np.meshgrid(*factors, indexing="ij")
            self.unite((labels.reshape(-1),), tuple(s.reshape(-1) for s in spread), where)
        return [(parts[k].axis, factor[parts[k].index]) for k, factor in zip(varying, factors, strict=True)]

    def _hidden(self, layer: np.ndarray, where: str) -> list[tuple[int, np.ndarray]]:
        self.freeze((layer,), f"{where} hides the labelled axis")
        return []

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        """Output axis i is input axis ``order[i]``."""
        return tuple(x[d] for d in order)

    def expand(self, x: Value, before: Shape, after: Shape, free: Iterable[int]) -> Value:
        """Axes of size 1 become longer; those of ``free`` may have any size, so they follow whatever they meet."""
        lead, free = len(after) - len(before), set(free)
        found = []
        for d, size in enumerate(after):
            same = d >= lead and before[d - lead] == size
            if d >= lead and not same:
                self.freeze(x[d - lead], "is broadcast from a single channel")
            found.append(x[d - lead] if same else (self.new(size),) if d in free else FIXED)
        return tuple(found)

    def reduce(self, x: Value, dims: Sequence[int], keepdim: bool, where: str) -> Value:
        """Maxima, products and others over ``dims``, or one position of each."""
        for d in {d % len(x) for d in dims} if x else ():
            self.freeze(x[d], f"{where} reduces over the channels")
        return self.statistic(x, dims, keepdim)

    def pad(self, x: Value, pads: Mapping[int, tuple[int, int]]) -> Value:
        """By axis how many entries of one number come in front and behind; they follow whatever they meet."""
        found = list(x)
        for d, (front, behind) in pads.items():
            rest = (np.full(front, -1), np.full(behind, -1))
            ends = (self.new(front), self.new(behind))
            found[d] = tuple(
                np.concatenate([ends[0], layer, ends[1]] if k == 0 else [rest[0], layer, rest[1]])
                for k, layer in enumerate(x[d])
            )
        return tuple(found)

    def repeat(self, x: Value, before: Shape, after: Shape) -> Value:
        """Every axis several times behind itself: all copies of an index stay or go together."""
        lead, found = len(after) - len(before), []
        for d, size in enumerate(after):
            layers, own = (x[d - lead], before[d - lead]) if d >= lead else (FIXED, 1)
            if own == 1 and size != 1:
                self.freeze(layers, "is repeated from a single channel")
                layers = FIXED
            found.append(tuple(np.tile(layer, size // own) for layer in layers) if size != own else layers)
        return tuple(found)

    def statistic(self, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
        """Sums, means and variances over ``dims``; where channels are cut, they are those of the channels kept."""
        gone = {d % len(x) for d in dims} if x else set()
        return tuple(FIXED if d in gone else layers for d, layers in enumerate(x) if keepdim or d not in gone)

    def pick(self, x: Value, dim: int, positions: Value, where: str, *, table: bool = False, dims: int = 1) -> Value:
        """Some positions along ``dims`` axes from ``dim`` on, listed by a value whose axes take the place of these.

        ``table``: x is a weight, whose other axes are channels that the layer makes: an embedding.
        """
        self.unknown([positions], f"{where} reads it as positions")
        for layers in x[dim : dim + dims]:
            self.freeze(layers, f"{where} picks channels by number")
        for layers in (*x[:dim], *x[dim + dims :]) if table else ():
            self.produce(layers)
        return (*x[:dim], *(FIXED for _ in positions), *x[dim + dims :])

    def shuffle(self, x: Value, shape: Shape, inner: Shape, order: Sequence[int], out: Shape, where: str) -> Value:
        """Reshape to ``inner``, permute by ``order``, reshape to ``out``: pixel and channel shuffles."""
        middle = self.permute(self.reshape(x, shape, inner, where), order)
        return self.reshape(middle, tuple(inner[i] for i in order), out, where)

    def tie(self, layers: Layers, like: np.ndarray) -> None:
        """Index i stays iff index ``like[i]`` of the same axis does."""
        for layer in self.resolved(layers):
            known = (layer >= 0) & (layer[like] >= 0)
            self.union(layer[known], layer[like][known])

    def tie_runs(self, x: Value, dim: int, runs: int) -> Value:
        """Each of ``runs`` equal stretches of the axis becomes one channel (they stay or go together)."""
        for layer in x[dim]:
            length = len(layer) // runs
            self.tie((layer,), np.repeat(np.arange(runs) * length, length))
        return x


def _varying(labels: np.ndarray) -> list[int]:
    """The axes along which labels differ."""
    return [k for k in range(labels.ndim) if (labels != labels.take([0], axis=k)).any()]
