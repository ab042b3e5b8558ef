"""Atoms: the indices of cuttable axes, tied into the channels that go or stay as a whole.

Every index of every cuttable tensor axis is an *atom*. A class of tied atoms is one channel (union-find); a class that
is frozen may never be cut, and the first reason given for it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Atoms", "Axis", "Shape"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The labelled axis of a value: ``atoms[i]`` is the atom of index ``i`` along ``dim``."""

    dim: int
    atoms: np.ndarray


class Atoms:
    """Union-find over the atoms of named tensors; ``tensors`` gives the shape of each."""

    def __init__(self, tensors: dict[str, Shape]):
        self.tensors = tensors  # name -> shape of every named tensor that may be sliced
        self.axes: dict[tuple[str, int], np.ndarray] = {}  # (tensor, axis) -> atoms, for the axes met so far
        self.producers: list[tuple[str, int]] = []  # output axes in graph order
        self._parent = np.arange(64)  # of every atom; entries behind the last atom point at themselves
        self._count = 0
        self._reasons: dict[int, str] = {}  # by root

    @property
    def count(self) -> int:
        """Atoms made so far; they are numbered from 0."""
        return self._count

    def new(self, count: int) -> np.ndarray:
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self._count)])
        return np.arange(start, self._count)

    def roots(self, atoms: np.ndarray) -> np.ndarray:
        """The lowest atom of the class of every one of ``atoms``, same shape."""
        found = self._parent[atoms]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[atoms] = found
        return found

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """``a[i]`` and ``b[i]`` are one channel, for every i."""
        if a.shape != b.shape:
            raise AssertionError(f"{a.shape} atoms cannot be tied to {b.shape}")
        while True:
            first, second = self.roots(a), self.roots(b)
            apart = first != second
            if not apart.any():
                return
            low, high = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            # A root tied to several others goes to the lowest now, and takes the rest along in the next round.
            np.minimum.at(self._parent, high, low)
            for root in [r for r in np.unique(high).tolist() if r in self._reasons]:
                self._reasons.setdefault(self._root(root), self._reasons.pop(root))

    def _root(self, atom: int) -> int:
        return int(self.roots(np.array([atom]))[0])

    def tie(self, atoms: np.ndarray) -> np.ndarray:
        """Union along every axis but the last; returns the representatives (last axis)."""
        rows = atoms.reshape(-1, atoms.shape[-1])
        self.union(np.broadcast_to(rows[0], rows.shape), rows)
        return rows[0]

    def freeze(self, axis: Axis | np.ndarray | None, reason: str) -> None:
        if axis is not None:
            for root in np.unique(self.roots(axis.atoms if isinstance(axis, Axis) else axis)).tolist():
                self._reasons.setdefault(root, reason)

    @property
    def frozen(self) -> Mapping[int, str]:
        """Why a class must stay, by its root."""
        return self._reasons

    def reason(self, atom: int) -> str | None:
        return self._reasons.get(self._root(atom))

    def param(self, name: str, axis: int) -> np.ndarray:
        key = (name, axis)
        if key not in self.axes:
            self.axes[key] = self.new(self.tensors[name][axis])
        return self.axes[key]

    def unknown(self, inputs: Iterable[Axis | None], reason: str) -> None:
        for axis in inputs:
            self.freeze(axis, reason)
