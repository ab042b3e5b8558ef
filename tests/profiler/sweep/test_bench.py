from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sluice.profiler.pieces.staircase import Staircase, step_of, sum_of
from sluice.profiler.sweep.explore import MAX_WIDTHS, WORTH, explore
from sluice.profiler.sweep.grids import MAX_GRID, SUMS, knots_of, piece_points, totals
from sluice.profiler.sweep.joint_sweep import explore_joints, joint_tolerance
from sluice.profiler.timing.burst_log import AGAIN, ONCE, keep_points, points_kept
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.passes.cut.export import to_onnx
from sluice.profiler.pieces.partition import Partition, Piece, partition_graph
from sluice.profiler.sweep.bench import BATCH_OF_SESSIONS, DOUBT, Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN
from sluice.profiler.timing.measure import PATIENCE_MS, ReferenceEngine
from sluice.profiler.timing.reference_engine import make_reference_engine
from tests.device import FINGERPRINT, Cost, FakeRunner, FakeSession, chain, line, staircase


def bench_on(table: LatencyTable, runner: FakeRunner) -> Bench:
    rng = np.random.default_rng(0)
    return Bench(table, runner, make_reference_engine(table, runner, rng), rng)


def stairs_of(widths: list[int], cost: Cost) -> dict[str, Staircase]:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        return explore(partition_graph(chain(widths), 2), bench_on(table, FakeRunner(cost)))


def everything(partition: Partition, bench: Bench) -> dict[str, Staircase]:
    stairs = explore(partition, bench)
    bench.pieces(partition, piece_points(partition, stairs))
    explore_joints(partition, stairs, bench, joint_tolerance(partition, bench.table))
    return stairs


def test_edges_of_a_staircase_are_the_levels() -> None:
    stairs = stairs_of([50, 36, 64], staircase(16))
    assert stairs["conv0"].levels == (16, 32, 48, 50)
    assert stairs["conv1"].levels == (16, 32, 36)
    assert stairs["conv2"].levels == (16, 32, 48, 64)


def test_edges_of_a_finer_staircase_with_a_penalty() -> None:
    stairs = stairs_of([40, 36], staircase(8, penalty=1.3))
    assert stairs["conv0"].levels == (8, 16, 24, 32, 40)
    assert stairs["conv1"].levels == (8, 16, 24, 32, 36)


def test_a_line_is_split_evenly() -> None:
    levels = stairs_of([50, 36], line)["conv0"].levels
    assert (levels[0], levels[-1]) == (4, 50)
    assert max(b - a for a, b in itertools.pairwise(levels)) <= 8


def test_a_width_that_costs_more_than_dense_is_not_offered() -> None:
    """The dense width suits the device well, as 64 does where any width that is no multiple of 32 is slow."""

    def spiked(into: int, out: int, rest: float) -> float:
        return 1e-6 * into * out * rest * math.prod(1.0 if width % 32 == 0 else 3.0 for width in (into, out))

    stairs = stairs_of([64, 32], spiked)["conv0"]
    dense = stairs.cost[64]
    assert any(cost > dense for cost in stairs.cost.values())
    assert all(stairs.cost[w] <= dense for w in stairs.levels)


@given(st.integers(2, 300), st.integers(1, 64), st.floats(1.0, 2.0))
@settings(max_examples=25, deadline=None)
def test_levels_of_any_staircase(size: int, step: int, penalty: float) -> None:
    stairs = stairs_of([size, 5], staircase(step, penalty))["conv0"]
    assert len(stairs.cost) <= MAX_WIDTHS
    pack = step_of(size, "fp32")
    assert min(stairs.cost) == pack and max(stairs.cost) == size
    assert all(width % pack == 0 or width == size for width in stairs.cost)
    assert stairs.levels[-1] == size and set(stairs.levels) <= set(stairs.cost)
    # No level is dominated, no known width that is left out would have been worth having.
    for width, cost in stairs.cost.items():
        cheapest = min(c for w, c in stairs.cost.items() if w > width) if width < size else math.inf
        if width in stairs.levels:
            assert cost < cheapest - WORTH * stairs.cost[size] or width == size
        else:
            kept = min(stairs.cost[w] for w in stairs.levels if w > width)
            assert cost >= kept - WORTH * stairs.cost[size]


