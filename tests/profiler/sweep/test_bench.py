from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sluice.profiler.pieces.joints import find_joints
from sluice.profiler.pieces.net_time import CALL_KEY, dense_points, joint_graph, measured_joints
from sluice.profiler.pieces.partition import Partition, Piece, build_piece, partition_graph, spread_widths, with_small
from sluice.profiler.pieces.sources import add_sources
from sluice.profiler.survey import closed_bench
from sluice.profiler.sweep.bench import AT_ONCE, DOUBT, SOURCE_KEY, Bench, JointPoint, PiecePoint, Unknown
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing.measure import PATIENCE_MS, ReferenceEngine
from sluice.runtime.base.runner import Session
from tests.device import FINGERPRINT, FakeRunner, FakeSession, chain, line, staircase
from tests.profiler.on_device import bench_on, skipping


def some_points(cut: Partition) -> tuple[list[PiecePoint], list[JointPoint]]:
    """Pieces and joints at several sizes."""
    pieces: list[PiecePoint] = []
    joints: list[JointPoint] = []
    for share in (1.0, 0.85, 0.7, 0.55, 0.4):
        for piece, at in dense_points(cut):
            pieces.append((cut, piece, tuple(max(1, round(share * n)) for n in at)))
        for joint in find_joints(cut):
            at = () if joint.extent is None else (max(1, round(share * joint.extent.at(cut.dense))),)
            joints.append((cut, joint, at))
    return pieces, joints


def content(table: LatencyTable) -> dict[str, dict[tuple[int, ...], Measurement]]:
    return {key: table.points(key) for key in sorted(table.keys())}


def test_what_the_table_knows_is_not_measured_again(tmp_path: Path) -> None:
    cut = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        runner = FakeRunner(staircase(8))
        count = bench_on(table, runner).measure(*some_points(cut))
        points = len(table)
        assert runner.built > 0 and points > count > 0
    with LatencyTable.open(tmp_path / "t.db", FINGERPRINT) as table:
        again = FakeRunner(staircase(8))
        other = partition_graph(chain([26, 18], prefix="other."), 2)
        assert bench_on(table, again).measure(*some_points(other)) == 0
        assert again.built == 0 and len(table) == points


