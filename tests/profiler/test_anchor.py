from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sluice.profiler.anchor import KEY, TRIES, make_anchor
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


@pytest.mark.parametrize(("threads", "judges", "tries"), [(1, "bursts", TRIES), (2, "calls", 4 * TRIES)])
def test_the_quiet_time_is_the_lowest_of_several_and_is_kept(threads: int, judges: str, tries: int) -> None:
    """With several threads whole calls hang on it, so a busy machine is given more time to become quiet."""
    rng = np.random.default_rng(0)
    with LatencyTable.create(":memory:", replace(FINGERPRINT, threads=threads)) as table:
        anchor = make_anchor(table, BusyAtFirst(1000 * (tries - 1)), rng)
        assert (anchor.ms, anchor.judges) == (pytest.approx(ANCHOR_MS), judges)
        assert make_anchor(table, BusyAtFirst(10**6), rng).ms == anchor.ms == table.require(KEY, ()).ms
    with LatencyTable.create(":memory:", replace(FINGERPRINT, threads=threads)) as table:
        assert make_anchor(table, BusyAtFirst(1000 * tries + 100), rng).ms > 1.2 * ANCHOR_MS
