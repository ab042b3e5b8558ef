"""Points are measured, many at once, and kept.

1. Pieces on the product of the levels of their extents (`sluice.profiler.explore`), thinned where the product would be
   large (`sluice.profiler.grids`); joints as `sluice.profiler.joint_sweep` says.
2. Every finished batch of points is committed; what the table already knows is not measured again. The points of a
   batch take their turns with each other, so a kill costs the timing of all that are in flight: one to five seconds
   on one thread. Of what was built it costs one engine, where the runtime has a timing cache: that is kept after each.
3. What fills the caches that cores share slows large activations, and not the anchor: points of DenseNet were up to 20%
   off in one call and not in the next. So some of the new pieces are timed once more, and unless nine in ten of these
   are within `DOUBT` of what they took, all are; and so is a piece that seems to take longer than at larger widths by
   more than that. The lower figure counts, since noise only adds. A call that is killed before leaves word in the table
   of what it had not looked at again, and the next call that wants these points does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.passes.precision import typed
from sluice.profiler import clocks, timing_cache
from sluice.profiler.joints import Joint, call_models, joint_models, joint_widths
from sluice.profiler.measure import CLEAN, PATIENCE, Anchor, Measurement, measure
from sluice.profiler.pieces import Dissection, Piece, build_piece, spread_widths
from sluice.profiler.sources import add_sources, source_model
from sluice.profiler.table import LatencyTable
from sluice.runtime.runner import Runner, Session

__all__ = ["Bench", "keep_once", "timed_once"]

BATCH_OF_SESSIONS = 24
BATCH_OF_JOINTS = 8
DOUBT = 0.03
BURSTS, MAX_BURSTS = 24, 160
SOURCE_KEY = "source-v4"
ONCE = "points timed once"
CALL_KEY = "call-v3"  # what an engine with nothing to do takes
Progress = Callable[[int, int], None]  # (points done, points known to be needed)
Point = tuple[str, tuple[int, ...]]  # key and extents


@dataclass(slots=True)
class Waits:
    """What a call may spend on waiting for a quiet machine: little as long as the last one waited in vain."""

    in_vain: bool = False

    @property
    def bursts(self) -> int:
        return 2 * BURSTS if self.in_vain else MAX_BURSTS

    @property
    def patience(self) -> int:
        return PATIENCE // 16 if self.in_vain else PATIENCE


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where points are measured and kept; a ``closed`` one has a runner that builds nothing."""

    table: LatencyTable
    runner: Runner
    anchor: Anchor
    rng: np.random.Generator
    progress: Progress = lambda done, total: None
    waits: Waits = field(default_factory=Waits)
    closed: bool = False

    @property
    def _threads(self) -> int:
        return self.table.fingerprint.threads

    def pieces(self, dissection: Dissection, wanted: Sequence[tuple[Piece, tuple[int, ...]]]) -> None:
        """Measure what is missing of (piece, extents)."""
        self.pieces_of([(dissection, *point) for point in wanted])

    def pieces_of(self, wanted: Sequence[tuple[Dissection, Piece, tuple[int, ...]]]) -> None:
        """The same for pieces of several graphs: the fuller a call, the less it waits for a quiet machine per point.

        In random order, so that what one call has in common with itself does not fall on one piece.
        """
        once = set() if self.closed else timed_once(self.table)
        missing = {(p.key, e) for _, p, e in wanted if self.table.get(p.key, e) is None}
        todo = {(p.key, e): (cut, p) for cut, p, e in wanted if (p.key, e) in missing | once}
        if not todo:  # a complete table is only read
            return
        self.table.describe_all({piece.key: piece.description for _, piece in todo.values()})
        points = list(todo.items())
        points = [points[k] for k in self.rng.permutation(len(points))]
        self._time_pieces([p for p in points if p[0] in missing], self.progress)
        some = [points[k] for k in self.rng.permutation(len(points))[:BATCH_OF_SESSIONS]]
        before = np.array([self.table.require(*point).ms for point, _ in some])
        self._time_pieces(some)
        lower = before > (1.0 + DOUBT) * np.array([self.table.require(*point).ms for point, _ in some])
        disturbed = float(np.mean(lower)) > 0.1
        self._time_pieces([p for p in points if p not in some and (disturbed or _doubtful(p[0], self.table))])
        keep_once(self.table, timed_once(self.table) - todo.keys())

    def _time_pieces(
        self, points: Sequence[tuple[Point, tuple[Dissection, Piece]]], progress: Progress = lambda done, total: None
    ) -> None:
        """Time these points; of what the table has already, the lower figure is kept."""
        for start in range(0, len(points), BATCH_OF_SESSIONS):
            chunk = points[start : start + BATCH_OF_SESSIONS]
            parts = [(p, build_piece(cut, p, spread_widths(p, extents, cut.dense))) for (_, extents), (cut, p) in chunk]
            built = [add_sources(model, piece.bare, self._threads) for piece, model in parts]
            source_ms = self.sources([shape for _, shapes in built for shape in shapes])
            found = self.time([self.session(model) for model, _ in built])
            own = [replace(m, ms=m.ms - sum(source_ms[s] for s in sh)) for m, (_, sh) in zip(found, built, strict=True)]
            before = [self.table.get(*point) for point, _ in chunk]
            if new := {point for (point, _), known in zip(chunk, before, strict=True) if known is None}:
                keep_once(self.table, timed_once(self.table) | new)
            self.table.put_many(
                (*point, now if known is None or now.ms < known.ms else known)
                for (point, _), now, known in zip(chunk, own, before, strict=True)
            )
            progress(start + len(chunk), len(points))

    def sources(self, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Milliseconds of sources by shape, measured once and kept."""
        missing = [s for s in dict.fromkeys(shapes) if self.table.get(SOURCE_KEY, s) is None]
        for start in range(0, len(missing), BATCH_OF_SESSIONS):
            chunk = missing[start : start + BATCH_OF_SESSIONS]
            found = self.time([self.session(source_model(shape, self._threads)) for shape in chunk])
            self.table.put_many([(SOURCE_KEY, s, m) for s, m in zip(chunk, found, strict=True)])
        return {shape: self.table.require(SOURCE_KEY, shape).ms for shape in shapes}

    def joints(self, wanted: Sequence[tuple[Dissection, Joint, tuple[int, ...]]]) -> None:
        """Find what is missing of (joint, extents): the parts and the pieces joined are timed; their difference.

        Where equal kernels tell (`sluice.profiler.joints`, 3), it is kept as a point of no samples.
        """
        todo = {(j.key, e): (cut, j) for cut, j, e in wanted if self.table.get(j.key, e) is None}
        if todo:
            self.table.describe_all({joint.key: joint.description for _, joint in todo.values()})
        points = list(todo.items())
        for start in range(0, len(points), BATCH_OF_JOINTS):
            chunk = points[start : start + BATCH_OF_JOINTS]
            built = [
                joint_models(cut, joint, joint_widths(cut, joint, _joint_groups(cut, joint, at)), self._threads)
                for (_, at), (cut, joint) in chunk
            ]
            engines = [[self.session(model) for model in (*parts, whole)] for parts, whole, _ in built]
            known = [self._as_apart(own, shapes) for own, (*_, shapes) in zip(engines, built, strict=True)]
            call_ms = self.call() if any(known) or not all(joint.pair for _, (_, joint) in chunk) else 0.0
            saved, timed = [], []
            for (point, (_, joint)), own, (*_, shapes), apart in zip(chunk, engines, built, known, strict=True):
                if apart and self._threads == 1:
                    saved.append((*point, Measurement(joint.calls * call_ms, 0.0, 0, self.runner.clock)))
                else:
                    timed.append((point, joint, own, shapes, apart))
            source_ms = self.sources([shape for _, _, _, shapes, _ in timed for shape in shapes])
            found = iter(self.time([session for _, _, own, *_ in timed for session in own]) if timed else ())
            for point, joint, own, shapes, apart in timed:
                *parts, whole = [next(found) for _ in own]
                calls = 0 if joint.pair else len(joint.consumers)
                ms = sum(m.ms for m in parts) + calls * call_ms - whole.ms - sum(source_ms[s] for s in shapes)
                if apart and abs(ms - joint.calls * call_ms) <= DOUBT * whole.ms:
                    ms = joint.calls * call_ms
                saved.append((*point, replace(whole, ms=ms, spread=max(m.spread for m in (*parts, whole)))))
            self.table.put_many(saved)
            self.progress(start + len(chunk), len(points))

    def _as_apart(self, engines: Sequence[Session], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Does the last engine run the kernels of the others, less those of sources of these ``shapes``?"""
        *parts, whole = [_kernels(engine) for engine in engines]
        if not whole:  # an engine takes some runtimes seconds to build
            return False
        sources = [_kernels(self.session(source_model(shape, self._threads))) for shape in shapes]
        return sum(parts, Counter()) == sum(sources, whole)

    def call(self) -> float:
        """Milliseconds that an inference costs beside what its operators do, measured once and kept."""
        if self.table.get(CALL_KEY, ()) is None:
            one, both = self.time([self.session(model) for model in call_models()])
            self.table.put(CALL_KEY, (), replace(one, ms=max(0.0, 2 * one.ms - both.ms)))
            self.table.describe(CALL_KEY, "one call of an engine")
        return self.table.require(CALL_KEY, ()).ms

    def session(self, model: onnx.ModelProto, *, part: bool = True) -> Session:
        """The engine of a part of a network, or of a whole one, in the precision of the table (rule 2)."""
        asked = self.table.fingerprint
        build = getattr(self.runner, "build_part", self.runner.build) if part else self.runner.build
        built = build(typed(model, asked.precision, part=part, target=asked.runtime))
        timing_cache.keep(self.runner, self.table)
        return built

    def time(self, sessions: Sequence[Session], most: int = MAX_BURSTS) -> tuple[Measurement, ...]:
        """All of them in turns, `BURSTS` to ``most`` bursts each."""
        bursts, patience = min(most, self.waits.bursts), self.waits.patience
        found = measure(
            sessions, min_bursts=BURSTS, max_bursts=bursts, patience=patience, anchor=self.anchor, rng=self.rng
        )
        self.waits.in_vain = bool(found) and all(measured.spread > CLEAN for measured in found)
        clocks.keep(self.runner, self.table)
        return found


def timed_once(table: LatencyTable) -> set[Point]:
    """The points that a call was killed before it had looked at again."""
    return {(key, tuple(extents)) for key, extents in json.loads(table.get_blob(ONCE) or b"[]")}


def keep_once(table: LatencyTable, points: Collection[Point]) -> None:
    """Leave word of ``points`` for `timed_once`."""
    if points:
        table.put_blob(ONCE, json.dumps(sorted(points)).encode())
    else:
        table.drop_blob(ONCE)


def _doubtful(point: Point, table: LatencyTable) -> bool:
    """Does the piece take longer than at larger widths?"""
    key, extents = point
    least = table.require(key, extents).ms / (1.0 + DOUBT)
    larger = (m for at, m in table.points(key).items() if all(b >= a for a, b in zip(extents, at, strict=True)))
    return any(m.ms < least for m in larger)


def _kernels(session: Session) -> Counter[Hashable]:
    """What the engine of a part runs, nothing where the runtime does not tell."""
    return getattr(session, "kernels", None) or Counter()


def _joint_groups(dissection: Dissection, joint: Joint, extents: tuple[int, ...]) -> dict[str, int]:
    if joint.extent is None:
        return {}
    probe = Piece(joint.tensor, joint.key, "", joint.producer.model, (joint.extent,), (), ())
    return spread_widths(probe, extents, dissection.dense)
