from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.profiler.timing.reference_engine import (
    HOST,
    KEY,
    TRIES,
    is_of_another_host,
    make_reference_engine,
    was_slow,
)
from tests.device import FINGERPRINT, REFERENCE_MS, FakeRunner, FakeSession


class BusyAtFirst(FakeRunner):
    """Takes 1.3 times as long for the first ``busy`` bursts of any engine."""

    def __init__(self, busy: int) -> None:
        super().__init__()
        self.bursts = -busy

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        runner, session = self, super().build(model, batch=batch)

        class Busy(FakeSession):
            def sample(self, repeats: int) -> float:
                runner.bursts += 1
                return session.sample(repeats) * (1.3 if runner.bursts <= 0 else 1.0)

        return Busy(0.0)


def test_the_quiet_time_is_the_lowest_of_several_and_is_kept() -> None:
    """All calls hang on it, so a busy machine is given some time to become quiet."""
    rng = np.random.default_rng(0)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        reference = make_reference_engine(table, BusyAtFirst(1000 * (TRIES - 1)), rng)
        assert reference.ms == pytest.approx(REFERENCE_MS)
        assert make_reference_engine(table, BusyAtFirst(10**6), rng).ms == reference.ms == table.require(KEY, ()).ms
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        assert make_reference_engine(table, BusyAtFirst(1000 * TRIES + 100), rng).ms > 1.2 * REFERENCE_MS


def test_a_quiet_time_from_a_busy_machine_is_mended_and_what_was_measured_by_it_is_uncertain() -> None:
    rng, runner = np.random.default_rng(0), BusyAtFirst(10**6)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        reference = make_reference_engine(table, runner, rng)
        bench = Bench(table, runner, reference, rng)
        copy = replace(bench, progress=lambda done, total: None)
        before = bench.time([FakeSession(1.0)])
        table.put("before", (), before[0])
        table.put_engine("network", {"group": 3}, before[0])
        assert reference.ms == pytest.approx(1.3 * REFERENCE_MS)
        assert before[0].spread <= UNCERTAIN
        runner.bursts = 0  # the other tenant goes
        after = copy.time([FakeSession(1.0)])
        assert [a.ms for a in (reference, bench.reference, copy.reference)] == [pytest.approx(REFERENCE_MS)] * 3
        assert table.require(KEY, ()).ms == reference.ms
        assert after[0].spread <= UNCERTAIN
        assert table.require("before", ()).spread > UNCERTAIN
        assert table.engines("network")[0][1].spread > UNCERTAIN
        assert table.forget(UNCERTAIN, but=KEY) == (1, 1)


@pytest.mark.parametrize(
    ("took", "quiet", "kept"), [(0.9, 1.0, 1.0), (0.98, 0.997, 1.0), (0.99, 0.9, 1.0), (0.98, 0.98, 0.98)]
)
def test_a_lucky_call_changes_nothing_and_a_quiet_time_that_was_a_little_off_is_mended(
    took: float, quiet: float, kept: float
) -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        table.put("before", (), Measurement(1.0, 0.0, 9, FINGERPRINT.clock))
        reference = ReferenceEngine(FakeSession(quiet), 1.0)
        assert not was_slow(reference, took, table)
        assert (reference.ms, table.require("before", ()).spread) == (pytest.approx(kept), 0.0)


class Host(FakeRunner):
    """All that it runs takes ``factor`` times as long, the reference as well; ``name`` is what it is known by."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        super().__init__(slower=lambda ms: factor * ms)
        self.name, self.factor, self.references = name, factor, 0

    def host_identity(self) -> frozenset[str]:
        return frozenset(self.name.split())

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        built, host = super().build(model, batch=batch), self

        class Counted(FakeSession):
            def sample(self, repeats: int) -> float:
                host.references += 1
                return self.ms

        return Counted(self.factor * REFERENCE_MS) if model.graph.name == "reference" else built


def begun(path: Path, runner: Host) -> None:
    with LatencyTable.create(path, FINGERPRINT) as table:
        make_reference_engine(table, runner, np.random.default_rng(0))
        table.put("p", (3,), Measurement(2.0, 0.01, 40, "thread_cpu"))


@pytest.mark.parametrize("name", ["machine-a boot-2", "boot-1", ""])
def test_the_same_host_or_an_unknown_one_goes_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    begun(path, Host("machine-a boot-1"))
    before, runner = path.read_bytes(), Host(name, 1.1)
    with LatencyTable.open(path) as table:
        assert not is_of_another_host(table, runner)
        assert make_reference_engine(table, runner, np.random.default_rng(0)).ms == pytest.approx(REFERENCE_MS)
    assert path.read_bytes() == before and runner.references == 0


@pytest.mark.parametrize("factor", [1.0, 1.04, 2.0])
def test_another_host_is_refused_before_it_measures(factor: float, tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    begun(path, Host("machine-a boot-1"))
    before, runner = path.read_bytes(), Host("machine-b boot-2", factor)
    with LatencyTable.open(path) as table:
        assert is_of_another_host(table, runner)
        with pytest.raises(SluiceError, match=r"t\.db was begun on another host.*begin a new table here.*table merge"):
            make_reference_engine(table, runner, np.random.default_rng(0))
    assert path.read_bytes() == before and runner.references == 0


def test_a_table_of_which_no_host_is_known_is_anybodys(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(""))
    with LatencyTable.open(path) as table:
        assert table.get_blob(HOST) == b"[]"
        assert make_reference_engine(table, Host("b"), np.random.default_rng(0)).ms == pytest.approx(REFERENCE_MS)
