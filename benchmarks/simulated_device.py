"""A device whose milliseconds are computed, for plans and tables of networks that take hours on a real one.

A point takes, with the work of its piece (`sluice.profiler.pieces.work`),

    ms = (max(macs' / (RATE * e), moved / BANDWIDTH) * m + LAUNCH) * noise

``macs'`` counts channels in blocks, of 4, 8 or 16 by the kind of the piece and the end. The efficiency ``e`` is drawn
for every kind and every key (standard deviation `SPREAD` of its logarithm each), ``m`` is a penalty of kinds that do
not like channels between blocks, ``noise`` has a standard deviation of `NOISE`. All draws follow from names alone. A
joint saves its calls, give or take a share of what its pieces move.

Nothing of this is the cost law that the profiler fits (`sluice.profiler.fit.cost_law`): that one knows neither the
efficiencies nor which block is whose.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.core.latency import LatencyModel, Term
from sluice.core.progress import silent
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.assemble import Layout, Slot
from sluice.profiler.pieces.joints import Joint
from sluice.profiler.pieces.net_time import CALL_KEY, calls_in
from sluice.profiler.pieces.partition import Piece, partition_static, static_at, with_small
from sluice.profiler.pieces.work import Work, work_of
from sluice.profiler.profile import Profile
from sluice.profiler.survey import survey
from sluice.profiler.sweep.bench import Bench, JointPoint, PiecePoint
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.timing.measure import ReferenceEngine

__all__ = ["SimulatedBench", "complete_model", "simulated_profile"]

RATE, BANDWIDTH, LAUNCH, CALL_MS = 8e7, 2e6, 4e-4, 2e-3  # MACs and elements per ms, ms
SPREAD, NOISE, JOINT = 0.25, 0.01, 0.02
BLOCKS = (4, 8, 16)


def _draw(*names: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(names).encode()).digest()[:8]))


def piece_ms(work: Work, key: str, points: np.ndarray) -> np.ndarray:
    """Milliseconds of a piece at points of shape ``(n, extents)``, net of calls."""
    kind = _draw("kind", work.kind)
    block = np.array([BLOCKS[int(k)] for k in kind.integers(len(BLOCKS), size=2)], dtype=np.float64)
    efficiency = math.exp(SPREAD * kind.standard_normal() + SPREAD * _draw("key", key).standard_normal())
    penalty = 1.0 + 0.5 * float(kind.uniform() < 0.3)
    macs, moved = work.at(points)
    channels = work.channels(points)
    rounded = block * np.ceil(channels / block)
    macs = macs * (rounded / channels).prod(axis=1)
    off = (rounded != channels).any(axis=1)
    noise = [math.exp(NOISE * _draw(key, *point).standard_normal()) for point in points.tolist()]
    ms = np.maximum(macs / (RATE * efficiency), moved / BANDWIDTH) * np.where(off, penalty, 1.0)
    found: np.ndarray = (ms + LAUNCH) * np.array(noise)
    return found


def joint_ms(joint: Joint, size: float) -> float:
    """Milliseconds that a joint saves beside its calls."""
    return JOINT * size / BANDWIDTH * 100.0 * _draw("joint", joint.key).standard_normal()


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedBench(Bench):
    """A bench that computes what it is asked for; ``asked`` counts the points and ``calls`` the measuring calls."""

    counts: dict[str, int] = field(default_factory=lambda: {"asked": 0, "calls": 0})

    def call(self) -> float:
        return CALL_MS

    def measure(self, pieces: Iterable[PiecePoint], joints: Iterable[JointPoint] = ()) -> int:
        rows: dict[tuple[str, tuple[int, ...]], Measurement] = {}
        exact = Measurement(0.0, 0.0, 1, self.table.fingerprint.clock)
        for cut, piece, at in pieces:
            if (piece.key, at) not in rows and self.table.get(piece.key, at) is None:
                points = np.array([at], dtype=np.float64).reshape(1, len(at))
                ms = float(piece_ms(work_of(piece, cut), piece.key, points)[0]) + calls_in(piece, cut) * CALL_MS
                rows[piece.key, at] = replace(exact, ms=ms)
        for _, joint, at in joints:
            if (joint.key, at) not in rows and self.table.get(joint.key, at) is None:
                rows[joint.key, at] = replace(exact, ms=joint_ms(joint, sum(at)) + joint.calls * CALL_MS)
        self.table.put_many((key, at, found) for (key, at), found in rows.items())
        self.counts["asked"] += len(rows)
        self.counts["calls"] += bool(rows)
        return len(rows)


class _Nothing:
    """A runner that is never asked."""

    clock = "thread_cpu"
    device = "a simulated device"
    version = "1"


def simulated_profile(model: onnx.ModelProto, batch: int, methods: tuple[str, ...]) -> Profile:
    """The profile of a network of which the dense pieces are measured."""
    table = LatencyTable.create(":memory:", Fingerprint("simulated", "ort-cpu", "1", 1, "fp32", batch, "thread_cpu"))
    nothing: object = _Nothing()
    bench = SimulatedBench(table, nothing, ReferenceEngine(nothing, 1.0), np.random.default_rng(0))  # type: ignore[arg-type]
    table.put(CALL_KEY, (), Measurement(CALL_MS, 0.0, 1, "thread_cpu"))
    static = static_at(model, batch)
    space = find_search_space(read_onnx(static), ())
    partition = with_small(partition_static(static, space.analysis, batch), model)
    layout = survey(partition, bench, methods=methods, space=space)
    return Profile(layout, bench, space, layout.alternatives.options, progress=silent)


def complete_model(layout: Layout, model: LatencyModel) -> LatencyModel:
    """The latency model with every point of every slot as it is, at all levels."""
    known = {term.name: term for term in model.terms}
    terms = [_true(slot, known[slot.name]) for slot in layout.slots]
    return replace(model, terms=tuple(terms))


def _true(slot: Slot, term: Term) -> Term:
    shape = tuple(len(k) for k in term.knots)
    grid = np.stack(np.meshgrid(*term.knots, indexing="ij"), axis=-1).reshape(-1, len(shape)) if shape else None
    points = np.zeros((1, 0)) if grid is None else grid
    if isinstance(slot.part, Piece):
        assert slot.work is not None
        ms = piece_ms(slot.work, slot.part.key, points)
    else:
        scale = slot.graph.batch / slot.part.batch
        ms = np.array([scale * joint_ms(slot.part, float(point.sum())) for point in points])
    return replace(term, ms=ms.reshape(shape), bound=None, measured=None)
