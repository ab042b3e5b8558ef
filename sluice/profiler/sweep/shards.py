"""One job divided over devices or hosts of the same kind, which do not talk to each other.

The widths worth measuring are found while measuring, from the sum of all pieces on a group. So a shard must see whole
groups, and its decisions about them should not depend on those of other shards.

1. The distinct pieces of the dense graph, by key and dense sizes, are dealt out in execution order, in runs of about
   equal expected work. The deal follows from the graph, the methods and the number of shards alone, never from
   measurements. Neighbours stay together, because they share groups.
2. A shard explores every group that lies on one of its pieces, with all pieces on it. Only this work is done more than
   once: by the shards on both sides of a group.
3. It then measures the grids of its own pieces, the joints behind them, and the forms and merged runs of their layers.
   A run that reaches over into another shard's layers is left to the end.
4. Engines are drawn from the finished model, which no shard has before the tables are merged. Shards that start from
   the merged table divide them: engine k of the list that all of them draw goes to shard k mod n.
5. A run without shards on the merged table measures the points that are missing: points at which two shards saw other
   levels of a group they share, runs over borders, engines.

The points of each of n shards, their sum, and the points that the last run adds, as shares of a whole run. They are for
ResNet-20 on a simulated device whose staircase has steps of 8 channels, where every host's engines are slower by their
own noise (a half-normal of that relative size, per engine, never averaged out):

    methods   points   n   noise   shares        sum     added at the end
    filter       613   4   none    36 to 46 %    163 %   0
    filter       618   4   2 %     36 to 48 %    168 %   1.3 %
    all         1682   4   none    19 to 39 %    122 %   0
    all         1711   8   1 %     12 to 26 %    159 %   6.7 %

Engines (14, or 48 where not only widths vary) come on top in the last run, or are divided by rule 4.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sluice.core.errors import SluiceError
from sluice.passes.cut.factor import forms_of
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight
from sluice.solver.options import BSR

__all__ = ["WHOLE", "Shard", "Share", "shard_argument", "share_of"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise SluiceError(f"there is no shard {self}; give 1/{self.count} to {self.count}/{self.count}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``: the second of eight."""
        index, _, count = text.partition("/")
        if not (_few(index) and _few(count) and int(count)):
            raise SluiceError(f"{text!r} is no shard; give its number and how many there are, as in 2/8")
        return cls(int(index), int(count))

    def takes(self, position: int) -> bool:
        """Whether this shard gets the item at ``position``, where items are dealt out one by one."""
        return position % self.count == self.index - 1


def shard_argument(text: str) -> Shard:
    """`Shard.parse` as a type of `argparse`."""
    try:
        return Shard.parse(text)
    except SluiceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


WHOLE = Shard(1, 1)
MOST_DIGITS = 4

# Expected points behind a piece, for one form of its layer with the ranks, and for runs that may merge.
JOINT_POINTS, FORM_POINTS, MERGE_POINTS = 4, 50, 16


Part = tuple[str, tuple[int, ...]]  # a kind of piece at its dense sizes


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a partition that one shard measures (rules 1 to 3)."""

    parts: frozenset[Part]
    groups: frozenset[str]
    foreign: tuple[str, ...]  # weights whose forms and merged runs other shards measure
    sizes: Mapping[str, int]

    def has(self, piece: Piece) -> bool:
        return _part(piece, self.sizes) in self.parts


def share_of(partition: Partition, shard: Shard, methods: Sequence[str]) -> Share:
    """Rule 1: the pieces of one shard, the groups on them, and the layers of the others."""
    work, sizes = _Work(partition, methods), partition.dense
    start, end = work.borders(shard.count)[shard.index - 1 : shard.index + 1]
    parts = frozenset(work.parts[start:end])
    named = ((anchor_weight(piece), piece) for piece in partition.pieces)
    foreign = tuple(dict.fromkeys(w for w, piece in named if w is not None and _part(piece, sizes) not in parts))
    return Share(parts, frozenset(work.groups(parts)), foreign, sizes)


def _part(piece: Piece, sizes: Mapping[str, int]) -> Part:
    return piece.key, tuple(int(extent.at(sizes)) for extent in piece.extents)


class _Work:
    """How many points a run of distinct parts is expected to take."""

    def __init__(self, partition: Partition, methods: Sequence[str]) -> None:
        self.pieces = [(_part(piece, partition.dense), piece) for piece in partition.pieces]
        self.parts = list(dict.fromkeys(part for part, _ in self.pieces))
        self.own: dict[Part, float] = {}
        for part, piece in self.pieces:
            self.own[part] = JOINT_POINTS + math.prod(map(_levels, part[1]))
            weight = anchor_weight(piece)
            if weight is not None and ("rank" in methods or BSR in methods):
                self.own[part] += FORM_POINTS * len(forms_of(partition.analysis.tensors[weight]))
            if weight is not None and "merge" in methods:
                self.own[part] += MERGE_POINTS

    def groups(self, parts: Collection[Part]) -> set[str]:
        return {group for part, piece in self.pieces if part in parts for group in piece.groups}

    def points(self, start: int, end: int) -> float:
        """Rules 2 and 3 for the parts from ``start`` to ``end``."""
        parts = set(self.parts[start:end])
        groups = self.groups(parts)
        explored = {
            (part, k): 2 * _levels(part[1][k])
            for part, piece in self.pieces
            for k, extent in enumerate(piece.extents)
            if not groups.isdisjoint(name for name, _ in extent.coefs)
        }
        return sum(explored.values()) + sum(self.own[part] for part in parts)

    def borders(self, count: int) -> list[int]:
        """Where each of ``count`` runs begins, and the end: the largest run takes as little as it can."""
        n = len(self.parts)
        if count == 1:
            return [0, n]
        points = {(i, j): self.points(i, j) for i in range(n + 1) for j in range(i, n + 1)}
        best: list[tuple[float, list[int]]] = [(0.0 if j == 0 else math.inf, [0]) for j in range(n + 1)]
        for _ in range(min(count, n)):
            best = [min((max(best[i][0], points[i, j]), [*best[i][1], j]) for i in range(j + 1)) for j in range(n + 1)]
        return best[n][1] + [n] * (count - n)  # shards beyond the parts have no work


def _few(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


def _levels(size: int) -> float:
    """Of eight widths one is worth having, and seven are many."""
    return min(max(size / 8, 1.0), 7.0)
