from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sluice.profiler.anchor import KEY, TRIES, make_anchor, was_slow
from sluice.profiler.measure import UNCERTAIN, Anchor, Measurement
from sluice.profiler.sweep import Bench
from sluice.profiler.table import LatencyTable
from tests.device import ANCHOR_MS, FINGERPRINT, FakeRunner, FakeSession


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
        anchor = make_anchor(table, BusyAtFirst(1000 * (TRIES - 1)), rng)
        assert anchor.ms == pytest.approx(ANCHOR_MS)
        assert make_anchor(table, BusyAtFirst(10**6), rng).ms == anchor.ms == table.require(KEY, ()).ms
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        assert make_anchor(table, BusyAtFirst(1000 * TRIES + 100), rng).ms > 1.2 * ANCHOR_MS


def test_a_quiet_time_from_a_busy_machine_is_mended_and_what_was_measured_by_it_is_uncertain() -> None:
    rng, runner = np.random.default_rng(0), BusyAtFirst(10**6)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        anchor = make_anchor(table, runner, rng)
        bench = Bench(table, runner, anchor, rng)
        copy = replace(bench, progress=lambda done, total: None)
        before = bench.time([FakeSession(1.0)], ["before"])
        table.put("before", (), before[0])
        table.put_engine("network", {"group": 3}, before[0])
        assert anchor.ms == pytest.approx(1.3 * ANCHOR_MS)
        assert before[0].spread <= UNCERTAIN
        runner.bursts = 0  # the other tenant goes
        after = copy.time([FakeSession(1.0)], ["after"])
        assert [a.ms for a in (anchor, bench.anchor, copy.anchor)] == [pytest.approx(ANCHOR_MS)] * 3
        assert table.require(KEY, ()).ms == anchor.ms
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
        anchor = Anchor(FakeSession(quiet), 1.0)
        assert not was_slow(anchor, took, table)
        assert (anchor.ms, table.require("before", ()).spread) == (pytest.approx(kept), 0.0)
