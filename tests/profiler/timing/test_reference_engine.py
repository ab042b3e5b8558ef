from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing import reference_engine as anchor_module
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.profiler.timing.reference_engine import HOST, KEY, MAX_RATIO, TRIES, make_reference_engine, was_slow
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
        super().__init__(slower=lambda ms: factor * ms)
        self.factor, self.references = factor, 0
        monkeypatch.setattr(anchor_module, "host_identity", lambda: frozenset(name.split()))

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
        table.put("j", (), Measurement(-0.5, 0.02, 40, "thread_cpu"))
        table.put_engine("net", {"g": 5}, Measurement(7.0, 0.01, 40, "thread_cpu"))
        table.put_calibration("net", 0.9, 0.125, {"n": 2.0, "reload_ms_per_mb": 0.5})


def content(path: Path) -> tuple[Any, ...]:
    with LatencyTable.open(path) as table:
        times = [table.require(*point).ms for point in ((KEY, ()), ("p", (3,)), ("j", ()))]
        return [*times, table.engines("net")[0][1].ms], table.get_calibration("net"), table.get_blob(HOST)


@pytest.mark.parametrize("factor", [0.9, 1.04, 1.1])
def test_a_table_that_another_host_goes_on_with_is_in_its_time(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "machine-a boot-1", 1.0))
    for _ in range(2):  # the second time it is that host's
        with LatencyTable.open(path) as table:
            runner = Host(monkeypatch, "machine-b boot-2", factor)
            assert make_reference_engine(table, runner, np.random.default_rng(0)).ms == pytest.approx(
                factor * REFERENCE_MS
            )
        times, fit, _ = content(path)
        assert times == pytest.approx([factor * ms for ms in (REFERENCE_MS, 2.0, -0.5, 7.0)])
        assert fit == (0.9, pytest.approx(factor * 0.125), {"n": 2.0, "reload_ms_per_mb": pytest.approx(factor * 0.5)})
    assert runner.references == 0


@pytest.mark.parametrize("name", ["machine-a boot-2", "boot-1", ""])
def test_the_same_host_or_an_unknown_one_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "machine-a boot-1", 1.0))
    before = path.read_bytes()
    runner = Host(monkeypatch, name, 1.1)
    with LatencyTable.open(path) as table:
        assert make_reference_engine(table, runner, np.random.default_rng(0)).ms == pytest.approx(REFERENCE_MS)
    assert path.read_bytes() == before and runner.references == 0


def test_another_host_of_equal_speed_takes_a_table_as_it_is_and_one_of_another_kind_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "a", 1.0))
    before = content(path)
    with LatencyTable.open(path) as table:
        make_reference_engine(table, Host(monkeypatch, "b", 1.004), np.random.default_rng(0))
    assert content(path)[:2] == before[:2] and content(path)[2] != before[2]
    before_bytes = path.read_bytes()
    for factor in (1.01 * MAX_RATIO, 0.99 / MAX_RATIO):
        with LatencyTable.open(path) as table, pytest.raises(SluiceError, match="begin a new table here"):
            make_reference_engine(table, Host(monkeypatch, "c", factor), np.random.default_rng(0))
    assert path.read_bytes() == before_bytes


def test_a_table_that_cannot_be_written_stays_in_the_time_of_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "a", 1.0))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with LatencyTable.open(path) as table:
        assert make_reference_engine(table, Host(monkeypatch, "b", 1.1), np.random.default_rng(0)).ms == pytest.approx(
            REFERENCE_MS
        )


def test_of_two_processes_that_take_a_table_over_one_multiplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "a", 1.0))
    runner = Host(monkeypatch, "b", 1.1)
    quiet = anchor_module._quiet

    def other_first(*given: Any) -> Measurement:
        monkeypatch.setattr(anchor_module, "_quiet", quiet)
        with LatencyTable.open(path) as table:
            assert make_reference_engine(table, runner, np.random.default_rng(0)).moved == pytest.approx(1.1)
        return quiet(*given)

    monkeypatch.setattr(anchor_module, "_quiet", other_first)
    with LatencyTable.open(path) as table:
        reference = make_reference_engine(table, runner, np.random.default_rng(0))
    assert (reference.ms, reference.moved) == (pytest.approx(1.1 * REFERENCE_MS), 1.0)
    assert content(path)[0] == pytest.approx([1.1 * ms for ms in (REFERENCE_MS, 2.0, -0.5, 7.0)])


@pytest.mark.parametrize("busy", [1.025, 1.1])
def test_a_takeover_on_a_busy_host_is_put_right_by_the_first_call(
    busy: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    begun(path, Host(monkeypatch, "a", 1.0))
    with LatencyTable.open(path) as table:
        runner = Host(monkeypatch, "b", busy)
        reference = make_reference_engine(table, runner, np.random.default_rng(0))
        assert reference.moved == pytest.approx(busy)
        reference.session = FakeSession(REFERENCE_MS)  # the other tenant goes
        bench = Bench(table, runner, reference, np.random.default_rng(0))
        (found,) = bench.time([FakeSession(1.0)])
        assert (found.uncertain, reference.moved) == (False, pytest.approx(1.0))
        assert table.require("p", (3,)).spread == 0.01
        reference.session = FakeSession(0.9 * REFERENCE_MS)  # once something was measured, all is in doubt
        bench.time([FakeSession(1.0)])
        assert table.require("p", (3,)).uncertain and table.require("p", (3,)).ms == pytest.approx(2.0)
    assert content(path)[0][1:] == pytest.approx([2.0, -0.5, 7.0])
