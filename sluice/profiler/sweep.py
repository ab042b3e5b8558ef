"""Which points are measured: the staircase is found, not assumed.

1. *Explore* every kind of group by bisection on its cost, the sum of all distinct pieces that lie on it, the other
   widths dense. The interval with the largest difference between its ends is split, at the roundest number near its
   middle, until no interval spans more than `GAIN` of the dense cost, or a sixteenth of the width, or
   `MAX_WIDTHS` are known. Only multiples of what kernels load at once are tried, 16 bytes (four floats, eight halves),
   less in narrow groups, and the full width. A layer of 19 channels takes another kernel, which wants the plain layout,
   while all that is around it is laid out in blocks: plans of MobileNetV2 with such widths took up to a quarter longer
   than their pieces and joints told.
2. *Levels*: a width is worth having if no larger width costs as little. These are what the solver may choose.
3. *Grid*: every piece on the product of the levels of its extents (thinned where the product would be large).
4. *Joints* as `sluice.profiler.joint_sweep` says.

Every finished batch of points is committed; what the table already knows is not measured again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.passes.precision import typed
from sluice.profiler import clocks, timing_cache
from sluice.profiler.grids import Staircase, step_of
from sluice.profiler.joints import Joint, call_models, joint_models, joint_widths
from sluice.profiler.measure import CLEAN, PATIENCE, Anchor, Measurement, measure
from sluice.profiler.pieces import Dissection, Piece, build_piece, spread_widths
from sluice.profiler.sources import add_sources, source_model
from sluice.profiler.table import LatencyTable
from sluice.runtime.runner import Runner, Session

__all__ = ["Bench", "explore"]

GAIN = 0.06
WORTH = 0.015
MAX_WIDTHS = 14
BATCH_OF_SESSIONS = 24
BATCH_OF_JOINTS = 8
ROUNDS, MAX_ROUNDS = 24, 160
SOURCE_KEY = "source-v2"
CALL_KEY = "call-v2"  # what an engine with nothing to do takes
Progress = Callable[[int, int], None]  # (points done, points known to be needed)


@dataclass(slots=True)
class Waits:
    """What a call may spend on waiting for a quiet machine: little as long as the last one waited in vain."""

    in_vain: bool = False

    @property
    def rounds(self) -> int:
        return 2 * ROUNDS if self.in_vain else MAX_ROUNDS

    @property
    def patience(self) -> int:
        return PATIENCE // 16 if self.in_vain else PATIENCE


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where points are measured and kept."""

    table: LatencyTable
    runner: Runner
    anchor: Anchor
    rng: np.random.Generator
    progress: Progress = lambda done, total: None
    waits: Waits = field(default_factory=Waits)

    def pieces(self, dissection: Dissection, wanted: Sequence[tuple[Piece, tuple[int, ...]]]) -> None:
        """Measure what is missing of (piece, extents)."""
        self.pieces_of([(dissection, *point) for point in wanted])

    def pieces_of(self, wanted: Sequence[tuple[Dissection, Piece, tuple[int, ...]]]) -> None:
        """The same for pieces of several graphs: the fuller a call, the less it waits for a quiet machine per point.

        In random order, so that what one call has in common with itself does not fall on one piece.
        """
        todo = {(p.key, e): (cut, p) for cut, p, e in wanted if self.table.get(p.key, e) is None}
        if todo:  # a complete table is only read
            self.table.describe_all({piece.key: piece.description for _, piece in todo.values()})
        points = list(todo.items())
        points = [points[k] for k in self.rng.permutation(len(points))]
        for start in range(0, len(points), BATCH_OF_SESSIONS):
            chunk = points[start : start + BATCH_OF_SESSIONS]
            built = [
                add_sources(build_piece(cut, piece, spread_widths(piece, extents, cut.dense)), piece.bare)
                for (_, extents), (cut, piece) in chunk
            ]
            source_ms = self.sources([shape for _, shapes in built for shape in shapes])
            found = self.time([self.session(model) for model, _ in built])
            self.table.put_many(
                (key, extents, replace(m, ms=m.ms - sum(source_ms[s] for s in shapes)))
                for ((key, extents), _), (_, shapes), m in zip(chunk, built, found, strict=True)
            )
            self.progress(start + len(chunk), len(points))
            timing_cache.keep(self.runner, self.table)

    def sources(self, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Milliseconds of sources by shape, measured once and kept."""
        missing = [s for s in dict.fromkeys(shapes) if self.table.get(SOURCE_KEY, s) is None]
        for start in range(0, len(missing), BATCH_OF_SESSIONS):
            chunk = missing[start : start + BATCH_OF_SESSIONS]
            found = self.time([self.session(source_model(shape)) for shape in chunk])
            self.table.put_many([(SOURCE_KEY, s, m) for s, m in zip(chunk, found, strict=True)])
        return {shape: self.table.require(SOURCE_KEY, shape).ms for shape in shapes}

    def joints(self, wanted: Sequence[tuple[Dissection, Joint, tuple[int, ...]]]) -> None:
        """Find what is missing of (joint, extents): the parts and the pieces joined are timed; their difference.

        What follows from the kernels (`sluice.profiler.joints`, 3) is kept as a point of no samples.
        """
        todo = {(j.key, e): (cut, j) for cut, j, e in wanted if self.table.get(j.key, e) is None}
        if todo:
            self.table.describe_all({joint.key: joint.description for _, joint in todo.values()})
        points = list(todo.items())
        for start in range(0, len(points), BATCH_OF_JOINTS):
            chunk = points[start : start + BATCH_OF_JOINTS]
            built = [
                joint_models(cut, joint, joint_widths(cut, joint, _joint_groups(cut, joint, at)))
                for (_, at), (cut, joint) in chunk
            ]
            engines = [[self.session(model) for model in (*parts, whole)] for parts, whole, _ in built]
            call_ms, saved, timed = self.call(), [], []
            for (point, (_, joint)), own, (*_, shapes) in zip(chunk, engines, built, strict=True):
                if self._as_apart(own, shapes):
                    saved.append((*point, Measurement(joint.calls * call_ms, 0.0, 0, self.runner.clock)))
                else:
                    timed.append((point, joint, own, shapes))
            source_ms = self.sources([shape for *_, shapes in timed for shape in shapes])
            found = iter(self.time([session for _, _, own, _ in timed for session in own]) if timed else ())
            for point, joint, own, shapes in timed:
                *parts, whole = [next(found) for _ in own]
                calls = 0 if joint.pair else len(joint.consumers)
                ms = sum(m.ms for m in parts) + calls * call_ms - whole.ms - sum(source_ms[s] for s in shapes)
                saved.append((*point, replace(whole, ms=ms, spread=max(m.spread for m in (*parts, whole)))))
            self.table.put_many(saved)
            self.progress(start + len(chunk), len(points))
            timing_cache.keep(self.runner, self.table)

    def _as_apart(self, engines: Sequence[Session], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Does the last engine run the kernels of the others, less those of sources of these ``shapes``?"""
        *parts, whole = [_kernels(engine) for engine in engines]
        sources = [_kernels(self.session(source_model(shape))) for shape in shapes]
        return bool(whole) and sum(parts, Counter()) == sum(sources, whole)

    def call(self) -> float:
        """Milliseconds that an inference costs beside what its operators do, measured once and kept."""
        if self.table.get(CALL_KEY, ()) is None:
            one, both = self.time([self.session(model) for model in call_models()])
            self.table.put(CALL_KEY, (), replace(one, ms=max(0.0, 2 * one.ms - both.ms)))
            self.table.describe(CALL_KEY, "one call of an engine")
        return self.table.require(CALL_KEY, ()).ms

    def session(self, model: onnx.ModelProto, *, part: bool = True) -> Session:
        """The engine of a part of a network, or of a whole one, in the precision of the table."""
        asked = self.table.fingerprint
        build = getattr(self.runner, "build_part", self.runner.build) if part else self.runner.build
        return build(typed(model, asked.precision, part=part, target=asked.runtime))

    def time(self, sessions: Sequence[Session], most: int = MAX_ROUNDS) -> tuple[Measurement, ...]:
        """All of them in turns, `ROUNDS` to ``most`` rounds."""
        rounds, patience = min(most, self.waits.rounds), self.waits.patience
        found = measure(
            sessions, min_rounds=ROUNDS, max_rounds=rounds, patience=patience, anchor=self.anchor, rng=self.rng
        )
        self.waits.in_vain = bool(found) and all(measured.spread > CLEAN for measured in found)
        clocks.keep(self.runner, self.table)
        return found


def explore(
    dissection: Dissection, bench: Bench, only: Collection[str] | None = None, most: int = MAX_WIDTHS
) -> dict[str, Staircase]:
    """Rules 1 and 2 for every group (or those of ``only``), with at most ``most`` widths each."""
    dense = dissection.dense
    asked_for = [g for g in dense if only is None or g in only]
    kinds: dict[str, tuple[tuple[tuple[str, int], ...], int]] = {}
    pieces_of = {g: _distinct([p for p in dissection.pieces if g in p.groups], g) for g in asked_for}
    step = {group: step_of(dense[group], bench.table.fingerprint.precision) for group in asked_for}
    for group in asked_for:
        kinds[group] = (tuple((p.key, _extent_index(p, group)) for p in pieces_of[group]), dense[group])
    lead = {kind: group for group, kind in reversed(list(kinds.items()))}
    known: dict[str, dict[int, float]] = {group: {} for group in lead.values()}
    asked: dict[str, list[int]] = {group: sorted({step[group], dense[group]}) for group in known}
    while any(asked.values()):
        wanted = [(p, _at(p, group, w, dense)) for group, ws in asked.items() for w in ws for p in pieces_of[group]]
        bench.pieces(dissection, wanted)
        for group, widths in asked.items():
            for w in widths:
                known[group][w] = sum(bench.table.require(p.key, _at(p, group, w, dense)).ms for p in pieces_of[group])
        asked = {group: _next_widths(known[group], most, step[group]) for group in known}
    return {group: Staircase(known[lead[kind]], _levels(known[lead[kind]])) for group, kind in kinds.items()}


def _kernels(session: Session) -> Counter[Hashable]:
    """What the engine of a part runs, nothing where the runtime does not tell."""
    return getattr(session, "kernels", None) or Counter()


def _distinct(pieces: Sequence[Piece], group: str) -> list[Piece]:
    return list({(p.key, _extent_index(p, group)): p for p in pieces}.values())


def _extent_index(piece: Piece, group: str) -> int:
    return next(k for k, extent in enumerate(piece.extents) if group in dict(extent.coefs))


def _at(piece: Piece, group: str, width: int, dense: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(e.at({**dense, group: width})) for e in piece.extents)


def _next_widths(cost: Mapping[int, float], most: int, step: int) -> list[int]:
    """The multiple of ``step`` that splits the interval with the largest difference, if any is worth it."""
    widths = sorted(cost)
    full = widths[-1]
    if len(widths) >= most:
        return []
    intervals = [
        (abs(cost[b] - cost[a]), a, b)
        for a, b in itertools.pairwise(widths)
        if (b - 1) // step * step > a and b - a > max(1, full // 16) and abs(cost[b] - cost[a]) > GAIN * cost[full]
    ]
    return [_roundest(*max(intervals)[1:], step)] if intervals else []


def _roundest(low: int, high: int, step: int = 1) -> int:
    """The number strictly inside the middle half (or, failing that, inside) with the largest power of two in it."""
    quarter, middle = (high - low) / 4, (low + high) / 2
    multiples = range(low // step * step + step, high, step)
    inside = [w for w in multiples if low + quarter <= w <= high - quarter] or [*multiples]
    return max(inside, key=lambda w: (w & -w, -abs(w - middle)))


def _levels(cost: Mapping[int, float]) -> tuple[int, ...]:
    """Widths for which no larger one costs as little, within `WORTH` of the dense cost."""
    widths = sorted(cost, reverse=True)
    margin = WORTH * cost[widths[0]]
    levels, cheapest = [widths[0]], cost[widths[0]]
    for width in widths[1:]:
        if cost[width] < cheapest - margin:
            levels.append(width)
            cheapest = cost[width]
    return tuple(sorted(levels))


def _joint_groups(dissection: Dissection, joint: Joint, extents: tuple[int, ...]) -> dict[str, int]:
    if joint.extent is None:
        return {}
    probe = Piece(joint.tensor, joint.key, "", joint.producer.model, (joint.extent,), (), ())
    return spread_widths(probe, extents, dissection.dense)
