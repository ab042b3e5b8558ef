from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.cli import main
from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.progress import silent
from sluice.passes.cut.export import to_onnx
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.calibrate import calibrate
from sluice.profiler.pieces.partition import Partition, Piece, build_piece, partition_graph, spread_widths
from sluice.profiler.survey import survey
from sluice.profiler.sweep import engine_times
from sluice.profiler.sweep.bench import BURSTS, Bench
from sluice.profiler.sweep.engine_times import measure_engines
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.table_file import bursts_of
from sluice.profiler.timing.burst_log import EVERY, Call, kept, landed
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.profiler.timing.reference_engine import reference_model
from sluice.solver.options import METHODS
from tests.device import FINGERPRINT, REFERENCE_MS, FakeRunner, FakeSession, chain, staircase


class Killed(BaseException):
    """Nothing in the program may catch it."""


def jagged(ms: float) -> float:
    """No two engines are alike: joints differ at all sizes, pieces seem to take longer than larger ones."""
    return ms * (1.2 + 0.2 * math.sin(1e5 * ms)) + 0.1


class Device(FakeRunner):
    """Counts the bursts of its sessions, the reference apart.

    At burst ``dies_at`` what is in the folder ``of`` is copied as a kill would leave it, to ``to``.
    """

    def __init__(
        self,
        dies_at: int | None = None,
        of: Path | None = None,
        to: Path | None = None,
        factor: float = 1.0,
        slower: Callable[[float], float] = float,
    ) -> None:
        super().__init__(staircase(8), slower)
        self.dies_at, self.of, self.to, self.factor, self.bursts = dies_at, of, to, factor, 0

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        built = super().build(model, batch=batch, feeds_shapes=feeds_shapes)
        if model.graph.name == reference_model().graph.name:
            return built
        device = self

        class Counting(FakeSession):
            def sample(self, repeats: int) -> float:
                if device.bursts == device.dies_at:
                    assert device.of is not None and device.to is not None
                    shutil.copytree(device.of, device.to)
                    raise Killed
                device.bursts += 1
                return self.ms * device.factor

        return Counting(built.ms)


