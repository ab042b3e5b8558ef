"""The bench: points are measured, many at once, and kept in the table.

1. Pieces are measured on the product of the levels of their extents (`sluice.profiler.sweep.explore`), thinned where
   the product would be large (`sluice.profiler.sweep.grids`); joints as `sluice.profiler.sweep.joint_sweep` says.
2. Every finished batch of points is committed, and a point in the table is not measured again. After a kill the next
   run times the unfinished batch first, and goes on where it was (`sluice.profiler.timing.burst_log`). So the choice of
   a batch follows from the table alone. The engines of the batch are built again, with the runtime's timing cache, if
   it has one, which is kept after each engine.
3. A tenant that fills the caches that cores share slows large activations, and not the reference engine: points of
   DenseNet were up to 20% off in one call and not in the next. So some of the new pieces are timed once more. Unless
   nine in ten of these are within `DOUBT` of their first time, all new pieces are timed again; and so is a piece that
   seems to take longer than at larger widths by more than that. The lower figure counts, since noise only adds. A call
   that is killed before this notes in the table the points that are still to be looked at, and the next call that wants
   these points times them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.core.progress import Advance, told_to
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.joints import Joint, call_models, joint_models, joint_widths
from sluice.profiler.pieces.partition import Partition, Piece, build_piece, spread_widths
from sluice.profiler.pieces.sources import add_sources, source_model
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement, best_of
from sluice.profiler.timing import sm_clock, timing_cache
from sluice.profiler.timing.burst_log import AGAIN, ONCE, Call, Point, keep_points, kept, landed, points_kept
from sluice.profiler.timing.measure import PATIENCE_MS, QUIET, ReferenceEngine, measure
from sluice.profiler.timing.reference_engine import was_slow
from sluice.runtime.base.runner import Runner, Session

__all__ = ["Bench"]

BATCH_OF_SESSIONS = 24
DOUBT = 0.03
BURSTS, MAX_BURSTS = 24, 160
SOURCE_KEY = "source-v4"
CALL_KEY = "call-v3"  # the time of an engine with nothing to do
PieceAt = tuple[Point, tuple[Partition, Piece]]


@dataclass(slots=True)
class Waits:
    """The time that a call may wait for a quiet machine: little as long as the last call waited in vain."""

    in_vain: bool = False

    @property
    def patience_ms(self) -> float:
        return PATIENCE_MS / 16 if self.in_vain else PATIENCE_MS


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where points are measured and kept; a ``closed`` one has a runner that builds nothing."""

    table: LatencyTable
    runner: Runner
    reference: ReferenceEngine
    rng: np.random.Generator
    progress: Advance = lambda done, total: None
    waits: Waits = field(default_factory=Waits)
    closed: bool = False

    @property
    def _threads(self) -> int:
        return self.table.fingerprint.threads

    def pieces(self, partition: Partition, wanted: Sequence[tuple[Piece, tuple[int, ...]]]) -> None:
        """Measure those of (piece, extents) that the table lacks."""
        self.pieces_of([(partition, *point) for point in wanted])

    def pieces_of(self, wanted: Sequence[tuple[Partition, Piece, tuple[int, ...]]]) -> None:
        """The same for pieces of several graphs: the fuller a call, the less it waits for a quiet machine per point.

        In mixed order, so that the error that all points of one call share does not fall on one piece.
        """
        once, again = (set() if self.closed else points_kept(self.table, name) for name in (ONCE, AGAIN))
        missing = {(p.key, e) for _, p, e in wanted if self.table.get(p.key, e) is None}
        todo = {(p.key, e): (cut, p) for cut, p, e in wanted if (p.key, e) in missing | once | again}
        if not todo:  # a complete table is only read
            return
        self.table.describe_all({piece.key: piece.description for _, piece in todo.values()})
        self._time_pieces(_mixed([p for p in todo.items() if p[0] in missing]), self.progress)
        points = _mixed(todo.items(), "again")
        fresh = [p for p in points if p[0] in missing | once]
        some = fresh[:BATCH_OF_SESSIONS]
        before = [self.table.require(*point).ms for point, _ in some]
        self._time_pieces(some)
        after = [self.table.require(*point).ms for point, _ in some]
        disturbed = sum(a > (1.0 + DOUBT) * b for a, b in zip(before, after, strict=True)) > 0.1 * len(some)
        again |= {point for point, _ in fresh[len(some) :] if disturbed or _doubtful(point, self.table)}
        keep_points(self.table, AGAIN, again)
        keep_points(self.table, ONCE, points_kept(self.table, ONCE) - todo.keys())
        self._time_pieces([p for p in points if p[0] in again])

    def _time_pieces(self, points: Sequence[PieceAt], progress: Advance = lambda done, total: None) -> None:
        """Time these points; where the table has a figure already, the lower one is kept."""
        for start in range(0, len(points), BATCH_OF_SESSIONS):
            chunk = points[start : start + BATCH_OF_SESSIONS]
            parts = [(p, build_piece(cut, p, spread_widths(p, extents, cut.dense))) for (_, extents), (cut, p) in chunk]
            built = [add_sources(model, piece.bare, self._threads) for piece, model in parts]
            source_ms = self.sources([shape for _, shapes in built for shape in shapes])
            before = [self.table.get(*point) for point, _ in chunk]
            names = [_name(p, "again" if known else "") for (p, _), known in zip(chunk, before, strict=True)]
            found = self.time([self.session(model) for model, _ in built], names)
            own = [replace(m, ms=m.ms - sum(source_ms[s] for s in sh)) for m, (_, sh) in zip(found, built, strict=True)]
            if new := {point for (point, _), known in zip(chunk, before, strict=True) if known is None}:
                keep_points(self.table, ONCE, points_kept(self.table, ONCE) | new)
            self._put(
                (*point, now if known is None else best_of((now, known)))
                for (point, _), now, known in zip(chunk, own, before, strict=True)
            )
            if twice := {point for point, _ in chunk} - new:
                for name in (ONCE, AGAIN):
                    keep_points(self.table, name, points_kept(self.table, name) - twice)
            progress(start + len(chunk), len(points))

    def sources(self, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Milliseconds of sources by shape, measured once and kept."""
        missing = [s for s in dict.fromkeys(shapes) if self.table.get(SOURCE_KEY, s) is None]
        for start in range(0, len(missing), BATCH_OF_SESSIONS):
            chunk = missing[start : start + BATCH_OF_SESSIONS]
            sessions = [self.session(source_model(shape, self._threads)) for shape in chunk]
            found = self.time(sessions, [_name((SOURCE_KEY, shape)) for shape in chunk])
            self._put((SOURCE_KEY, shape, m) for shape, m in zip(chunk, found, strict=True))
        return {shape: self.table.require(SOURCE_KEY, shape).ms for shape in shapes}

    def joints(self, wanted: Sequence[tuple[Partition, Joint, tuple[int, ...]]]) -> None:
        """Find those of (joint, extents) that the table lacks, all at once, from the parts and the joined pieces.

        A joint that is known from equal kernels (`sluice.profiler.pieces.joints`, 3) is kept as a point of no samples.
        """
        todo = {(j.key, e): (cut, j) for cut, j, e in wanted if self.table.get(j.key, e) is None}
        if not todo:
            return
        self.table.describe_all({joint.key: joint.description for _, joint in todo.values()})
        built = [
            joint_models(cut, joint, joint_widths(cut, joint, _joint_groups(cut, joint, at)), self._threads)
            for (_, at), (cut, joint) in todo.items()
        ]
        engines = [[self.session(model) for model in (*parts, whole)] for parts, whole, _ in built]
        known = [self._as_apart(own, shapes) for own, (*_, shapes) in zip(engines, built, strict=True)]
        call_ms = self.call() if any(known) or not all(joint.pair for _, joint in todo.values()) else 0.0
        saved, timed = [], []
        for (point, (_, joint)), own, (*_, shapes), apart in zip(todo.items(), engines, built, known, strict=True):
            if apart and self._threads == 1:
                saved.append((*point, Measurement(joint.calls * call_ms, 0.0, 0, self.runner.clock)))
            else:
                timed.append((point, joint, own, shapes, apart))
        source_ms = self.sources([shape for _, _, _, shapes, _ in timed for shape in shapes])
        names = [_name(point, str(k)) for point, _, own, *_ in timed for k, _ in enumerate(own)]
        found = iter(self.time([session for _, _, own, *_ in timed for session in own], names) if timed else ())
        for point, joint, own, shapes, apart in timed:
            *parts, whole = [next(found) for _ in own]
            calls = 0 if joint.pair else len(joint.consumers)
            ms = sum(m.ms for m in parts) + calls * call_ms - whole.ms - sum(source_ms[s] for s in shapes)
            if apart and abs(ms - joint.calls * call_ms) <= DOUBT * whole.ms:
                ms = joint.calls * call_ms
            saved.append((*point, replace(whole, ms=ms, spread=max(m.spread for m in (*parts, whole)))))
        self._put(saved)

    def _as_apart(self, engines: Sequence[Session], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether the last engine runs the kernels of the others, less those of sources of these ``shapes``."""
        *parts, whole = [_kernels(engine) for engine in engines]
        if not whole:  # an engine takes some runtimes seconds to build
            return False
        sources = [_kernels(self.session(source_model(shape, self._threads))) for shape in shapes]
        return sum(parts, Counter()) == sum(sources, whole)

    def call(self) -> float:
        """Milliseconds that an inference takes beside its operators, measured once and kept."""
        if self.table.get(CALL_KEY, ()) is None:
            one, both = self.time(
                [self.session(model) for model in call_models()], [f"{CALL_KEY} one", f"{CALL_KEY} two"]
            )
            spread = max(one.spread, both.spread)
            self._put([(CALL_KEY, (), replace(one, ms=max(0.0, 2 * one.ms - both.ms), spread=spread))])
            self.table.describe(CALL_KEY, "one call of an engine")
        return self.table.require(CALL_KEY, ()).ms

    def session(self, model: onnx.ModelProto, *, part: bool = True) -> Session:
        """The engine of a part of a network, or of a whole one, in the precision of the table (rule 2)."""
        asked = self.table.fingerprint
        build = getattr(self.runner, "build_part", self.runner.build) if part else self.runner.build
        built = build(to_precision(model, asked.precision, part=part, target=asked.runtime))
        timing_cache.keep(self.runner, self.table)
        return built

    def time(
        self, sessions: Sequence[Session], names: Sequence[str], most: int = MAX_BURSTS
    ) -> tuple[Measurement, ...]:
        """All of them in turns, `BURSTS` to ``most`` bursts each; by their names the next run knows them after a kill.

        Once the table has the points, `landed` is to be called.
        """
        seed = int(self.rng.integers(2**31))
        within = f"{self.table.fingerprint.to_json()} {self.reference.ms!r}"
        asked = Call(tuple(names), within, seed, BURSTS, most, self.waits.patience_ms)
        with kept(self.table, asked, [*sessions, self.reference.session]) as (call, (*own, reference)):
            *found, witness = measure(
                own, min_bursts=call.min_bursts, max_bursts=call.max_bursts, patience_ms=call.patience_ms,
                reference=replace(self.reference, session=reference), with_reference=True,
                waiting=told_to(self.progress),
                rng=np.random.default_rng(call.seed),
            )  # fmt: skip
        self.waits.in_vain = witness.ms > (1.0 + QUIET) * self.reference.ms
        if was_slow(self.reference, witness.ms, self.table):
            return self.time(sessions, names, most)
        self.reference.unproven = False
        sm_clock.keep(self.runner, self.table)
        return tuple(found)

    def _put(self, points: Iterable[tuple[str, Sequence[int], Measurement]]) -> None:
        self.table.put_many(points)
        landed(self.table)


def _name(point: Point, label: str = "") -> str:
    key, extents = point
    return f"{key} {extents} {label}".rstrip()


def _mixed(points: Iterable[PieceAt], label: str = "") -> list[PieceAt]:
    """In an order that is random but for the points themselves, and that stays when some of them are done."""
    return sorted(points, key=lambda p: hashlib.sha256(_name(p[0], label).encode()).digest())


def _doubtful(point: Point, table: LatencyTable) -> bool:
    """Whether the piece takes longer than at larger widths (rule 3)."""
    key, extents = point
    least = table.require(key, extents).ms / (1.0 + DOUBT)
    larger = (m for at, m in table.points(key).items() if all(b >= a for a, b in zip(extents, at, strict=True)))
    return any(m.ms < least for m in larger)


def _kernels(session: Session) -> Counter[Hashable]:
    """The kernels of the engine of a part, none where the runtime does not tell."""
    return getattr(session, "kernels", None) or Counter()


def _joint_groups(partition: Partition, joint: Joint, extents: tuple[int, ...]) -> dict[str, int]:
    if joint.extent is None:
        return {}
    probe = Piece(joint.tensor, joint.key, "", joint.producer.model, (joint.extent,), (), ())
    return spread_widths(probe, extents, partition.dense)
