"""The points of a graph's pieces: grids over the levels of their groups, thinned where there would be too many."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.profiler.pieces import Dissection, Piece
from sluice.profiler.table import LatencyTable

__all__ = ["MAX_GRID", "SUMS", "Staircase", "dense_ms", "dense_points", "knots_of", "piece_points", "thin", "totals"]

MAX_GRID = 49
SUMS = 7


@dataclass(frozen=True, slots=True)
class Staircase:
    """Measured cost (ms) of a kind of group by width, and the widths worth having."""

    cost: Mapping[int, float]
    levels: tuple[int, ...]


def dense_points(dissection: Dissection, pieces: Sequence[Piece] | None = None) -> list[tuple[Piece, tuple[int, ...]]]:
    """Every piece of the graph, or some of them, at its dense size."""
    dense, pieces = dissection.dense, dissection.pieces if pieces is None else pieces
    return [(piece, tuple(int(e.at(dense)) for e in piece.extents)) for piece in pieces]


def dense_ms(dissection: Dissection, table: LatencyTable) -> dict[str, float]:
    """Milliseconds of every piece at its dense size, by name; `SluiceError` where the table lacks one."""
    return {piece.name: table.require(piece.key, extents).ms for piece, extents in dense_points(dissection)}


def piece_points(dissection: Dissection, stairs: Mapping[str, Staircase]) -> list[tuple[Piece, tuple[int, ...]]]:
    """Every piece on the product of the levels of its extents (rule 3 of `sluice.profiler.sweep`)."""
    return [
        (piece, tuple(int(v) for v in point))
        for piece in dissection.pieces
        for point in itertools.product(*knots_of(piece, dissection, stairs))
    ]


def knots_of(
    piece: Piece, dissection: Dissection, stairs: Mapping[str, Staircase], most: int = MAX_GRID
) -> list[list[int]]:
    """The values of every extent of a piece at which it is measured, at most ``most`` points if there are several."""
    lists = [totals([g for g, _ in extent.coefs], dissection, stairs) for extent in piece.extents]
    while len(lists) > 1 and int(np.prod([len(values) for values in lists])) > most:
        longest = max(range(len(lists)), key=lambda k: len(lists[k]))
        lists[longest] = [*thin(lists[longest], len(lists[longest]) - 1)]
    return lists


def totals(names: Sequence[str], dissection: Dissection, stairs: Mapping[str, Staircase]) -> list[int]:
    """The sizes that a sum of groups is measured at: a group's levels; of several, sums of levels that stand alike."""
    if len(names) == 1:
        return list(stairs[names[0]].levels)
    shares = (k / (SUMS - 1) for k in range(SUMS))
    lists = [stairs[name].levels for name in names]
    return sorted({sum(levels[round(share * (len(levels) - 1))] for levels in lists) for share in shares})


def thin(values: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of the values, ends included."""
    if len(values) <= count:
        return tuple(values)
    return tuple(sorted({values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)}))
