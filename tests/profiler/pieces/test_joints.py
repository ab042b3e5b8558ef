from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest

from sluice.profiler.pieces.joints import SMALL, call_models, crosses, find_joints, joint_models, joint_widths
from sluice.profiler.pieces.partition import Partition, build_piece, partition_graph
from sluice.profiler.pieces.sources import add_sources
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import make_reference_engine
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.blocked_part import block_size
from sluice.runtime.ort.cpu import OrtRunner
from tests.device import FINGERPRINT, FakeRunner, FakeSession, chain
from tests.exported import named
from tests.networks import any_network

NAMES = [
    "splits",
    "concat",
    "squeeze_excite",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("tokens", "in_place", "resnet20", "mobilenet_v2", "densenet")),
]


@cache
def partition_of(name: str) -> Partition:
    return partition_graph(named(name), len(any_network(name)[1][0]))


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_between_pieces_has_one_joint(name: str) -> None:
    partition = partition_of(name)
    read = Counter(n for p in partition.pieces for n in p.inputs)
    between = {n for p in partition.pieces for n in p.outputs if n in read}
    joints = find_joints(partition)
    assert Counter(j.tensor for j in joints) == Counter(between)
    for joint in joints:
        assert joint.tensor in joint.producer.outputs
        assert len(joint.consumers) == read[joint.tensor]
        assert all(joint.tensor in p.inputs for p in joint.consumers)


@pytest.mark.parametrize("name", NAMES)
def test_the_joined_model_is_its_parts_in_sequence(name: str) -> None:
    partition = partition_of(name)
    for joint in find_joints(partition):
        own = {} if joint.extent is None else {g: max(1, partition.dense[g] - 1) for g, _ in joint.extent.coefs}
        widths = joint_widths(partition, joint, own)
        _, whole, sources = joint_models(partition, joint, widths)
        pieces = (joint.producer, *joint.consumers)
        rank = len(partition.analysis.shapes[joint.tensor])
        assert len(sources) == sum(joint.tensor in p.bare for p in joint.consumers) * (rank >= 3)
        onnx.checker.check_model(whole, full_check=True)
        feeds = feeds_of(whole)
        found = OrtRunner().build(whole).run(feeds) if whole.graph.output else {}
        expected: dict[str, np.ndarray] = {}
        tensor: np.ndarray | None = None
        for index, piece in enumerate(pieces):
            bare = build_piece(partition, piece, widths)
            part = add_sources(bare, [n for n in piece.bare if n != joint.tensor])[0]
            given = {i.name: feeds.get(f"{index}/{i.name}", tensor) for i in part.graph.input}
            assert all(value is not None for value in given.values())
            made = OrtRunner().build(part).run(given)  # type: ignore[arg-type]
            tensor = made[joint.tensor] if index == 0 else tensor
            expected.update({f"{index}/{n}": value for n, value in made.items() if n != joint.tensor})
        assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_beside_each_other_share_nothing(name: str) -> None:
    partition = partition_of(name)
    for joint in find_joints(partition):
        widths = joint_widths(partition, joint, {})
        parts, _, _ = joint_models(partition, joint, widths)
        if joint.pair:
            wanted = [
                add_sources(build_piece(partition, piece, widths), piece.bare)[0]
                for piece in (joint.producer, *joint.consumers)
            ]
            assert list(parts) == wanted
            continue
        (apart,) = parts
        onnx.checker.check_model(apart, full_check=True)
        feeds = feeds_of(apart)
        expected: dict[str, np.ndarray] = {}
        for index, piece in enumerate((joint.producer, *joint.consumers)):
            part = add_sources(build_piece(partition, piece, widths), piece.bare)[0]
            given = {i.name: feeds.pop(f"{index}/{i.name}") for i in part.graph.input}
            expected.update({f"{index}/{n}": value for n, value in OrtRunner().build(part).run(given).items()})
        assert not feeds
        assert_close(OrtRunner().build(apart).run(feeds_of(apart)), expected)


def test_two_small_engines_in_a_row_are_one_call_with_one_output() -> None:
    one, both = call_models()
    onnx.checker.check_model(both, full_check=True)
    assert len(both.graph.node) == 2 * len(one.graph.node) and len(both.graph.output) == 1
    (name,), feeds = feeds_of(one), feeds_of(both)
    (once,) = OrtRunner().build(one).run(feeds).values()
    (twice,) = OrtRunner().build(one).run({name: once}).values()
    (found,) = OrtRunner().build(both).run(feeds).values()
    assert_close(found, twice)