def test_equal_groups_are_explored_once() -> None:
    partition = partition_graph(chain([20, 14, 14, 14, 9]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        stairs = explore(partition, bench_on(table, FakeRunner()))
    assert stairs["conv2"].levels == stairs["conv1"].levels  # 14 between inner convolutions, both of them
    assert set(stairs) == set(partition.dense)


def test_what_the_table_knows_is_not_measured_again(tmp_path: Path) -> None:
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        runner = FakeRunner(staircase(8))
        stairs = everything(partition, bench_on(table, runner))
        points = len(table)
        assert runner.built > 0
    with LatencyTable.open(tmp_path / "t.db", FINGERPRINT) as table:
        again = FakeRunner(staircase(8))
        found = everything(partition_graph(chain([26, 18], prefix="other."), 2), bench_on(table, again))
        assert again.built == 0 and len(table) == points
        assert [s.levels for s in found.values()] == [s.levels for s in stairs.values()]


@pytest.mark.parametrize("fail_at", [7, 30, 61])
def test_a_kill_loses_what_was_in_flight_only(fail_at: int, tmp_path: Path) -> None:
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner(line)
        everything(partition, bench_on(table, runner))
        whole = {key: table.points(key) for key in sorted(table.keys())}
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        killed = FakeRunner(line, fail_at=fail_at)
        with pytest.raises(KeyboardInterrupt):
            everything(partition, bench_on(table, killed))
    with LatencyTable.open(tmp_path / "t.db", FINGERPRINT) as table:
        again = FakeRunner(line)
        everything(partition, bench_on(table, again))
        assert {key: table.points(key) for key in sorted(table.keys())} == whole
        assert again.built < runner.built
        assert killed.built + again.built <= runner.built + BATCH_OF_SESSIONS


def at_first(factor: float, disturbed: Callable[[float], bool]) -> Callable[[float], float]:
    """The device is ``factor`` slower where an engine that is ``disturbed`` is timed for the first time."""
    seen: set[float] = set()

    def slower(ms: float) -> float:
        first = ms not in seen
        seen.add(ms)
        return factor * ms if first and disturbed(ms) else ms

    return slower


def grid_of_60() -> tuple[Partition, Piece, list[tuple[Piece, tuple[int, ...]]]]:
    partition = partition_graph(chain([40, 24]), 2)
    piece = next(p for p in partition.pieces if p.name == "conv1")
    return partition, piece, [(piece, (a, b)) for a in range(4, 41, 4) for b in range(4, 25, 4)]


def on_a_grid(
    slower: Callable[[float], float], fail_at: int | None = None, table: LatencyTable | None = None
) -> tuple[dict[tuple[int, ...], float], int]:
    """A piece's times at 60 points, of 12 channels longer than of 16, and how many engines were built for them."""
    partition, piece, grid = grid_of_60()
    rule = lambda into, out, rest: 1e-3 * (into + 1e-3 * out) * (5 if into == 12 else 1)  # noqa: E731
    runner = FakeRunner(rule, slower, fail_at=fail_at)
    table = LatencyTable.create(":memory:", FINGERPRINT) if table is None else table
    bench_on(table, runner).pieces(partition, grid)
    return {at: m.ms for at, m in table.points(piece.key).items()}, runner.built


def test_a_piece_that_takes_longer_than_a_larger_one_is_timed_once_more() -> None:
    exact, built = on_a_grid(float)
    assert len(set(exact.values())) == len(exact) == 60
    # A sample, and what is doubtful of the rest: 12 channels do take longer, and still do when they are timed again.
    assert 60 + BATCH_OF_SESSIONS <= built <= 60 + BATCH_OF_SESSIONS + 6
    one = exact[20, 16]
    assert on_a_grid(at_first(1.3, lambda ms: math.isclose(ms, one)))[0] == exact
    found, _ = on_a_grid(at_first(1.0 + 0.9 * DOUBT, lambda ms: True))
    assert 60 - BATCH_OF_SESSIONS - 6 <= sum(found[at] != exact[at] for at in exact) <= 60 - BATCH_OF_SESSIONS


def test_on_a_disturbed_machine_all_pieces_are_timed_twice() -> None:
    """The largest piece of all cannot be doubtful."""
    exact, _ = on_a_grid(float)
    largest = exact[40, 24]
    found, built = on_a_grid(at_first(1.3, lambda ms: round(1e6 * ms) % 3 == 0 or math.isclose(ms, largest)))
    assert found == exact and built == 120


@pytest.mark.parametrize(("fail_at", "left"), [(30, 24), (70, 60), (100, 36)])
def test_what_a_killed_call_had_not_looked_at_again_is_looked_at_by_the_next(fail_at: int, left: int) -> None:
    exact, _ = on_a_grid(float)
    slower = at_first(1.3, lambda ms: True)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        with pytest.raises(KeyboardInterrupt):
            on_a_grid(slower, fail_at, table)
        keys = set(table.keys()) - {"anchor-v1"}
        kept = points_kept(table, ONCE) | points_kept(table, AGAIN)
        assert kept <= {(key, at) for key in keys for at in table.points(key)} and len(kept) == left
        if fail_at > 60:  # what is there can be read
            runner, (partition, _, grid) = FakeRunner(), grid_of_60()
            replace(bench_on(table, runner), closed=True).pieces(partition, grid)
            assert runner.built == 0
        found, built = on_a_grid(slower, None, table)
        assert found == exact and fail_at + built < 120 + BATCH_OF_SESSIONS
        assert table.blobs().keys() == {"host"}
        assert on_a_grid(slower, None, table) == (exact, 0)


def test_other_points_stay_for_another_call() -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        for name in (ONCE, AGAIN):
            keep_points(table, name, {("another", (3, 5))})
        on_a_grid(float, None, table)
        assert points_kept(table, ONCE) == points_kept(table, AGAIN) == {("another", (3, 5))}


def test_grids_are_thinned_to_a_limit_and_keep_their_ends() -> None:
    partition = partition_graph(chain([50, 36]), 2)
    stairs = {g: Staircase({}, tuple(range(2, n + 1, 2))) for g, n in partition.dense.items()}
    for piece in partition.pieces:
        knots = knots_of(piece, partition, stairs)
        assert math.prod(len(k) for k in knots) <= MAX_GRID
        for extent, values in zip(piece.extents, knots, strict=True):
            assert (values[0], values[-1]) == (2, extent.at(partition.dense)) and values == sorted(set(values))


def test_a_sum_of_groups_is_measured_at_sums_of_levels() -> None:
    """A total between two levels may be a width that no device likes, and that no plan has."""
    partition = partition_graph(chain([48, 36, 64]), 2)
    stairs = {g: Staircase({}, tuple(range(4, n + 1, 4))) for g, n in partition.dense.items()}
    found = totals(["conv0", "conv1", "conv2"], partition, stairs)
    assert (found[0], found[-1]) == (12, 148) and len(found) == SUMS
    assert all(size % 4 == 0 for size in found) and found == sorted(found)
    assert totals(["conv1"], partition, stairs) == list(stairs["conv1"].levels)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 40, 1), nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(64, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1)))


