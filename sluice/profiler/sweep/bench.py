"""The bench: points are measured, many at once, and kept in the table.

1. A point that the table holds is not measured again. Pieces, joints and the sources that they need take their turns in
   one call (`sluice.profiler.timing.measure`), `AT_ONCE` engines in each, fewer where their weights are large. The
   fuller a call, the less it waits for a quiet machine per point. Points come in mixed order, so that the error that
   all points of one call share does not fall on one piece.
2. Every call is committed as a whole. A kill costs the call in flight.
3. A tenant that fills the caches that cores share slows large activations, and not the reference engine: points of
   DenseNet were up to 20% off in one call and not in the next. So a point that seems to take longer than a larger one
   of the same piece, by more than `DOUBT`, is timed once more. The lower figure counts, since noise only adds.
4. A runtime may fail on an engine. The points of such a call are timed again in halves, down to the one that fails. It
   is *refused*: what uses it is no choice, and it is not tried again. Where the process of the runtime has ended
   (`sluice.runtime.remote`), the engines of the other points are built anew.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.core.errors import EngineFault, LostLine
from sluice.core.progress import Advance, told_to
from sluice.core.weight_bytes import bytes_of_weights
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.joints import Joint, call_models, crosses, joint_models, joint_widths
from sluice.profiler.pieces.net_time import CALL_KEY, known_call
from sluice.profiler.pieces.partition import Partition, Piece, build_piece, spread_widths
from sluice.profiler.pieces.sources import add_sources, source_model
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement, best_of
from sluice.profiler.timing import sm_clock, timing_cache
from sluice.profiler.timing.measure import PATIENCE_MS, QUIET, ReferenceEngine, measure
from sluice.profiler.timing.reference_engine import reference_model, was_slow
from sluice.runtime.base.faults import building, running
from sluice.runtime.base.runner import Runner, Session

__all__ = ["SOURCE_KEY", "Bench", "JointPoint", "PiecePoint", "Unknown"]

log = logging.getLogger(__name__)

AT_ONCE = 32  # engines in one call
WEIGHTS_AT_ONCE = 2**25, 2**28  # bytes of weights in them beyond which no point is added, at least and at most
DOUBT = 0.03
BURSTS, MAX_BURSTS = 24, 160
SOURCE_KEY = "source-v4"
Shape = tuple[int, ...]
Row = tuple[str, tuple[int, ...], Measurement]
PiecePoint = tuple[Partition, Piece, tuple[int, ...]]
JointPoint = tuple[Partition, Joint, tuple[int, ...]]


class Unknown(Exception):
    """A point that would have to be measured, where nothing can be."""


@dataclass(slots=True)
class Waits:
    """The time that a call may wait for a quiet machine: little as long as the last call waited in vain."""

    in_vain: bool = False

    @property
    def patience_ms(self) -> float:
        return PATIENCE_MS / 16 if self.in_vain else PATIENCE_MS


@dataclass(frozen=True, slots=True, eq=False)
class _Engines:
    """The engines of one point: parts, and of a joint the whole last; the sources that are in their time."""

    key: str
    extents: tuple[int, ...]
    sessions: tuple[Session, ...]
    sources: tuple[Shape, ...]
    joint: Joint | None = None
    apart: bool = False
    fused: bool = False

    def milliseconds(self, found: Sequence[Measurement], source_ms: dict[Shape, float], call_ms: float) -> Measurement:
        """The time of the point, given those of its engines."""
        *parts, whole = found
        inside = sum(source_ms[shape] for shape in self.sources)
        if self.joint is None:
            return replace(whole, ms=whole.ms - inside)
        calls = 0 if self.joint.pair else len(self.joint.consumers)
        ms = sum(m.ms for m in parts) + calls * call_ms - whole.ms - inside
        if self.apart and abs(ms - self.joint.calls * call_ms) <= DOUBT * whole.ms:
            ms = self.joint.calls * call_ms
        return replace(whole, ms=ms, spread=max(m.spread for m in found))


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Where points are measured and kept; a ``closed`` one only reads, and has no runner."""

    table: LatencyTable
    runner: Runner
    reference: ReferenceEngine
    rng: np.random.Generator
    progress: Advance = lambda done, total: None
    waits: Waits = field(default_factory=Waits)
    kept: timing_cache.Kept = field(default_factory=timing_cache.Kept)
    closed: bool = False
    deadline: float = math.inf  # by `time.monotonic`: no call begins after it
    refused: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)  # with the reason (rule 4)

    @property
    def open(self) -> bool:
        """Whether more can be measured: the table is this device's, and there is time."""
        return not self.closed and time.monotonic() < self.deadline

    @property
    def _threads(self) -> int:
        return self.table.fingerprint.threads

    @property
    def _free(self) -> bool:
        """Whether parts have no sources. Then a source takes a call and no more: so many calls are in a point."""
        return bool(getattr(self.runner, "free_borders", False))

    def measure(self, pieces: Iterable[PiecePoint], joints: Iterable[JointPoint] = ()) -> int:
        """Measure those of the points that the table lacks; how many these were.

        A joint that is known from equal kernels (`sluice.profiler.pieces.joints`, 3) is kept as a point of no samples.
        """
        wanted: dict[tuple[str, tuple[int, ...]], PiecePoint | JointPoint] = {(p[1].key, p[2]): p for p in pieces}
        wanted |= {(p[1].key, p[2]): p for p in joints}
        todo = _mixed([p for at, p in wanted.items() if at not in self.refused and self.table.get(*at) is None])
        if not todo:  # a complete table is only read
            return 0
        if self.closed:
            raise Unknown
        self.table.describe_all({part.key: part.description for _, part, _ in todo})
        self._time_all(todo)
        done = [p for p in todo if self.table.get(p[1].key, p[2]) is not None]  # all of them before the deadline
        doubtful = [p for p in done if isinstance(p[1], Piece) and _doubtful(p[1].key, p[2], self.table)]
        self._time_all(doubtful, again=True)
        return len(done)

    def _time_all(self, points: Sequence[PiecePoint | JointPoint], again: bool = False) -> None:
        """Time these points; where the table has a figure already, the lower one is kept."""
        done, call_ms = 0, self.call() if points else 0.0
        least, most = WEIGHTS_AT_ONCE
        room = min(most, max([least, *(bytes_of_weights(cut.model) // 2 for cut, _, _ in points)]))
        while done < len(points) and self.open:
            count, sessions, size = 0, 0, 0.0
            while sessions < AT_ONCE and size < room and done + count < len(points):
                sessions += _engines_of(points[done + count][1])
                size += _weights_of(*points[done + count])
                count += 1
            rows = self._timed(points[done : done + count], call_ms)
            done += count
            if again:
                rows = [(key, at, best_of((found, self.table.require(key, at)))) for key, at, found in rows]
            self.table.put_many(rows)
            if not again:
                self.progress(done, len(points))

    def _timed(self, points: Sequence[PiecePoint | JointPoint], call_ms: float, last: bool = False) -> list[Row]:
        """The rows of these points, less those that are refused (rule 4)."""
        try:
            engines = [self._engines(*point) for point in points]
            rows = self._time_call(engines, call_ms)
        except EngineFault as error:
            self.stand_up(error)
            if last:
                _, part, extents = points[0]
                self.refused[part.key, extents] = str(error)
                log.warning("%s at %s is left out: %s", part.description, "x".join(map(str, extents)), error)
                return []
            if len(points) == 1:
                return self._timed(points, call_ms, last=True)
            half = len(points) // 2
            return self._timed(points[:half], call_ms) + self._timed(points[half:], call_ms)
        self.keep(session for e in engines for session in e.sessions)
        return rows

    def stand_up(self, error: EngineFault) -> None:
        """Go on after a fault; the error itself where the device does not come back."""
        if isinstance(error, LostLine):
            revive = getattr(self.runner, "revive", None)
            if revive is None or not revive():
                raise error
            self.reference.session = self.runner.build(reference_model())

    def _time_call(self, engines: Sequence[_Engines], call_ms: float) -> list[Row]:
        """One call (rule 1): the engines of these points, and their sources that the table lacks."""
        equal = [e for e in engines if e.joint is not None and (e.fused or (e.apart and self._threads == 1))]
        nothing = Measurement(0.0, 0.0, 0, self.runner.clock)
        told = [(e.key, e.extents, replace(nothing, ms=e.joint.calls * call_ms)) for e in equal if e.joint]
        engines = [e for e in engines if e not in equal]
        if not engines:
            return told
        shapes = dict.fromkeys(shape for e in engines for shape in e.sources)
        missing = [] if self._free else [shape for shape in shapes if self.table.get(SOURCE_KEY, shape) is None]
        sources = [self.session(source_model(shape, self._threads)) for shape in missing]
        found = self.time([*sources, *(session for e in engines for session in e.sessions)])
        rows = [(SOURCE_KEY, shape, m) for shape, m in zip(missing, found, strict=False)]
        source_ms = {s: known.ms for s in shapes if (known := self.table.get(SOURCE_KEY, s)) is not None}
        source_ms |= {shape: m.ms for _, shape, m in rows}
        source_ms |= dict.fromkeys(shapes if self._free else (), call_ms)
        own = iter(found[len(missing) :])
        for e in engines:
            rows.append((e.key, e.extents, e.milliseconds([next(own) for _ in e.sessions], source_ms, call_ms)))
        return told + rows

    def _engines(self, cut: Partition, part: Piece | Joint, extents: tuple[int, ...]) -> _Engines:
        if isinstance(part, Piece):
            model = build_piece(cut, part, spread_widths(part, extents, cut.dense))
            whole, shapes = add_sources(model, part.bare, self._threads)
            whole = model if self._free else whole
            return _Engines(part.key, extents, (self.session(whole),), tuple(shapes))
        widths = joint_widths(cut, part, _joint_groups(cut, part, extents))
        parts, whole, shapes = joint_models(cut, part, widths, self._threads, sourced=not self._free)
        sessions = tuple(self.session(model) for model in (*parts, whole))
        fused = part.around and self._is_fused(whole)
        return _Engines(part.key, extents, sessions, tuple(shapes), part, self._as_apart(sessions, shapes), fused)

    def _as_apart(self, engines: Sequence[Session], shapes: Sequence[Shape]) -> bool:
        """Whether the last engine runs the kernels of the others, less those of sources of these ``shapes``."""
        *parts, whole = [_kernels(engine) for engine in engines]
        if not whole:  # an engine takes some runtimes seconds to build
            return False
        shapes = () if self._free else shapes
        sources = [_kernels(self.session(source_model(shape, self._threads))) for shape in shapes]
        return sum(parts, Counter()) == sum(sources, whole)

    def _is_fused(self, whole: onnx.ModelProto) -> bool:
        """Whether the joined pieces are one in a kernel (rule 5 of `sluice.profiler.pieces.joints`)."""
        fused = getattr(self.runner, "fused", None)
        with building(self.table.fingerprint.runtime):
            return fused is None or crosses(fused(self._deployed(whole, part=True)))

    def call(self) -> float:
        """Milliseconds that an inference takes beside its operators, measured once and kept."""
        if self.closed and (known := known_call(self.table)) is not None:
            return known.ms
        if self.table.get(CALL_KEY, ()) is None:
            one, both = self.time([self.session(model) for model in call_models()])
            spread = max(one.spread, both.spread)
            self.table.put(CALL_KEY, (), replace(one, ms=max(0.0, 2 * one.ms - both.ms), spread=spread))
            self.table.describe(CALL_KEY, "one call of an engine")
        return self.table.require(CALL_KEY, ()).ms

    def session(self, model: onnx.ModelProto, *, part: bool = True) -> Session:
        """The engine of a part of a network, or of a whole one, in the precision of the table."""
        if self.closed:
            raise Unknown
        build = getattr(self.runner, "build_part", self.runner.build) if part else self.runner.build
        form = self._deployed(model, part=part)
        self.kept.engines += 1
        with building(self.table.fingerprint.runtime):
            return build(form)

    def _deployed(self, model: onnx.ModelProto, *, part: bool) -> onnx.ModelProto:
        asked = self.table.fingerprint
        return to_precision(model, asked.precision, part=part, target=asked.runtime, threads=asked.threads)

    def keep(self, sessions: Iterable[Session]) -> None:
        """What the table keeps of engines beside their times."""
        timing_cache.keep(self.runner, self.table, self.kept)
        timing_cache.keep_kernels(self.runner, self.table, {k for session in sessions for k in _kernels(session)})

    def time(self, sessions: Sequence[Session], most: int = MAX_BURSTS) -> tuple[Measurement, ...]:
        """All of them in turns, `BURSTS` to ``most`` bursts each."""
        with running(self.table.fingerprint.runtime):
            *found, witness = measure(
                sessions, min_bursts=BURSTS, max_bursts=most, patience_ms=self.waits.patience_ms,
                reference=self.reference, with_reference=True, waiting=told_to(self.progress), rng=self.rng,
            )  # fmt: skip
        self.waits.in_vain = witness.ms > (1.0 + QUIET) * self.reference.ms
        if was_slow(self.reference, witness.ms, self.table):
            return self.time(sessions, most)
        sm_clock.keep(self.runner, self.table)
        return tuple(found)


def _engines_of(part: Piece | Joint) -> int:
    """How many engines a point of the part takes, sources aside."""
    return 1 if isinstance(part, Piece) else 2 + len(part.consumers)


def _weights_of(cut: Partition, part: Piece | Joint, extents: tuple[int, ...]) -> float:
    """Bytes of weights of a point: in proportion to its sizes. What a joint joins is small."""
    if isinstance(part, Joint):
        return 0.0
    share = math.prod(at / extent.at(cut.dense) for at, extent in zip(extents, part.extents, strict=True))
    return share * bytes_of_weights(part.model)


def _mixed(points: Sequence[PiecePoint | JointPoint]) -> list[PiecePoint | JointPoint]:
    """In an order that is random but for the points themselves (rule 1)."""
    return sorted(points, key=lambda p: hashlib.sha256(f"{p[1].key} {p[2]}".encode()).digest())


def _doubtful(key: str, extents: tuple[int, ...], table: LatencyTable) -> bool:
    """Whether the piece takes longer than at larger widths (rule 3)."""
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
