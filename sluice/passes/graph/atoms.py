"""Atoms: the indices of cuttable axes, tied into the channels that go or stay as a whole.

1. Every index of every axis of a named tensor is an *atom*. A class of tied atoms is one channel (union-find); a class
   that is frozen may never be cut, and the first reason given for it stays.
2. An axis of a value has *layers* of atoms, each with one atom per index, or -1 where the layer says nothing. Index i
   stays if and only if the atoms of all layers at i stay. An axis without layers is fixed.
3. An atom e can be *substituted* by a product ``a & b``, for good: e stays if and only if a and b stay. So row
   ``h * D + d`` of a weight that is split into heads stays iff head h and dimension d stay. A product that is frozen
   freezes its factors; a factor that is frozen leaves the others free.
4. Uniting two axes (`Atoms.unite`): equal layers are one already. Layers that divide the indices alike are united index
   by index. One layer left against several is substituted by them. Two different splits of one axis keep the last
   layer of each and freeze the others. A layer that nothing is left to meet is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FIXED", "Atoms", "Layers", "Shape", "Split", "Value"]

Shape = tuple[int, ...]
Layers = tuple[np.ndarray, ...]
Value = tuple[Layers, ...]  # the layers of each axis of a value
FIXED: Layers = ()


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A layer that a reshape split: the factors along each of the axes, from the outer to the inner one."""

    factors: Layers
    where: str