def test_both_sides_of_the_steps_of_a_sum_are_measured() -> None:
    """Whatever levels may add up to, a line between measured values is right."""
    partition = partition_graph(to_onnx(Joined(), torch.randn(2, 3, 9, 8)), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(lambda into, out, rest: 1e-6 * 16 * math.ceil(into / 16) * out * rest))
        stairs = explore(partition, bench)
        (joined,) = (name for name in stairs if name not in partition.dense)
        assert joined == sum_of(["a", "b"]) and joined not in explore(partition, bench, only=["a"])
        assert {16, 20, 32, 36, 48, 52, 64} <= set(stairs[joined].levels)
        assert totals(["a", "b"], partition, stairs) == list(stairs[joined].levels)
        piece = next(p for p in partition.pieces if p.name == "c")
        (values,) = knots_of(piece, partition, stairs)
        sums = {a + b for a, b in itertools.product(stairs["a"].levels, stairs["b"].levels)}
        assert set(values) <= sums
        bench.pieces(partition, [(piece, (v,)) for v in sums])
        known = [table.require(piece.key, (v,)).ms for v in values]
        for value in sums:
            assert np.interp(value, values, known) == pytest.approx(table.require(piece.key, (value,)).ms)


@pytest.mark.parametrize(
    ("size", "precision", "step"),
    [
        (64, "fp32", 4),
        (64, "fp16", 8),
        (64, "int8", 16),
        (26, "int8", 8),
        (7, "fp32", 2),
        (3, "bf16", 1),
        (1, "fp32", 1),
    ],
)
def test_widths_are_tried_in_packs(size: int, precision: str, step: int) -> None:
    assert step_of(size, precision) == step