def test_neighbours_that_run_the_same_kernels_save_their_calls_and_are_not_timed() -> None:
    partition = partition_graph(chain([32, 33, 24, 16]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner, rng = OrtRunner(), np.random.default_rng(0)
        bench = Bench(table, runner, make_reference_engine(table, runner, rng), rng)
        points = {}
        for joint in find_joints(partition)[:3]:
            assert joint.extent is not None and joint.calls == 1
            ((group, _),) = joint.extent.coefs
            points[group] = (partition, joint, (partition.dense[group],))
        bench.measure([], points.values())
        found = {group: table.require(joint.key, at) for group, (_, joint, at) in points.items()}
        for group in ("conv0", "conv2"):
            assert found[group].ms == bench.call() > 0
            assert (found[group].samples, found[group].spread) == (0, 0.0)
        # 33 channels make no whole blocks, so the layout changes behind them.
        assert (found["conv1"].samples > 0) == (block_size() > 1)


class Apart(FakeRunner):
    """Tells kernels, which are the same apart and joined; what is joined takes a share ``more``."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = more

    def build(self, model: onnx.ModelProto, *, batch: int | None = None, feeds_shapes: object = None) -> FakeSession:
        session = super().build(model)
        session.kernels = Counter(node.op_type for node in model.graph.node)  # type: ignore[attr-defined]
        session.ms *= 1.0 + self.more * (model.graph.name == "joint")
        return session


@pytest.mark.parametrize(("threads", "more", "costs"), [(1, 0.1, False), (2, 0.1, True), (2, 0.02, False)])
def test_equal_kernels_on_several_threads_are_timed_and_count_beyond_doubt(
    threads: int, more: float, costs: bool
) -> None:
    partition = partition_graph(chain([32, 33, 24, 16]), 2)
    with LatencyTable.create(":memory:", replace(FINGERPRINT, threads=threads)) as table:
        runner, rng = Apart(more), np.random.default_rng(0)
        bench = Bench(table, runner, make_reference_engine(table, runner, rng), rng)
        for joint in find_joints(partition)[:3]:
            bench.measure([], [(partition, joint, (8,))])
            found = table.require(joint.key, (8,))
            widths = joint_widths(partition, joint, {f"conv{joint.tensor[1]}": 8})
            _, whole, _ = joint_models(partition, joint, widths, threads)
            assert (found.samples > 0) == (threads > 1) and bench.call() == 0.0
            assert found.ms == pytest.approx(-more * runner.ms(whole) if costs else 0.0, rel=1e-6, abs=1e-12)


class Fuses(FakeRunner):
    """Says that the joined pieces are one in a kernel, or that each has its own."""

    def __init__(self, kernels: list[list[str]]) -> None:
        super().__init__()
        self.kernels, self.asked = kernels, 0

    def fused(self, model: onnx.ModelProto, *, batch: int | None = None) -> list[list[str]]:
        assert {node.name.partition("/")[0] for node in model.graph.node} == {"0", "1"}
        self.asked += 1
        return self.kernels


@pytest.mark.parametrize(
    ("kernels", "timed"),
    [([["0/conv", "0/relu"], ["1/conv"]], True), ([["0/conv"], ["0/relu", "1/conv"]], False), (None, False)],
    ids=["apart", "in one kernel", "untold"],
)
def test_a_joint_around_other_pieces_counts_where_no_kernel_is_in_both(
    kernels: list[list[str]] | None, timed: bool
) -> None:
    partition = partition_graph(chain([32, 33, 24, 16]), 2)
    joint = next(j for j in find_joints(partition) if j.pair and j.extent is not None)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner() if kernels is None else Fuses(kernels)
        rng = np.random.default_rng(0)
        bench = Bench(table, runner, make_reference_engine(table, runner, rng), rng)
        around = replace(joint, key=f"a{joint.key}", around=True)
        bench.measure([], [(partition, one, (8,)) for one in (joint, around)])
        direct, found = (table.require(one.key, (8,)) for one in (joint, around))
        assert direct.samples > 0 and (found.samples > 0) == timed
        assert found.ms == (direct.ms if timed else joint.calls * bench.call())
        assert not isinstance(runner, Fuses) or runner.asked == 1


def test_kernels_that_are_in_several_pieces() -> None:
    assert crosses([["0/a"], ["1/b", "tensor_cast", "0/a"]])
    assert not crosses([["0/a", "0/b", "tensor_cast"], ["1/b"], []])


def test_widths_of_a_joint_are_small_but_its_own() -> None:
    partition = partition_graph(chain([40, 33, 9]), 2)
    joint = next(j for j in find_joints(partition) if j.extent is not None and j.extent.coefs == (("conv1", 1),))
    assert joint_widths(partition, joint, {"conv1": 21}) == {"conv0": SMALL, "conv1": 21, "conv2": 9}


def test_equal_joints_share_a_key() -> None:
    joints = find_joints(partition_graph(chain([10, 7, 9, 5, 6]), 2))
    keys = [j.key for j in joints]
    assert keys[1] == keys[2] and len(set(keys)) == len(keys) - 1  # between two inner convolutions
    assert keys == [j.key for j in find_joints(partition_graph(chain([10, 7, 9, 5, 6], prefix="other."), 2))]
    assert not set(keys) & {j.key for j in find_joints(partition_graph(chain([10, 7, 9, 5, 6], stride=2), 2))}
