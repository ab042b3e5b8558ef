"""What could take the place of a layer: ranks, dropped blocks, merged runs.

Nothing is measured here. The dense layers were, and the cost law says what a piece takes at best
(`sluice.profiler.fit.cost_law`), from the dense layers alone, so that the same is offered whatever the table holds.

1. A form is offered at the ranks at which its two pieces may take less than `PAYS` times the dense layer's.
2. A merged run is offered if it may take less than the pieces it replaces, all widths dense; where layers are removed
   from it, as one convolution or as what is left of several, whichever is faster by the law.
3. What is compared is net of calls: an engine makes one, however many pieces are in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sluice.core.plan import Drop, Merge
from sluice.passes.graph.blocks import Block
from sluice.passes.merge_sites import MergeSite
from sluice.passes.search_space import SearchSpace
from sluice.profiler.fit.cost_law import CostLaw, Estimate, Known
from sluice.profiler.pieces.levels import width_levels
from sluice.profiler.pieces.merged import merged_runs
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight
from sluice.profiler.pieces.variants import (
    Alternatives,
    LayerReplacement,
    OfferedReplacement,
    RestructuredGraph,
    rank_layers,
    rank_variants,
)
from sluice.profiler.pieces.work import work_of
from sluice.solver.options import BSR, EditSpace, RankOption

__all__ = ["find_alternatives"]

PAYS = 1.1
RANKS = 8  # of one form


def find_alternatives(
    partition: Partition,
    law: CostLaw,
    dense_ms: Mapping[str, float],
    methods: Sequence[str],
    space: SearchSpace,
    precision: str,
) -> Alternatives:
    """What ``methods`` could put in the place of the dense layers.

    Args:
        law: of the dense pieces.
        dense_ms: measured milliseconds of every piece at its dense size, net of calls, by name.
    """
    shown: list[OfferedReplacement] = []
    drops: dict[str, Drop] = {}
    hidden: dict[str, tuple[str, ...]] = {}
    if "rank" in methods or BSR in methods:
        layers = rank_layers(partition, dense_ms, space)
        for variant in rank_variants(partition, layers, precision):
            shown += _ranks(variant, layers, dense_ms, law, precision)
    if "block" in methods:
        drops = {f"{block.name}|drop": block.drop() for block in space.blocks}
        hidden = {f"{block.name}|drop": _without_weight(partition, block) for block in space.blocks}
    merges: dict[str, Merge] = {}
    if "merge" in methods:
        sites = [site for site in space.merges if not (site.ties and "filter" in methods)]
        paying = _merges(partition, sites, dense_ms, law)
        merges = {s.place.switch: site.merge for s, site in paying}
        shown += [s for s, _ in paying]
    ranks = tuple(RankOption(*s.place.switch.rsplit("|", 1)) for s in shown if s.place.rank)
    return Alternatives(EditSpace(ranks, drops, merges), tuple(shown), hidden)


def _without_weight(partition: Partition, block: Block) -> tuple[str, ...]:
    """Pieces of a branch that no weight tells from others: products of activations, as in attention."""
    own = set(block.own)
    return tuple(p.name for p in partition.pieces if anchor_weight(p) is None and own.issuperset(p.outputs))


def _ranks(
    variant: RestructuredGraph,
    layers: Mapping[str, Piece],
    dense_ms: Mapping[str, float],
    law: CostLaw,
    precision: str,
) -> list[OfferedReplacement]:
    """Rule 1: the forms of one graph at the ranks that may pay."""
    cut, shown = variant.partition, []
    for place in variant.places:
        assert place.rank is not None
        tried = width_levels(cut.dense[place.rank], precision, RANKS)
        least = _guess(place, cut, law, [{**cut.dense, place.rank: rank} for rank in tried]).bound
        replaced = dense_ms[layers[place.layers[0]].name]
        ranks = tuple(rank for rank, ms in zip(tried, least, strict=True) if ms < PAYS * replaced)
        if ranks:
            shown.append(OfferedReplacement(place, cut, ranks))
    return shown


def _merges(
    partition: Partition, sites: Sequence[MergeSite], dense_ms: Mapping[str, float], law: CostLaw
) -> list[tuple[OfferedReplacement, MergeSite]]:
    """Rule 2."""
    by_weight = {anchor_weight(piece): dense_ms[piece.name] for piece in partition.pieces}
    best: dict[str, tuple[float, OfferedReplacement, MergeSite]] = {}
    for site, offered in zip(sites, merged_runs(partition, sites) if sites else [], strict=True):
        place, cut = offered.place, offered.partition
        found = _guess(place, cut, law, [cut.dense])
        replaced = sum(by_weight.get(weight, 0.0) for weight in place.layers)
        ms, least = float(found.ms[0]), float(found.bound[0])
        if least < replaced and (place.switch not in best or ms < best[place.switch][0]):
            best[place.switch] = (ms, offered, site)
    return [(shown, site) for _, shown, site in best.values()]


def _guess(
    place: LayerReplacement, cut: Partition, law: CostLaw, configurations: Sequence[Mapping[str, int]]
) -> Estimate:
    """Milliseconds of all pieces of a place by the law, in each of these configurations of its graph."""
    found = []
    for piece in place.pieces:
        points = np.array([[float(e.at(c)) for e in piece.extents] for c in configurations])
        work = work_of(piece, cut)
        unknown = Known(piece.key, work, np.zeros((0, points.shape[1])), np.zeros(0))
        found.append(law.estimate(unknown, points.reshape(len(configurations), len(piece.extents))))
    return Estimate(
        np.sum([one.ms for one in found], axis=0),
        np.sum([one.bound for one in found], axis=0),
        np.zeros(len(configurations), bool),
    )