def test_points_of_equal_pieces_are_measured_once() -> None:
    cut = partition_graph(chain([20, 14, 14, 14, 17]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(line)
        bench = bench_on(table, runner)
        bench.call()
        built = runner.built
        twins = [(cut, piece, (14, 14)) for piece in cut.pieces if piece.name in ("conv2", "conv3")]
        assert bench.measure([*twins, *twins]) == 1 and runner.built == built + 1
        pairs = [(cut, joint, (14,)) for joint in find_joints(cut) if joint.extent is not None]
        keys = {joint.key for _, joint, _ in pairs}
        assert bench.measure([], [*pairs, *pairs]) == len(keys) < len(pairs)


@pytest.mark.parametrize("fail_at", [7, 45, 61])
def test_a_kill_loses_the_call_in_flight_only(fail_at: int, tmp_path: Path) -> None:
    """Joints are of three engines or more, so a call may be a little larger than it is meant to be."""
    cut = partition_graph(chain([26, 18, 30]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(line)
        bench_on(table, runner).measure(*some_points(cut))
        whole = content(table)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        killed = FakeRunner(line, fail_at=fail_at)
        with pytest.raises(KeyboardInterrupt):
            bench_on(table, killed).measure(*some_points(cut))
        kept = content(table)
        assert all(whole[key].items() >= points.items() for key, points in kept.items())
        assert (len(kept) > 3) == (fail_at > AT_ONCE)
    with LatencyTable.open(tmp_path / "t.db", FINGERPRINT) as table:
        again = FakeRunner(line)
        bench_on(table, again).measure(*some_points(cut))
        assert content(table) == whole
        assert killed.built + again.built <= runner.built + AT_ONCE + 3
        assert fail_at < AT_ONCE or again.built < runner.built


def test_calls_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for a quiet machine however little is in it; pieces, joints and their sources share calls."""
    sizes: list[int] = []
    time = Bench.time

    def counted(self: Bench, sessions: Sequence[Session], *most: int) -> tuple[Measurement, ...]:
        sizes.append(len(sessions))
        return time(self, sessions, *most)

    monkeypatch.setattr(Bench, "time", counted)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench_on(table, FakeRunner(line)).measure(*some_points(partition_graph(chain([26, 18, 30, 22]), 2)))
    first, *calls = sizes  # the first is what a call costs
    assert first == 2 and len(calls) > 2
    assert all(AT_ONCE <= size <= AT_ONCE + 4 for size in calls[:-1])


def at_first(factor: float, disturbed: Callable[[float], bool]) -> Callable[[float], float]:
    """The device is ``factor`` slower where an engine that is ``disturbed`` is timed for the first time."""
    seen: set[float] = set()

    def slower(ms: float) -> float:
        first = ms not in seen
        seen.add(ms)
        return factor * ms if first and disturbed(ms) else ms

    return slower


def on_a_grid(slower: Callable[[float], float]) -> tuple[dict[tuple[int, ...], float], int]:
    """A piece's times at 60 points, of 12 channels longer than of 16, and how many engines were built for them."""
    cut = partition_graph(chain([40, 24]), 2)
    piece = next(p for p in cut.pieces if p.name == "conv1")
    grid = [(cut, piece, (a, b)) for a in range(4, 41, 4) for b in range(4, 25, 4)]
    rule = lambda into, out, rest: 1e-3 * (into + 1e-3 * out) * (5 if into == 12 else 1)  # noqa: E731
    runner = FakeRunner(rule, slower)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench_on(table, runner).measure(grid)
        return {at: m.ms for at, m in table.points(piece.key).items()}, runner.built - 2  # two for the call


def test_a_piece_that_takes_longer_than_a_larger_one_is_timed_once_more() -> None:
    """The lower figure counts; 12 channels do take longer, and still do when they are timed again."""
    exact, built = on_a_grid(float)
    assert len(set(exact.values())) == len(exact) == 60 and built == 60 + 6
    for one in (exact[20, 16], exact[4, 4]):
        found, built = on_a_grid(at_first(1.3, lambda ms, one=one: math.isclose(ms, one)))  # type: ignore[misc]
        assert found == exact and built <= 60 + 7
    # Within doubt nothing is timed again.
    found, built = on_a_grid(at_first(1.0 + 0.9 * DOUBT, lambda ms: True))
    assert built == 60 + 6 and sum(found[at] != exact[at] for at in exact) == 54


def test_of_two_figures_the_lower_counts() -> None:
    exact, _ = on_a_grid(float)
    found, _ = on_a_grid(at_first(0.7, lambda ms: math.isclose(ms, exact[12, 8])))
    assert found[12, 8] == pytest.approx(0.7 * exact[12, 8])


def test_what_is_certain_is_not_given_up_for_what_is_uncertain() -> None:
    """A point is timed twice, the second time on a machine of which the reference makes it too quick."""

    class Busy(FakeSession):
        slowness = 1.0

        def sample(self, repeats: int) -> float:
            return self.ms * Busy.slowness

    cut = partition_graph(chain([26, 18]), 2)
    piece = cut.pieces[0]
    point = [(cut, piece, (8,))]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = Bench(table, FakeRunner(line), ReferenceEngine(Busy(0.4), 0.4), np.random.default_rng(0))
        bench.measure(point)
        known = table.require(piece.key, (8,))
        Busy.slowness = 1.3
        bench._time_all(point, again=True)
        assert table.require(piece.key, (8,)) == known
        table.put(piece.key, (8,), replace(known, spread=1.0))
        bench._time_all(point, again=True)
        assert table.require(piece.key, (8,)).ms < known.ms


@pytest.mark.parametrize(("slow", "uncertain"), [(1.3, True), (1.03, False)])
def test_a_machine_that_is_never_quiet_is_not_waited_for_again_and_again(slow: float, uncertain: bool) -> None:
    class Slow(FakeSession):
        ms_in_all, slowness = 0.0, slow

        def sample(self, repeats: int) -> float:
            Slow.ms_in_all += self.ms * Slow.slowness * repeats
            return self.ms * Slow.slowness

    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        reference = ReferenceEngine(Slow(0.4), 0.4)
        bench = Bench(table, FakeRunner(), reference, np.random.default_rng(0))

        def waited_ms() -> float:
            before = Slow.ms_in_all
            (found,) = bench.time([FakeSession(1.0)])
            assert (found.spread > UNCERTAIN) == (uncertain and Slow.slowness > 1.0)
            return Slow.ms_in_all - before

        first, *later = [waited_ms() for _ in range(4)]
        assert first > PATIENCE_MS / 2 and max(later) < first / 8
        Slow.slowness = 1.0  # and once it is quiet, the next disturbance is waited for
        waited_ms()
        Slow.slowness = slow
        assert waited_ms() == pytest.approx(first)


def test_a_busy_machine_marks_points() -> None:
    class Busy(FakeSession):
        def sample(self, repeats: int) -> float:
            return 1.3 * self.ms

    cut = partition_graph(chain([26, 18]), 2)
    pieces, joints = some_points(cut)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        Bench(table, FakeRunner(line), ReferenceEngine(Busy(0.4), 0.4), np.random.default_rng(0)).measure(
            pieces, joints
        )
        assert all(table.require(part.key, at).uncertain for _, part, at in (*pieces, *joints))


def test_the_time_of_sources_is_taken_out() -> None:
    """A residual addition gets its other operand from a source; each is timed once, and the piece is without it."""
    cut = partition_graph(skipping(20, 12), 2)
    with_source = [(piece, at) for piece, at in dense_points(cut) if add_sources(piece.model, piece.bare)[1]]
    assert with_source
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(line, slower=lambda ms: ms + 0.01)
        bench_on(table, runner).measure([(cut, *point) for point in with_source])
        shapes = set()
        for piece, at in with_source:
            model = build_piece(cut, piece, spread_widths(piece, at, cut.dense))
            whole, own = add_sources(model, piece.bare)
            shapes |= set(own)
            sources = sum(table.require(SOURCE_KEY, shape).ms for shape in own)
            assert table.require(piece.key, at).ms == pytest.approx(runner.ms(whole) - sources)
            assert 0.0 < sources < runner.ms(whole)
        assert table.points(SOURCE_KEY).keys() == shapes


class Free(FakeRunner):
    """Needs no sources: what enters a part is laid out as it is inside."""

    free_borders = True


def test_points_without_sources_are_those_with_them_taken_out() -> None:
    cut = partition_graph(skipping(20, 12), 2)
    pieces, joints = some_points(cut)
    found = []
    for runner in (FakeRunner(line, slower=lambda ms: ms + 0.01), Free(line, slower=lambda ms: ms + 0.01)):
        with LatencyTable.create(":memory:", FINGERPRINT) as table:
            bench_on(table, runner).measure(pieces, joints)
            keys = {part.key for _, part, _ in (*pieces, *joints)}
            found.append({(key, at): m.ms for key in keys for at, m in table.points(key).items()})
            assert bool(table.points(SOURCE_KEY)) != getattr(runner, "free_borders", False)
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-6, abs=1e-6)


class Telling(FakeRunner):
    """Engines that tell their kernels: one per operator, and one more where an engine of one part would not have it."""

    def __init__(self, odd: str = "") -> None:
        super().__init__(line, slower=lambda ms: ms + 0.05)
        self.odd, self.kernels_told = odd, 0

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        session = super().build(model, batch=batch, feeds_shapes=feeds_shapes)
        if isinstance(model, onnx.ModelProto):
            kernels = Counter(node.op_type for node in model.graph.node)
            if model.graph.name == "joint" and any(self.odd and self.odd in n.output[0] for n in model.graph.node):
                kernels["Reorder"] += 1
            session.kernels = kernels  # type: ignore[attr-defined]
            self.kernels_told += 1
        return session


def test_joints_of_equal_kernels_are_known_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They save their calls. The one behind which the layout changes is timed."""
    cut = partition_graph(chain([16, 24, 20, 28]), 2)
    joints = [joint for joint in find_joints(cut) if joint.extent is not None]
    odd = joints[1]
    timed: list[int] = []
    time = Bench.time

    def counted(self: Bench, sessions: Sequence[Session], *most: int) -> tuple[Measurement, ...]:
        timed.append(len(sessions))
        return time(self, sessions, *most)

    monkeypatch.setattr(Bench, "time", counted)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, Telling(odd=odd.tensor))
        call_ms = bench.call()
        assert call_ms == pytest.approx(0.05)
        timed.clear()
        bench.measure([], [(cut, joint, (8,)) for joint in joints])
        found = {joint.tensor: table.require(joint.key, (8,)) for joint in joints}
        unlike = {tensor for tensor, m in found.items() if m.samples}
        assert odd.tensor in unlike and len(unlike) < len(joints)
        assert sum(timed) == 3 * len(unlike)  # two parts and the whole, each
        for joint in joints:
            if joint.tensor not in unlike:
                assert found[joint.tensor].ms == joint.calls * call_ms and found[joint.tensor].spread == 0.0


def test_a_closed_bench_reads_what_is_there_and_raises_where_it_would_measure(tmp_path: Path) -> None:
    cut = partition_graph(chain([26, 18]), 2)
    pieces, joints = some_points(cut)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        bench_on(table, FakeRunner(line)).measure(pieces, joints)
        before = content(table)
        closed = closed_bench(table)
        assert closed.measure(pieces, joints) == 0 and closed.call() == table.require(CALL_KEY, ()).ms
        for missing in (([(cut, pieces[0][1], (3,))], []), ([], [(cut, joints[0][1], (3,))])):
            with pytest.raises(Unknown):
                closed.measure(*missing)
        with pytest.raises(Unknown):
            closed.session(cut.model)
        assert content(table) == before
    with LatencyTable.create(":memory:", FINGERPRINT) as table, pytest.raises(Unknown):
        closed_bench(table).call()


def test_only_large_joints_of_several_consumers_are_measured_at_a_part_of_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = skipping(12, 8)
    cut = with_small(partition_graph(model, 8), model)
    assert cut.small is not None and cut.small.batch == 2
    several = [joint for joint in find_joints(cut) if not joint.pair]
    shapes = [cut.analysis.shapes[n] for n in {n for p in (several[0].producer, *several[0].consumers)
                                               for n in (*p.inputs, *p.outputs)}]  # fmt: skip
    elements = sum(int(np.prod(shape)) for shape in shapes)
    for fits, small in ((elements, False), (elements - 1, True)):
        monkeypatch.setattr("sluice.profiler.pieces.joints.FITS", fits)
        measured = {joint.tensor: joint for joint in measured_joints(cut)}
        assert (joint_graph(measured[several[0].tensor], cut) is cut.small) == small
    monkeypatch.setattr("sluice.profiler.pieces.joints.FITS", 0)
    kinds = set()
    for joint in measured_joints(cut):
        own = {found.key for found in find_joints(cut if joint.pair else cut.small)}
        assert joint.key in own and joint_graph(joint, cut) is (cut if joint.pair else cut.small)
        kinds.add(joint.pair)
    assert kinds == {True, False}


def test_progress_counts_up_to_the_end() -> None:
    calls: list[tuple[int, int]] = []
    pieces, joints = some_points(partition_graph(chain([26, 18, 30]), 2))
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = replace(bench_on(table, FakeRunner(line)), progress=lambda done, total: calls.append((done, total)))
        missing = len({(part.key, at) for _, part, at in (*pieces, *joints)})
        assert bench.measure(pieces, joints) == missing
    assert {total for _, total in calls} == {missing} and calls[-1][0] == missing
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_a_piece_is_described_in_words() -> None:
    cut = partition_graph(chain([26, 18]), 2)
    pieces, _ = some_points(cut)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench_on(table, FakeRunner(line)).measure(pieces)
        parts: list[Piece] = [piece for _, piece, _ in pieces]
        assert all(table.description(piece.key) == piece.description for piece in parts)