def test_a_layer_that_is_quick_alone_for_being_misaligned_is_not_offered() -> None:
    """At its borders a piece is laid out plainly, as no multiple of four wants it; in the network nothing is."""

    def alone(into: int, out: int, rest: float) -> float:
        return 1e-6 * into * out * rest * math.prod(0.6 if width % 4 else 1.0 for width in (into, out))

    for stairs in stairs_of([64, 30], alone).values():
        *less, full = stairs.levels
        assert len(less) > 2 and all(width % 4 == 0 for width in less) and full in (64, 30)


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
            (found,) = bench.time([FakeSession(1.0)], ["one"])
            assert (found.spread > UNCERTAIN) == (uncertain and Slow.slowness > 1.0)
            return Slow.ms_in_all - before

        first, *later = [waited_ms() for _ in range(4)]
        assert first > PATIENCE_MS / 2 and max(later) < first / 8
        Slow.slowness = 1.0  # and once it is quiet, the next disturbance is waited for
        waited_ms()
        Slow.slowness = slow
        assert waited_ms() == pytest.approx(first)


def test_what_is_certain_is_not_given_up_for_what_is_uncertain() -> None:
    """A point is timed twice, the second time on a machine of which the reference makes it too quick."""

    class Busy(FakeSession):
        slowness = 1.0

        def sample(self, repeats: int) -> float:
            return self.ms * Busy.slowness

    partition = partition_graph(chain([26, 18]), 2)
    piece = partition.pieces[0]
    point = [((piece.key, (8,)), (partition, piece))]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = Bench(table, FakeRunner(line), ReferenceEngine(Busy(0.4), 0.4), np.random.default_rng(0))
        bench.pieces(partition, [(piece, (8,))])
        known = table.require(piece.key, (8,))
        Busy.slowness = 1.3
        bench._time_pieces(point)
        assert table.require(piece.key, (8,)) == known
        table.put(piece.key, (8,), replace(known, spread=1.0))
        bench._time_pieces(point)
        assert table.require(piece.key, (8,)).ms < known.ms


def test_progress_counts_up_to_the_end() -> None:
    calls: list[tuple[int, int]] = []
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner(line))
        stairs = explore(partition, bench)
        points = piece_points(partition, stairs)
        missing = sum(table.get(p.key, e) is None for p, e in {(p.key, e): (p, e) for p, e in points}.values())
        noisy = Bench(table, bench.runner, bench.reference, bench.rng, lambda done, total: calls.append((done, total)))
        noisy.pieces(partition, points)
    assert {total for _, total in calls} == {missing} and calls[-1][0] == missing
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