class Atoms:
    """Union-find over the atoms of named tensors; ``tensors`` gives the shape of each."""

    def __init__(self, tensors: Mapping[str, Shape]):
        self.tensors = tensors  # name -> shape of every named tensor that may be sliced
        self.axes: dict[tuple[str, int], np.ndarray] = {}  # (tensor, axis) -> atoms, for the axes met so far
        self.splits: list[Split] = []
        self._keys: list[tuple[str, int]] = []
        room = 1 + sum(map(sum, tensors.values()))  # the last entry of the following is that of no atom, -1
        self._parent = np.full(room, -1)  # of every atom
        self._home = np.full(room, -1)  # the axis that an atom was made for, an index into _keys; -1: none
        self._has_reason = np.zeros(room, dtype=bool)  # is it a key of _reasons
        self._factors = np.full((1, 2), -1)  # of every root that is a product, from the first one on
        self._has_products = False
        self._count = 0
        self._reasons: dict[int, str] = {}  # by root that is no product

    @property
    def count(self) -> int:
        """Atoms made so far; they are numbered from 0."""
        return self._count

    def new(self, count: int) -> np.ndarray:
        return self._made(count, -1)

    def _made(self, count: int, home: int) -> np.ndarray:
        start, self._count = self._count, self._count + count
        if self._count >= len(self._parent):
            length = 2 * self._count + 1
            self._parent, self._home = _longer(self._parent, length, -1), _longer(self._home, length, -1)
            self._has_reason = _longer(self._has_reason, length, False)
            self._factors = _longer(self._factors, length, -1) if self._has_products else self._factors
        made = np.arange(start, self._count)
        self._parent[start : self._count] = made
        self._home[start : self._count] = home
        return made

    def param(self, name: str, axis: int) -> np.ndarray:
        """The atoms of an axis of a named tensor."""
        key = (name, axis)
        if key not in self.axes:
            self.axes[key] = self._made(self.tensors[name][axis], len(self._keys))
            self._keys.append(key)
        return self.axes[key]

    def value(self, name: str) -> Value:
        """A named tensor as a value: labelled on all axes."""
        return tuple((self.param(name, axis),) for axis in range(len(self.tensors[name])))

    def homes(self, layers: Layers) -> list[tuple[str, int]]:
        """The axes of named tensors whose atoms lie in these layers, in the order in which they appear there."""
        found = [self._home[layer] for layer in layers if len(layer)]  # the last entry is that of no atom, -1
        each = [homes[:1] if (homes == homes[0]).all() else homes for homes in found]
        return [self._keys[k] for k in dict.fromkeys(k for homes in each for k in homes.tolist()) if k >= 0]

    def roots(self, atoms: np.ndarray) -> np.ndarray:
        """The lowest atom of the class of every one of ``atoms``, same shape; -1 where there is none."""
        parent = self._parent
        found = parent[atoms]
        if ((above := parent[found]) != found).any():
            found = above
            while ((above := parent[found]) != found).any():
                found = above
            parent[atoms] = found
        return found

    def resolved(self, layers: Layers) -> Layers:
        """Layers of roots that are no products, which say the same; none of them twice."""
        if not self._has_products and len(layers) == 1:
            roots = self.roots(layers[0])
            return (roots,) if (roots >= 0).any() else ()
        todo, done = list(reversed(layers)), dict[bytes, np.ndarray]()
        while todo:
            roots = self.roots(todo.pop())
            if self._has_products and (product := (factors := self._factors[roots])[:, 0] >= 0).any():
                todo.append(np.where(product, factors[:, 1], -1))
                todo.append(np.where(product, factors[:, 0], roots))
            elif (roots >= 0).any():
                done.setdefault(roots.tobytes(), roots)
        return tuple(done.values())

    def resolved_axes(self) -> dict[tuple[str, int], Layers]:
        """The axes met so far, `resolved`; layers that say the same are one array."""
        table = self.roots(np.arange(self._count))
        known: dict[tuple[int, int, int], list[np.ndarray]] = {}
        products = self._factors[table, 0] >= 0 if self._has_products else None
        found: dict[tuple[str, int], Layers] = {}
        for key, atoms in self.axes.items():
            if not len(atoms):
                found[key] = ()
                continue
            own = slice(int(atoms[0]), int(atoms[-1]) + 1)  # an axis has its atoms in a row
            layers = (table[own],) if products is None or not products[own].any() else self.resolved((atoms,))
            found[key] = tuple(_one(layer, known) for layer in layers)
        return found

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """``a[i]`` and ``b[i]`` are one channel, for every i; none of them is a product."""
        self._tie(self.roots(a), self.roots(b))

    def _tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """`union` of roots."""
        assert first.shape == second.shape, (first.shape, second.shape)
        while (apart := first != second).any():
            if not apart.all():
                first, second = first[apart], second[apart]
            low, high = np.minimum(first, second), np.maximum(first, second)
            self._parent[high] = low
            if not (done := bool((self._parent[high] == low).all())):
                # A root tied to several others goes to the lowest now, and takes the rest along in the next round.
                np.minimum.at(self._parent, high, low)
            if self._reasons and (moved := high[self._has_reason[high]]).size:
                for root in np.unique(moved):
                    self._because(self.roots(root[None]), self._reasons.pop(int(root)))
                self._has_reason[moved] = False
            if done:
                return
            first, second = self.roots(first), self.roots(second)

    def unite(self, a: Layers, b: Layers, where: str) -> None:
        """Index i of the one axis stays iff index i of the other does, for every i (rule 4)."""
        if a is b:
            return
        if self._unite_plain([a, b]):
            return
        why = f"{where} combines it with an axis that is cut differently"
        left, right = list(self.resolved(a)), list(self.resolved(b))
        for layer in list(left):
            if _take(right, lambda other, own=layer: _same(own, other)) is not None:
                _drop(left, layer)
        for layer in list(left):
            match = _take(right, lambda other, own=layer: self._divides_alike(own, other))
            if match is not None:
                self._join(layer, match, why)
                _drop(left, layer)
        if len(left) > 1 and len(right) > 1:
            left, right = (
                self._without_outer(layers, f"{where} meets another split of it") for layers in (left, right)
            )
        if not left or not right:
            self.freeze((*left, *right), why)
        elif len(left) == len(right) == 1:
            self._join(left[0], right[0], why)
        elif len(left) == 1:
            self._substitute(left[0], right, why)
        else:
            self._substitute(right[0], left, why)

    def unite_all(self, axes: Sequence[Layers], where: str) -> None:
        """`unite` of the first axis with every other."""
        if len(axes) > 1 and not self._unite_plain(axes):
            for other in axes[1:]:
                self.unite(axes[0], other, where)

    def _unite_plain(self, axes: Sequence[Layers]) -> bool:
        """Unite axes of one layer each without products, as by far the most are; False if one is another."""
        if self._has_products or any(len(layers) != 1 for layers in axes):
            return False
        first = self.roots(axes[0][0])
        second = self.roots(axes[1][0] if len(axes) == 2 else np.concatenate([layer for (layer,) in axes[1:]]))
        if first.min(initial=0) < 0 or second.min(initial=0) < 0:
            return False
        self._tie(first if len(axes) == 2 else np.tile(first, len(axes) - 1), second)
        return True

    def _without_outer(self, layers: list[np.ndarray], why: str) -> list[np.ndarray]:
        """One of the layers, an inner one of a split; the others are frozen."""
        outer = self.resolved(tuple(factor for split in self.splits for factor in split.factors[:-1]))
        roots = np.concatenate([np.unique(layer) for layer in outer]) if outer else np.empty(0, dtype=np.int64)
        inner = [layer for layer in layers if not np.isin(layer, roots).any()] or layers
        self.freeze([layer for layer in layers if layer is not inner[-1]], why)
        return inner[-1:]

    def _join(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """Unite two layers; an atom that meets nothing is frozen."""
        both = (a >= 0) & (b >= 0)
        if both.all():
            self.union(a, b)
            return
        self.union(a[both], b[both])
        self.freeze((np.where(both, -1, a), np.where(both, -1, b)), why)

    def _substitute(self, single: np.ndarray, many: Sequence[np.ndarray], why: str) -> None:
        """``single[i] := many[0][i] & many[1][i] & ...``; where one atom stands at several places, these are tied."""
        atoms, first, inverse = np.unique(single, return_index=True, return_inverse=True)
        for layer in many:
            self._join(layer[first][inverse], layer, why)
        factors = [self.roots(layer[first]) for layer in many]
        if np.isin(np.concatenate(factors), atoms[atoms >= 0]).any() or (atoms < 0).any():
            self.freeze((single, *many), why)
            return
        self.multiply(atoms, factors)

    def multiply(self, atoms: np.ndarray, factors: Sequence[np.ndarray]) -> None:
        """``atoms[i]`` stays iff ``factors[k][i]`` does for all k; -1 is no factor. ``atoms`` are different roots."""
        if not self._has_products:
            self._has_products, self._factors = True, np.full((len(self._parent), 2), -1)
        rest = factors[-1]
        for layer in factors[-2:0:-1]:
            both = (layer >= 0) & (rest >= 0)
            made = np.where(layer >= 0, layer, rest)
            made[both] = self.new(int(both.sum()))
            self._factors[made[both]] = np.stack([layer[both], rest[both]], axis=1)
            rest = made
        both = (factors[0] >= 0) & (rest >= 0)
        reasons = {k: self._reasons.pop(a) for k, a in enumerate(atoms.tolist()) if a in self._reasons}
        self._has_reason[atoms] = False
        self._factors[atoms[both]] = np.stack([factors[0][both], rest[both]], axis=1)
        one = np.where(factors[0] >= 0, factors[0], rest)
        for k in np.flatnonzero(~both).tolist():
            if one[k] < 0:
                reasons.setdefault(k, "nothing says what it goes with")
            else:  # the other may be a product of later factors, so it is no union
                self._factors[atoms[k]] = one[k], one[k]
        for k, reason in reasons.items():
            self.freeze((atoms[k : k + 1],), reason)

    def _divides_alike(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Do two layers divide the indices into the same sets, with nothing said at the same places?"""
        met = np.empty(self._count + 1, dtype=np.int64)  # the last entry is that of no atom, -1
        met[a] = b
        if not _same(met[a], b):
            return False
        met[b] = a
        return _same(met[b], a)

    def freeze(self, layers: Iterable[np.ndarray], reason: str) -> None:
        """All indices of an axis must stay."""
        if not (layers := tuple(layers)):
            return
        for layer in self.resolved(tuple(layer.reshape(-1) for layer in layers)):
            self._because(layer[layer >= 0], reason)

    def _because(self, roots: np.ndarray, reason: str) -> None:
        """These classes must stay; the first reason of each stays."""
        more = np.unique(roots[~self._has_reason[roots]])
        self._reasons.update(dict.fromkeys(more.tolist(), reason))
        self._has_reason[more] = True

    @property
    def frozen(self) -> Mapping[int, str]:
        """Why a class must stay, by its root."""
        return self._reasons

    def reason(self, layers: Layers) -> str | None:
        """The first reason why indices of an axis must stay."""
        found = (self._reasons.get(root) for layer in self.resolved(layers) for root in layer.tolist())
        return next((reason for reason in found if reason is not None), None)


def _longer(entries: np.ndarray, length: int, rest: int | bool) -> np.ndarray:
    """The same with more entries, the last of which stays the last."""
    grown = np.full((length, *entries.shape[1:]), rest, dtype=entries.dtype)
    grown[: len(entries) - 1] = entries[:-1]
    return grown


def _one(layer: np.ndarray, known: dict[tuple[int, int, int], list[np.ndarray]]) -> np.ndarray:
    """The first layer that says the same."""
    alike = known.setdefault((len(layer), int(layer[0]), int(layer[-1])), [])
    found = next((other for other in alike if _same(layer, other)), None)
    if found is None:
        alike.append(found := layer)
    return found


def _take(layers: list[np.ndarray], fits: Any) -> np.ndarray | None:
    """The first layer that fits, taken off the list."""
    for k, layer in enumerate(layers):
        if fits(layer):
            return layers.pop(k)
    return None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Do two layers of one axis have the same atoms?"""
    return bool((a == b).all())


def _drop(layers: list[np.ndarray], layer: np.ndarray) -> None:
    layers[:] = [other for other in layers if other is not layer]
