"""Table -> `LatencyModel`: every piece of the graph is a term, every joint a term of weight -1.

1. A piece of a layer that can leave its dense state exists under the layer's dense switch; a piece that replaces it
   exists under the switch of its own state.
2. A joint exists in every state of the layer that makes its tensor: dense, factorised, or a merged run that ends there.
3. Exactly one state of a layer is chosen: one rule per layer.
4. Terms are net of calls (`sluice.profiler.pieces.net_time`). The one call of an engine is the intercept.
5. A *slot* is a term whose milliseconds are still to be filled in. Slots follow from the graph alone, so the sites and
   their levels are the same whatever the table holds. A point that the table lacks is estimated: of a piece by the cost
   law (`sluice.profiler.fit.cost_law`), of a joint by the nearest known sizes. A joint of which nothing is known saves
   its calls alone. Pieces come first, then joints.
6. A point that the runtime fails on takes `BEYOND` times the dense network, so that no plan has it, and counts as
   measured. A joint that fails saves what is estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.passes.graph.width_limits import WidthLimit
from sluice.profiler.fit.cost_law import CostLaw, Estimate, Known, fit_law
from sluice.profiler.pieces.joints import Joint
from sluice.profiler.pieces.levels import group_levels, sum_levels
from sluice.profiler.pieces.net_time import joint_ms, known_call, measured_joints, net_ms
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight
from sluice.profiler.pieces.variants import Alternatives, OfferedReplacement
from sluice.profiler.pieces.work import Work, work_of
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import dense_switch

__all__ = ["Layout", "Slot", "fill", "known_of", "lay_out"]

Point = tuple[str, tuple[int, ...]]  # key and extents
BEYOND = 10.0
CLOSE = 0.003  # of the dense milliseconds: a joint between two known sizes that differ by less is not measured


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A term without its milliseconds.

    ``graph`` is where the part lies, ``extents`` are those of the part in sites of the latency model, and ``knots`` the
    values at which the part is wanted.
    """

    name: str
    graph: Partition
    part: Piece | Joint
    extents: tuple[Extent, ...]
    knots: tuple[tuple[int, ...], ...]
    when: tuple[str, ...]
    work: Work | None

    def at(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        """The extents of the part in a configuration."""
        return tuple(int(extent.at(widths)) for extent in self.extents)

    def on(self, widths: Mapping[str, int]) -> bool:
        return any(widths[switch] for switch in self.when) if self.when else True


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """All slots of a network, its sites with their levels, and the rules between switches."""

    partition: Partition
    alternatives: Alternatives
    slots: tuple[Slot, ...]
    dense: Mapping[str, int]
    levels: Mapping[str, tuple[int, ...]]
    rules: tuple[Rule, ...]
    switches: frozenset[str]

    def points(self, widths: Mapping[str, int]) -> Iterator[tuple[Slot, tuple[int, ...]]]:
        """What the milliseconds of a configuration follow from."""
        for slot in self.slots:
            if slot.on(widths):
                yield slot, slot.at(widths)


def lay_out(
    partition: Partition, alternatives: Alternatives, precision: str, limits: Mapping[str, WidthLimit] | None = None
) -> Layout:
    """The slots of a dense graph and of what is offered in the place of its layers; ``limits`` are those of widths."""
    shown, drops = alternatives.shown, alternatives.options.drops
    known = partition.dense
    levels = group_levels(partition, precision, limits or {})
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
    slots: list[Slot] = []
    joints: list[Slot] = []
    for piece in partition.pieces:
        weight = anchors[piece.name]
        when = (dense_switch(weight),) if weight in states else ()
        slots.append(_piece(piece, partition, levels, when, known))
    for s in shown:
        own = {**{g: (n,) for g, n in s.partition.dense.items()}, **levels}
        if s.place.rank is not None:
            own[s.place.rank] = s.ranks
        slots += [_piece(piece, s.partition, own, (s.place.switch,), known) for piece in s.place.pieces]
        inner = dict.fromkeys(s.place.inner, (s.place.switch,))
        joints += _joints(s.partition, own, inner, known)
    joints += _joints(partition, levels, _alive(partition, shown, anchors, states), known)
    rules = tuple(Rule(tuple((n, 1) for n in (dense_switch(w), *switches))) for w, switches in states.items())
    switches = {name: int(name.endswith("|dense")) for rule in rules for name, _ in rule.coefs}
    ranks = {s.place.rank: s.ranks for s in shown if s.place.rank is not None}
    return Layout(
        partition,
        alternatives,
        (*slots, *joints),
        {**known, **{rank: values[-1] for rank, values in ranks.items()}, **switches},
        {**levels, **ranks, **{switch: (0, 1) for switch in switches}},
        rules,
        frozenset(switches),
    )


def fill(layout: Layout, table: LatencyTable, refused: Collection[Point] = ()) -> LatencyModel:
    """The uncalibrated model, as the table knows it now; the table holds one point of a piece or more.

    Args:
        refused: points that the runtime fails on (rule 6).
    """
    found = known_call(table)
    call_ms = found.ms if found is not None else 0.0
    pieces = {slot.part.key: known_of(slot, table, call_ms) for slot in layout.slots if isinstance(slot.part, Piece)}
    law = fit_law(list(pieces.values()))
    seen: dict[tuple[str, tuple[tuple[int, ...], ...]], Estimate] = {}
    joints: dict[str, dict[int, float]] = {}
    terms: list[Term] = []
    gone: dict[str, list[tuple[int, ...]]] = {}
    for key, at in refused:
        gone.setdefault(key, []).append(at)
    for slot in layout.slots:
        if isinstance(slot.part, Piece):
            known = pieces[slot.part.key]
            knots = _with_measured(slot, [*known.points.astype(int).tolist(), *gone.get(slot.part.key, ())])
            if (slot.part.key, knots) not in seen:
                seen[slot.part.key, knots] = _estimate(law, known, knots)
            terms.append(_term(slot, knots, seen[slot.part.key, knots]))
    dense_ms = sum(term.at(layout.dense) for term in terms if term.on(layout.dense))
    if gone:
        own = [slot.part.key for slot in layout.slots if isinstance(slot.part, Piece)]
        terms = [_shut(term, gone.get(key, ()), BEYOND * dense_ms) for term, key in zip(terms, own, strict=True)]
    for slot in layout.slots:
        if isinstance(slot.part, Joint):
            if slot.part.key not in joints:
                joints[slot.part.key] = _savings(slot, table, call_ms)
            failed = gone.get(slot.part.key, ())
            terms.append(_joint_term(slot, joints[slot.part.key], CLOSE * dense_ms, failed))
    return LatencyModel(
        tuple(terms), layout.dense, layout.levels, rules=layout.rules, switches=layout.switches, intercept=call_ms
    )


def known_of(slot: Slot, table: LatencyTable, call_ms: float) -> Known:
    """The points of the slot's piece that the table has, net of calls."""
    assert isinstance(slot.part, Piece) and slot.work is not None
    points = table.points(slot.part.key)
    ms = [net_ms(slot.part, slot.graph, found.ms, call_ms) for found in points.values()]
    at = np.array(list(points), dtype=np.float64).reshape(len(points), len(slot.knots))
    return Known(slot.part.key, slot.work, at, np.array(ms, dtype=np.float64))


def _estimate(law: CostLaw, known: Known, knots: tuple[tuple[int, ...], ...]) -> Estimate:
    grid = list(itertools.product(*knots))
    return law.estimate(known, np.array(grid, dtype=np.float64).reshape(len(grid), len(knots)))


def _with_measured(slot: Slot, points: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The knots, and on the axes of sums every value of these points."""
    found = []
    for k, (extent, values) in enumerate(zip(slot.extents, slot.knots, strict=True)):
        more = {int(at[k]) for at in points} if len(extent.coefs) > 1 else set()
        found.append(tuple(sorted({*values, *more})))
    return tuple(found)


def _term(slot: Slot, knots: tuple[tuple[int, ...], ...], found: Estimate) -> Term:
    shape = tuple(len(values) for values in knots)
    arrays = tuple(np.array(values, dtype=np.float64) for values in knots)
    own = [values.reshape(shape) for values in (found.ms, found.bound, found.measured)]
    if found.measured.all():
        return Term(slot.name, slot.extents, arrays, own[0], 1.0, slot.when)
    return Term(slot.name, slot.extents, arrays, own[0], 1.0, slot.when, bound=own[1], measured=own[2])


def _savings(slot: Slot, table: LatencyTable, call_ms: float) -> dict[int, float]:
    """Milliseconds that a joint saves net of calls, by the sizes that the table knows; a joint of no size at 0."""
    assert isinstance(slot.part, Joint)
    points = table.points(slot.part.key)
    return {at[0] if at else 0: joint_ms(slot.part, slot.graph, m.ms, call_ms) for at, m in points.items()}


def _shut(term: Term, gone: Sequence[tuple[int, ...]], ms: float) -> Term:
    """Rule 6."""
    if not gone:
        return term
    shut = np.zeros(np.shape(term.ms), dtype=bool)
    for at in gone:
        shut[tuple(int(np.searchsorted(knots, value)) for knots, value in zip(term.knots, at, strict=True))] = True
    bound = None if term.bound is None else np.where(shut, ms, term.bound)
    measured = None if term.measured is None else term.measured | shut
    return replace(term, ms=np.where(shut, ms, term.ms), bound=bound, measured=measured)


def _joint_term(slot: Slot, savings: Mapping[int, float], close_ms: float, gone: Sequence[tuple[int, ...]]) -> Term:
    """Rule 5: linear between known sizes, constant beyond; a size between two of like savings counts as measured."""
    if not slot.extents:
        ms = np.array(savings.get(0, 0.0))
        return Term(slot.name, (), (), ms, -1.0, slot.when, measured=None if savings or gone else np.array(False))
    failed = [at[0] for at in gone]
    sizes = np.array(sorted({*slot.knots[0], *savings, *failed}), dtype=np.float64)
    at = np.array(sorted(savings), dtype=np.float64)
    ms = np.interp(sizes, at, [savings[int(v)] for v in at]) if savings else np.zeros(len(sizes))
    measured = np.isin(sizes, [*at, *failed])
    for low, high in itertools.pairwise(at):
        if abs(savings[int(high)] - savings[int(low)]) <= close_ms:
            measured |= (sizes > low) & (sizes < high)
    return Term(slot.name, slot.extents, (sizes,), ms, -1.0, slot.when, measured=measured)


def _alive(
    partition: Partition,
    shown: Sequence[OfferedReplacement],
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
            ending = [s.place.switch for s in shown if tensor in s.place.ends]
            made = (n for n in states[weight] if n in forms)
            found[tensor] = (dense_switch(weight), *dict.fromkeys([*made, *ending]))
    return found


def _piece(
    piece: Piece,
    partition: Partition,
    levels: Mapping[str, tuple[int, ...]],
    when: tuple[str, ...],
    known: Mapping[str, int],
) -> Slot:
    extents = tuple(_extent(e, partition, known) for e in piece.extents)
    knots = tuple(_values(e, levels) for e in piece.extents)
    return Slot(_under(piece.name, when), partition, piece, extents, knots, when, work_of(piece, partition))


def _joints(
    partition: Partition,
    levels: Mapping[str, tuple[int, ...]],
    when: Mapping[str, tuple[str, ...]],
    known: Mapping[str, int],
) -> list[Slot]:
    """The joints at the tensors that ``when`` names."""
    slots = []
    for joint in measured_joints(partition) if when else ():
        if joint.tensor in when:
            own = () if joint.extent is None else (joint.extent,)
            extents = tuple(_extent(extent, partition, known) for extent in own)
            knots = tuple(_values(extent, levels) for extent in own)
            name = _under(f"joint {joint.tensor}", when[joint.tensor])
            slots.append(Slot(name, partition, joint, extents, knots, when[joint.tensor], None))
    return slots


def _values(extent: Extent, levels: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    names = [group for group, _ in extent.coefs]
    return levels[names[0]] if len(names) == 1 else sum_levels([levels[name] for name in names])


def _under(name: str, when: tuple[str, ...]) -> str:
    """Restructured graphs have names in common, with each other and with the dense one."""
    return f"{name} {when[0]}" if when and not when[0].endswith("|dense") else name


def _extent(extent: Extent, partition: Partition, known: Mapping[str, int]) -> Extent:
    """Groups that the dense graph does not have stay as they are."""
    sizes = partition.dense
    fixed = [(g, c) for g, c in extent.coefs if g not in known and not g.endswith("|rank")]
    coefs = tuple(pair for pair in extent.coefs if pair not in fixed)
    return Extent(coefs, extent.const + sum(c * sizes[g] for g, c in fixed))
