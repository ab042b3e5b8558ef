"""Table -> `LatencyModel`: every piece of the graph is a term, every joint a term of weight -1.

1. A piece of a layer that can leave its dense state exists under the layer's dense switch; a piece that replaces it
   exists under the switch of its own state.
2. A joint exists in every state of the layer that makes its tensor: dense, factorised, or a merged run that ends there.
3. Exactly one state of a layer is chosen: one rule per layer.
4. An engine makes one call, whatever is in it. Joints save calls between neighbours. The joints of a residual block
   close a ring: of n pieces in it they would save n calls. So terms are net of calls: a piece of those in its time
   (`sluice.profiler.sweep.grids`, 3), a joint of those that it saves. The one call is the intercept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.profiler.fit.steps import with_steps
from sluice.profiler.pieces.joints import Joint
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight
from sluice.profiler.pieces.staircase import Staircase
from sluice.profiler.pieces.variants import Alternatives, MeasuredReplacement
from sluice.profiler.sweep.bench import CALL_KEY
from sluice.profiler.sweep.grids import MAX_GRID, cost_of, knots_of, net_ms, totals
from sluice.profiler.sweep.joint_sweep import joint_ms, joint_points, joint_tolerance
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import EditSpace, dense_switch

__all__ = ["assemble"]


def assemble(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    table: LatencyTable,
    alternatives: Alternatives | None = None,
) -> LatencyModel:
    """The uncalibrated model.

    Args:
        stairs: staircases of the groups of the dense graph.
        alternatives: the edits on offer, with their measured pieces.
    Raises:
        SluiceError: the table lacks a point.
    """
    alternatives = alternatives or Alternatives(EditSpace())
    shown, drops = alternatives.shown, alternatives.options.drops
    found = table.get(CALL_KEY, ())
    call_ms = found.ms if found is not None else 0.0
    # A piece without a weight goes by its own name where a dropped branch takes it along.
    alone = {name for names in alternatives.without_weight.values() for name in names}
    anchors = {p.name: p.name if p.name in alone else anchor_weight(p) for p in partition.pieces}
    named = [
        *((s.place.switch, s.place.layers) for s in shown),
        *((n, (*d.params, *alternatives.without_weight.get(n, ()))) for n, d in drops.items()),
    ]
    # weight -> the switches under which its layer is not dense
    states = {weight: [switch for switch, gone in named if weight in gone] for weight in anchors.values() if weight}
    states = {weight: switches for weight, switches in states.items() if switches}
    terms, known, tolerance = [], partition.dense, joint_tolerance(partition, table)
    for piece in partition.pieces:
        weight = anchors[piece.name]
        when = (dense_switch(weight),) if weight in states else ()
        terms.append(_term(piece, partition, stairs, table, call_ms, when, known))
    for s in shown:
        when = (s.place.switch,)
        terms += [_term(piece, s.partition, s.stairs, table, call_ms, when, known, s.most) for piece in s.place.pieces]
        if s.place.inner:
            inner = dict.fromkeys(s.place.inner, when)
            terms += _joint_terms(s.partition, s.stairs, table, call_ms, tolerance, inner, known)
    alive = _alive(partition, shown, anchors, states)
    terms += _joint_terms(partition, stairs, table, call_ms, tolerance, alive, known)
    rules = tuple(Rule(tuple((n, 1) for n in (dense_switch(w), *switches))) for w, switches in states.items())
    switches = {name: int(name.endswith("|dense")) for rule in rules for name, _ in rule.coefs}
    ranks = {s.place.rank: s for s in shown if s.place.rank is not None}
    return LatencyModel(
        tuple(terms),
        {**known, **{rank: s.stairs[rank].levels[-1] for rank, s in ranks.items()}, **switches},
        {
            **{group: stairs[group].levels for group in known},
            **{rank: s.stairs[rank].levels for rank, s in ranks.items()},
            **{switch: (0, 1) for switch in switches},
        },
        rules=rules,
        switches=frozenset(switches),
        intercept=call_ms,
    )


def _alive(
    partition: Partition,
    shown: Sequence[MeasuredReplacement],
    anchors: Mapping[str, str | None],
    states: Mapping[str, Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """Rule 2 for the tensors between the pieces of the dense graph."""
    forms = {s.place.switch for s in shown if s.place.rank is not None}
    found: dict[str, tuple[str, ...]] = {}
    for piece in partition.pieces:
        weight = anchors[piece.name]
        for tensor in piece.outputs:
            if weight is None or weight not in states:
                found[tensor] = ()
                continue
            ending = [s.place.switch for s in shown if s.place.rank is None and tensor in s.place.pieces[-1].outputs]
            made = (n for n in states[weight] if n in forms)
            found[tensor] = (dense_switch(weight), *dict.fromkeys([*made, *ending]))
    return found


def _term(
    piece: Piece,
    partition: Partition,
    stairs: Mapping[str, Staircase],
    table: LatencyTable,
    call_ms: float,
    when: tuple[str, ...],
    known: Mapping[str, int],
    most: int = MAX_GRID,
) -> Term:
    knots = knots_of(piece, partition, stairs, most)
    ms = [net_ms(piece, partition, table.require(piece.key, p).ms, call_ms) for p in itertools.product(*knots)]
    arrays = tuple(np.array(k, dtype=np.float64) for k in knots)
    values = np.array(ms, dtype=np.float64).reshape(tuple(len(k) for k in knots))
    arrays, values = with_steps(arrays, values, _curves(piece, partition, stairs, table))
    extents = tuple(_extent(e, partition, known) for e in piece.extents)
    return Term(_under(piece.name, when), extents, arrays, values, 1.0, when)


def _curves(
    piece: Piece, partition: Partition, stairs: Mapping[str, Staircase], table: LatencyTable
) -> list[dict[int, float]]:
    """The known cost of every extent of a piece at all its possible values (`sluice.profiler.fit.steps`)."""
    points, dense = table.points(piece.key), [int(e.at(partition.dense)) for e in piece.extents]
    curves = []
    for k, extent in enumerate(piece.extents):
        groups = [group for group, _ in extent.coefs]
        values = totals(groups, partition, stairs)
        own = {v: points[at].ms for v in values if (at := (*dense[:k], v, *dense[k + 1 :])) in points}
        cost = cost_of(groups, stairs)
        curve = own if len(own) == len(values) else {v: cost[v] for v in values if v in cost}
        curves.append(curve if len(curve) == len(values) else {})
    return curves


def _joint_terms(
    partition: Partition,
    stairs: Mapping[str, Staircase],
    table: LatencyTable,
    call_ms: float,
    tolerance: float,
    when: Mapping[str, tuple[str, ...]],
    known: Mapping[str, int],
) -> list[Term]:
    """The joints at the tensors that ``when`` names."""
    values: dict[Joint, list[tuple[int, ...]]] = {}
    for joint, at in joint_points(partition, stairs, table, tolerance, when):
        values.setdefault(joint, []).append(at)
    terms = []
    for joint, points in values.items():
        found = (table.require(joint.key, point).ms for point in points)
        saved = np.array([joint_ms(joint, partition, ms, call_ms) for ms in found])
        extents: tuple[Extent, ...] = ()
        knots: tuple[np.ndarray, ...] = ()
        if joint.extent is not None:
            extents = (_extent(joint.extent, partition, known),)
            knots = (np.array([p[0] for p in points], dtype=np.float64),)
        ms = saved.reshape([len(k) for k in knots])
        name = _under(f"joint {joint.tensor}", when[joint.tensor])
        terms.append(Term(name, extents, knots, ms, -1.0, when[joint.tensor]))
    return terms


def _under(name: str, when: tuple[str, ...]) -> str:
    """Restructured graphs have names in common, with each other and with the dense one."""
    return f"{name} {when[0]}" if when and not when[0].endswith("|dense") else name


def _extent(extent: Extent, partition: Partition, known: Mapping[str, int]) -> Extent:
    """Groups that the dense graph does not have stay as they are."""
    sizes = partition.dense
    fixed = [(g, c) for g, c in extent.coefs if g not in known and not g.endswith("|rank")]
    coefs = tuple(pair for pair in extent.coefs if pair not in fixed)
    return Extent(coefs, extent.const + sum(c * sizes[g] for g, c in fixed))
