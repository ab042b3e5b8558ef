from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.passes.cut.export import to_onnx
from sluice.profiler.pieces.joints import find_joints
from sluice.profiler.pieces.partition import partition_graph, with_small
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.explore import explore
from sluice.profiler.sweep.grids import dense_ms
from sluice.profiler.sweep.joint_sweep import (
    FEW,
    GAIN,
    explore_joints,
    joint_graph,
    joint_ms,
    joint_points,
    joint_sizes,
    joint_tolerance,
)
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import make_reference_engine
from tests.device import FINGERPRINT, FakeRunner, chain, staircase
from tests.tiny import inputs, residual


def sizes_of(values: list[int], saved: Callable[[int], float], tolerance: float) -> tuple[int, ...]:
    """As the sweep finds them, which measures what is asked for and asks again."""
    known: dict[int, float] = {}
    for _ in range(len(values) + 1):
        sizes, complete = joint_sizes(values, known.get, tolerance)
        if complete:
            assert set(sizes) == set(known)  # nothing was measured in vain
            return sizes
        known |= {size: saved(size) for size in sizes}
    raise AssertionError("not complete although every size is known")


@given(st.integers(2, 40), st.data())
def test_a_jump_is_found_between_two_sizes(count: int, data: st.DataObject) -> None:
    values = sorted(data.draw(st.sets(st.integers(1, 500), min_size=count, max_size=count)))
    jump = data.draw(st.sampled_from(values[1:]))
    sizes = sizes_of(values, lambda size: 0.05 if size >= jump else -0.02, 0.01)
    assert {values[values.index(jump) - 1], jump} <= set(sizes)
    # Interpolated between the sizes that were measured, the joint is what it is at every one that may be chosen.
    at = np.interp(values, sizes, [0.05 if size >= jump else -0.02 for size in sizes])
    assert at == pytest.approx([0.05 if size >= jump else -0.02 for size in values])


def test_a_flat_joint_costs_no_more_than_few() -> None:
    values = list(range(1, 15))
    assert len(sizes_of(values, lambda size: 1e-4 * size, 0.01)) == FEW
    assert sizes_of([3, 9], lambda size: float(size), 0.01) == (3, 9)


def test_a_slope_is_followed_to_the_tolerance() -> None:
    values = list(range(1, 101))
    sizes = sizes_of(values, lambda size: 0.001 * size, 0.01)
    assert max(b - a for a, b in itertools.pairwise(sizes)) <= 10


def test_the_sweep_leaves_nothing_to_ask_for(tmp_path: Path) -> None:
    partition = partition_graph(chain([26, 18, 30]), 2)
    rng = np.random.default_rng(0)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        runner = FakeRunner(staircase(8), slower=lambda ms: ms + 0.3)
        bench = Bench(table, runner, make_reference_engine(table, runner, rng), rng)
        stairs = explore(partition, bench)
        tolerance = joint_tolerance(partition, table)
        assert tolerance == pytest.approx(GAIN * sum(dense_ms(partition, table, call_ms=0.0).values()))
        explore_joints(partition, stairs, bench, tolerance)
        built, points = runner.built, joint_points(partition, stairs, table, tolerance)
        explore_joints(partition, stairs, bench, tolerance)
        assert runner.built == built
        assert {joint.tensor for joint, _ in points} == {joint.tensor for joint in find_joints(partition)}
        for joint, at in points:
            # A joint is as many calls as there are consumers: that is all this device lets neighbours save.
            assert table.require(joint.key, at).ms == pytest.approx(0.3 * len(joint.consumers))


def test_joints_that_are_not_wanted_are_left_to_others(tmp_path: Path) -> None:
    partition = partition_graph(chain([26, 18, 30]), 2)
    rng = np.random.default_rng(0)
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
        runner = FakeRunner(staircase(8))
        bench = Bench(table, runner, make_reference_engine(table, runner, rng), rng)
        stairs = explore(partition, bench)
        own, before = find_joints(partition)[1], set(table.keys())
        explore_joints(partition, stairs, bench, 1.0, wanted=lambda joint: joint.key == own.key)
        assert set(table.keys()) - before == {own.key}


def test_only_joints_of_several_consumers_are_measured_at_a_part_of_the_batch() -> None:
    model = to_onnx(residual(), inputs())
    partition = with_small(partition_graph(model, 8), model)
    assert partition.small is not None and partition.small.batch == 2
    rng = np.random.default_rng(0)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = Bench(table, FakeRunner(staircase(8)), make_reference_engine(table, FakeRunner(), rng), rng)
        stairs = explore(partition, bench)
        explore_joints(partition, stairs, bench, 1.0)
        points = joint_points(partition, stairs, table, 1.0)
    full, small = ({joint.key for joint in find_joints(cut)} for cut in (partition, partition.small))
    assert {joint.pair for joint, _ in points} == {True, False}
    for joint, _ in points:
        assert joint.key in (full if joint.pair else small)
        assert joint_graph(joint, partition) is (partition if joint.pair else partition.small)
        assert joint_ms(joint, partition, 0.25, 0.0) == pytest.approx(0.25 if joint.pair else 1.0)
