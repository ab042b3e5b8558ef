"""What could take the place of a layer, and what that costs: ranks, dropped blocks, merged runs.

1. A form is offered at the ranks at which its two pieces take less than `PAYS` times the dense layer's; a form that
   never does is not measured further.
2. A merged run is offered if it takes less than the pieces it replaces, all widths dense; where layers are removed from
   it, as one convolution or as what is left of several, whichever is faster.
3. What is compared is without calls: an engine makes one, however many pieces are in it.
4. Widths are thinned on the pieces of alternatives: `points_of` points per piece, more where they replace more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from sluice.core.plan import Drop, Merge
from sluice.passes.graph.blocks import Block
from sluice.passes.merge_sites import MergeSite
from sluice.passes.search_space import SearchSpace
from sluice.profiler.pieces.merged import merge_variants
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight
from sluice.profiler.pieces.staircase import Staircase
from sluice.profiler.pieces.variants import (
    Alternatives,
    MeasuredReplacement,
    RestructuredGraph,
    rank_layers,
    rank_variants,
)
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.explore import explore
from sluice.profiler.sweep.grids import calls_in, dense_ms, dense_points, knots_of, net_ms
from sluice.profiler.sweep.joint_sweep import explore_inner_joints, joint_tolerance
from sluice.solver.options import BSR, EditSpace, RankOption

__all__ = ["find_alternatives", "points_of"]

PAYS = 1.1
POINTS = ((0.02, 9), (0.06, 16), (math.inf, 25))  # below this share of the dense cost, so many
RANKS = 10  # of one form


def find_alternatives(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    bench: Bench,
    methods: Sequence[str],
    space: SearchSpace,
) -> Alternatives:
    """Measure what ``methods`` could put in the place of the dense layers."""
    dense = dense_ms(partition, bench.table, bench.call())
    shown: list[MeasuredReplacement] = []
    drops: dict[str, Drop] = {}
    hidden: dict[str, tuple[str, ...]] = {}
    if "rank" in methods or BSR in methods:
        layers = rank_layers(partition, dense, space)
        for variant in rank_variants(partition, layers, bench.table.fingerprint.precision):
            shown += _ranks(variant, layers, dense, stairs, bench)
    if "block" in methods:
        drops = {f"{block.name}|drop": block.drop() for block in space.blocks}
        hidden = {f"{block.name}|drop": _without_weight(partition, block) for block in space.blocks}
    merges: dict[str, Merge] = {}
    if "merge" in methods:
        sites = [site for site in space.merges if not (site.ties and "filter" in methods)]
        paying = _merges(partition, sites, dense, stairs, bench)
        merges = {s.place.switch: site.merge for s, site in paying}
        shown += [s for s, _ in paying]
    _measure(shown, bench, joint_tolerance(partition, bench.table))
    ranks = tuple(RankOption(*s.place.switch.rsplit("|", 1)) for s in shown if s.place.rank)
    options = EditSpace(ranks, drops, merges)
    return Alternatives(options, tuple(shown), hidden)


def points_of(share: float) -> int:
    """The most points of a piece that takes the place of layers with this share of the dense cost."""
    return next(points for below, points in POINTS if share < below)


def _without_weight(partition: Partition, block: Block) -> tuple[str, ...]:
    """Pieces of a branch that no weight tells from others: products of activations, as in attention."""
    own = set(block.own)
    return tuple(p.name for p in partition.pieces if anchor_weight(p) is None and own.issuperset(p.outputs))


def _ranks(
    variant: RestructuredGraph,
    layers: Mapping[str, Piece],
    dense: Mapping[str, float],
    stairs: Mapping[str, Staircase],
    bench: Bench,
) -> list[MeasuredReplacement]:
    """Rule 1: the forms of one graph at the ranks that pay."""
    cut = variant.partition
    explored = explore(cut, bench, {p.rank for p in variant.places if p.rank}, most=RANKS)
    own, total, call_ms = _widths(cut, stairs), sum(dense.values()), bench.call()
    shown = []
    for place in variant.places:
        assert place.rank is not None
        stair, replaced = explored[place.rank], dense[layers[place.layers[0]].name]
        calls = sum(calls_in(piece, cut) for piece in place.pieces)
        levels = tuple(rank for rank in stair.levels if stair.cost[rank] - calls * call_ms < PAYS * replaced)
        if levels:
            now = {**own, place.rank: Staircase(stair.cost, levels)}
            shown.append(MeasuredReplacement(place, cut, now, points_of(replaced / total)))
    return shown


def _merges(
    partition: Partition,
    sites: Sequence[MergeSite],
    dense: Mapping[str, float],
    stairs: Mapping[str, Staircase],
    bench: Bench,
) -> list[tuple[MeasuredReplacement, MergeSite]]:
    """Rule 2: every run at the dense widths first, and at others if that pays."""
    by_weight, total = {anchor_weight(piece): dense[piece.name] for piece in partition.pieces}, sum(dense.values())
    best: dict[str, tuple[float, MeasuredReplacement, MergeSite]] = {}
    call_ms = bench.call()
    variants = list(merge_variants(partition, sites))
    # All graphs in one call: each by itself has a point or two, and every call waits for a quiet machine.
    bench.pieces_of(
        [(v.partition, *point) for v, _ in variants for p in v.places for point in dense_points(v.partition, p.pieces)]
    )
    for variant, shelf in variants:
        cut = variant.partition
        own = _widths(cut, stairs)
        for place, site in zip(variant.places, shelf, strict=True):
            points = dense_points(cut, place.pieces)
            ms = sum(net_ms(p, cut, bench.table.require(p.key, extents).ms, call_ms) for p, extents in points)
            replaced = sum(by_weight.get(weight, 0.0) for weight in place.layers)
            if ms < replaced and (place.switch not in best or ms < best[place.switch][0]):
                best[place.switch] = (ms, MeasuredReplacement(place, cut, own, points_of(replaced / total)), site)
    return [(shown, site) for _, shown, site in best.values()]


def _measure(shown: Sequence[MeasuredReplacement], bench: Bench, tolerance: float) -> None:
    """All pieces and inner joints of restructured graphs, with ranks that share its pieces' names apart."""
    points = [
        (s.partition, piece, tuple(int(v) for v in point))
        for s in shown
        for piece in s.place.pieces
        for point in itertools.product(*knots_of(piece, s.partition, s.stairs, s.most))
    ]
    bench.pieces_of(points)
    explore_inner_joints([(s.partition, s.stairs, s.place.inner) for s in shown if s.place.inner], bench, tolerance)


def _widths(cut: Partition, stairs: Mapping[str, Staircase]) -> dict[str, Staircase]:
    """The staircases of the dense graph; groups that it does not have keep their size."""
    return {**stairs, **{group: stairs.get(group, Staircase({}, (size,))) for group, size in cut.dense.items()}}