def begun(table: LatencyTable) -> tuple[str, ...]:
    """What the last call is of that the file beside the table tells of."""
    file = Path(bursts_of(table.path))
    calls = (
        [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")] if file.exists() else []
    )
    return tuple(calls[-1]["names"]) if calls else ()


def bench_on(table: LatencyTable, runner: FakeRunner, seed: int = 0) -> Bench:
    reference = ReferenceEngine(runner.build(reference_model()), REFERENCE_MS)
    return Bench(table, runner, reference, np.random.default_rng(seed))


def profiled(partition: Partition, bench: Bench) -> LatencyModel:
    """All that is measured of a network, engines in groups of a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_times, "AT_ONCE", 400_000)
        found = survey(partition, bench, silent, methods=METHODS, space=find_search_space(read_onnx(partition.model)))
        return calibrate(partition, found.latency(bench), bench, found.alternatives, engines=12)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.out = nn.Conv2d(3, 14, 3), nn.Conv2d(14, 10, 3, padding=1), nn.Conv2d(10, 14, 1)
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.out(F.relu(self.mid(x))))
        return self.fc(x.mean((2, 3)))


@functools.cache
def bottleneck() -> Partition:
    return partition_graph(to_onnx(Bottleneck(), (torch.zeros(2, 3, 9, 9),)), 2)


@functools.cache
def undisturbed() -> tuple[int, dict[str, Any], list[Any]]:
    """How many bursts all of it takes, the points, the engines."""
    whole = Device(slower=jagged)
    with TemporaryDirectory() as folder, LatencyTable.create(Path(folder) / "t.db", FINGERPRINT) as table:
        profiled(bottleneck(), bench_on(table, whole))
        assert [p.name for p in Path(folder).iterdir()] == ["t.db"]
        return whole.bursts, *content(table)


def content(table: LatencyTable) -> tuple[dict[str, Any], list[Any]]:
    (network,) = table.networks()
    return {key: table.points(key) for key in sorted(table.keys())}, table.engines(network)


@given(share=st.floats(0.0, 0.999))
@settings(max_examples=12, deadline=None)
def test_a_kill_costs_less_than_a_point(share: float) -> None:
    """Wherever it strikes: all in all no engine is timed for longer, but for what was not yet written."""
    bursts, points, engines = undisturbed()
    with TemporaryDirectory() as folder:
        there, left = Path(folder) / "first", Path(folder) / "then"
        there.mkdir()
        killed = Device(int(share * bursts), there, left, slower=jagged)
        with LatencyTable.create(there / "t.db", FINGERPRINT) as table, pytest.raises(Killed):
            profiled(bottleneck(), bench_on(table, killed))
        after = Device(slower=jagged)
        with LatencyTable.open(left / "t.db") as table:
            profiled(bottleneck(), bench_on(table, after, seed=7))
            assert content(table) == (points, engines)
        assert [p.name for p in left.iterdir()] == ["t.db"]
    assert 0 <= killed.bursts + after.bursts - bursts < EVERY < BURSTS


def test_bursts_from_before_the_kill_count(tmp_path: Path) -> None:
    """The machine is slower afterwards, the points in flight had been seen at their best."""
    partition = partition_graph(chain([14, 9]), 2)
    piece = partition.pieces[1]
    wanted = [(piece, (3 * k, 2 * k)) for k in range(1, 5)]
    (tmp_path / "a").mkdir()
    with LatencyTable.create(tmp_path / "a" / "t.db", FINGERPRINT) as table:
        with pytest.raises(Killed):
            bench_on(table, Device(90, tmp_path / "a", tmp_path / "b")).pieces(partition, wanted)
        assert len(begun(table)) == 4
    with LatencyTable.open(tmp_path / "b" / "t.db") as table:
        bench_on(table, Device(factor=1.3), seed=3).pieces(partition, wanted)
        found = [table.require(piece.key, at).ms for _, at in wanted]
        truth = [FakeRunner(staircase(8)).ms(model) for model in _models(partition, wanted)]
        assert found == pytest.approx(truth, rel=1e-9)
        other = (piece, (14, 9))
        bench_on(table, Device(factor=1.3), seed=3).pieces(partition, [other])
        (ms,) = (FakeRunner(staircase(8)).ms(model) for model in _models(partition, [other]))
        assert table.require(*(piece.key, other[1])).ms == pytest.approx(1.3 * ms)


def _models(partition: Partition, wanted: Sequence[tuple[Piece, tuple[int, ...]]]) -> list[onnx.ModelProto]:
    return [build_piece(partition, piece, spread_widths(piece, at, partition.dense)) for piece, at in wanted]


def test_passes_over_engines_that_were_done_are_not_done_again(tmp_path: Path) -> None:
    partition = partition_graph(chain([14, 9]), 2)
    plans = [{"conv0": 9 + k, "conv1": 9 - k} for k in range(5)]
    (tmp_path / "a").mkdir()
    with LatencyTable.create(tmp_path / "whole.db", FINGERPRINT) as table:
        whole = Device()
        measure_engines(partition, bench_on(table, whole), plans)
    with LatencyTable.create(tmp_path / "a" / "t.db", FINGERPRINT) as table, pytest.raises(Killed):
        killed = Device(whole.bursts - 3, tmp_path / "a", tmp_path / "b")
        measure_engines(partition, bench_on(table, killed), plans)
    with LatencyTable.open(tmp_path / "b" / "t.db") as table:
        assert "pass 1" in begun(table)[0]
        after = Device()
        found = measure_engines(partition, bench_on(table, after, seed=5), plans, record="net")
        assert after.bursts < EVERY and len(table.engines("net")) == 5
        assert sorted(found) == sorted(m.ms for _, m in table.engines("net"))


CALL = Call(("a", "b"), "a table", 11, 24, 160, 100)
Steps = Sequence[tuple[int, int]]


def sampled(table: LatencyTable, call: Call, ms: float, steps: Steps) -> tuple[Call, list[float]]:
    """What sessions that take ``ms`` and a tenth more report, for steps of (session, repeats)."""
    with kept(table, call, [FakeSession(ms), FakeSession(1.1 * ms)]) as (made, sessions):
        return made, [sessions[k].sample(repeats) for k, repeats in steps]


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    return LatencyTable.create(tmp_path / "t.db", FINGERPRINT)


def test_what_was_reported_is_reported_again(table: LatencyTable) -> None:
    steps = [(0, 1), (1, 1), (1, 2)]
    assert sampled(table, CALL, 1.0, steps) == (CALL, [1.0, 1.1, 1.1])
    later = Call(CALL.names, CALL.within, 99, 48, 320, 7)
    assert sampled(table, later, 2.0, [*steps, (0, 1), (1, 1)]) == (CALL, [1.0, 1.1, 1.1, 2.0, 2.2])
    assert sampled(table, later, 3.0, [*steps, (0, 1), (1, 1), (0, 1)])[1] == [1.0, 1.1, 1.1, 2.0, 2.2, 3.0]
    assert begun(table) == ("a", "b")
    landed(table)
    assert begun(table) == ()
    assert sampled(table, later, 3.0, steps[:1]) == (later, [3.0])


def test_from_another_burst_on_the_rest_is_dropped(table: LatencyTable) -> None:
    sampled(table, CALL, 1.0, [(0, 1), (1, 1), (0, 4)])
    assert sampled(table, CALL, 2.0, [(0, 1), (1, 2), (0, 4)])[1] == [1.0, 2.2, 2.0]
    assert sampled(table, CALL, 3.0, [(0, 1), (1, 2), (0, 4), (0, 4)])[1] == [1.0, 2.2, 2.0, 3.0]


def test_calls_stay_behind_each_other(table: LatencyTable) -> None:
    second = Call(("c", "d"), CALL.within, 12, 24, 160, 100)
    sampled(table, CALL, 1.0, [(0, 1)])
    sampled(table, second, 2.0, [(1, 1)])
    assert begun(table) == ("c", "d")
    assert sampled(table, CALL, 5.0, [(0, 1)]) == (CALL, [1.0])
    assert sampled(table, second, 5.0, [(1, 1), (0, 1)]) == (second, [2.2, 5.0])
    assert sampled(table, CALL, 5.0, [(0, 1), (0, 1)])[1] == [1.0, 5.0]  # more than it had been asked: out of date
    assert begun(table) == ("a", "b")


@pytest.mark.parametrize(
    "other", [Call(("b", "a"), "a table", 11, 24, 160, 100), Call(("a", "b"), "another", 11, 24, 160, 100)]
)
def test_another_call_begins_anew(table: LatencyTable, other: Call) -> None:
    """The order tells sessions apart, and the reference's time tables that had the same name."""
    sampled(table, CALL, 1.0, [(0, 1)])
    assert sampled(table, other, 2.0, [(0, 1)]) == (other, [2.0])


@pytest.mark.parametrize(
    "rubbish",
    [b'[11, 0, 1, 2', b"\0\0\0\0\n", b"[12, 0, 1, 2.5]\n", b"[11, 0]\n", b'{"names": 3}\n', b'{"other": 3}\n', b"7\n"],
)  # fmt: skip
def test_reading_ends_at_a_line_that_is_none(rubbish: bytes, table: LatencyTable, tmp_path: Path) -> None:
    sampled(table, CALL, 1.0, [(0, 1)])
    file = tmp_path / bursts_of("t.db")
    file.write_bytes(file.read_bytes() + rubbish + b"[11, 1, 1, 9.0]\n")
    assert sampled(table, CALL, 2.0, [(0, 1), (1, 1)])[1] == [1.0, 2.2]
    _, *bursts = map(json.loads, file.read_text().splitlines())
    assert bursts == [[11, 0, 1, 1.0], [11, 1, 1, 2.2]]


def test_a_table_made_anew_finds_nothing_of_the_one_before(table: LatencyTable, tmp_path: Path) -> None:
    sampled(table, CALL, 1.0, [(0, 1)])
    table.close()
    (tmp_path / "t.db").unlink()
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as anew:
        assert begun(anew) == () and sampled(anew, CALL, 2.0, [(0, 1)]) == (CALL, [2.0])


def test_forgetting_drops_what_was_in_flight(table: LatencyTable, tmp_path: Path) -> None:
    sampled(table, CALL, 1.0, [(0, 1)])
    assert main(["table", "forget", str(tmp_path / "t.db")]) == 0 and begun(table) == ()


def test_what_fails_is_not_repeated(table: LatencyTable) -> None:
    with pytest.raises(SluiceError), kept(table, CALL, [FakeSession(0.0)]) as (_, (session,)):
        session.sample(1)
        raise SluiceError("its clock is broken")
    assert begun(table) == ()


def without_a_file() -> LatencyTable:
    return LatencyTable.create(":memory:", FINGERPRINT)


def test_where_no_file_can_be_a_call_is_made_all_the_same(table: LatencyTable, tmp_path: Path) -> None:
    (tmp_path / bursts_of("t.db")).mkdir()
    for each in (table, without_a_file()):
        assert sampled(each, CALL, 1.0, [(0, 1)] * 40) == (CALL, [1.0] * 40)
        assert sampled(each, CALL, 2.0, [(0, 1)]) == (CALL, [2.0])
        landed(each)
    assert {p.name for p in tmp_path.iterdir()} == {"t.db", bursts_of("t.db")}


def test_a_session_stays_what_it_is(table: LatencyTable) -> None:
    session: Any = FakeSession(1.0)
    session.ramps = True
    with kept(table, CALL, [session]) as (_, (same,)):
        assert same.clock == session.clock and same.ramps is True and not hasattr(same, "kernels")
