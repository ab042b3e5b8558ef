"""Bursts in a row of a session that takes them at once, as one does that is far away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sluice.profiler.timing.burst_log import Call, kept

from sluice.core.errors import LostLine, SluiceError
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.table_file import bursts_of
from sluice.profiler.timing.measure import measure
from sluice.runtime.base.runner import turn
from tests.device import FINGERPRINT, FakeSession

CALL = Call(("far",), "a table", 1, 4, 9, 1.0)


class Far(FakeSession):
    """Its bursts take 1, 2, ... ms; the one numbered ``fails_at`` raises."""

    def __init__(self, fails_at: int | None = None, failure: Exception | None = None) -> None:
        super().__init__(1.0)
        self.fails_at, self.failure, self.taken = fails_at, failure, 0
        self.asked: list[tuple[int, int]] = []

    def sample(self, repeats: int) -> float:
        return self.turn(repeats, 1)[0]

    def turn(self, repeats: int, count: int) -> list[float]:
        self.asked.append((repeats, count))
        if self.failure is not None and self.taken == self.fails_at:
            raise self.failure
        self.taken += count
        return [float(self.taken - count + 1 + k) for k in range(count)]


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    return LatencyTable.create(tmp_path / "t.db", FINGERPRINT)


def test_a_near_session_takes_its_bursts_one_by_one() -> None:
    assert turn(FakeSession(2.0), 3, 4) == [2.0] * 4
    far = Far()
    assert turn(far, 3, 4) == [1.0, 2.0, 3.0, 4.0] and far.asked == [(3, 4)]


def test_a_turn_is_asked_for_at_once() -> None:
    far = Far()
    (found,) = measure([far], min_bursts=8, max_bursts=8, burst_ms=0.1, warmup_ms=0.1, rng=np.random.default_rng(0))
    # Two inferences of a turn are of bursts of one, and the last turn has no more bursts than are left.
    assert found.samples == 8 and far.asked[0] == (1, 1) and set(far.asked[1:]) == {(1, 2)}


@pytest.mark.parametrize("lost", [1, 3, 4])
def test_a_lost_line_loses_no_burst(lost: int, table: LatencyTable) -> None:
    """The next call takes those that were kept, and asks the session for the rest of the turn alone."""
    far = Far(lost, LostLine("gone"))
    with pytest.raises(LostLine), kept(table, CALL, [far]) as (_, (session,)):
        assert [session.sample(2) for _ in range(lost)] == [1.0, 2.0, 3.0, 4.0][:lost]
        session.turn(2, 3)  # type: ignore[attr-defined]
    again = Far()
    with kept(table, CALL, [again]) as (call, (session,)):
        assert call == CALL
        found = session.turn(2, 5)  # type: ignore[attr-defined]
    assert found == [1.0, 2.0, 3.0, 4.0][:lost] + [1.0, 2.0, 3.0, 4.0][: 5 - lost] and again.asked == [(2, 5 - lost)]
    with kept(table, CALL, [Far()]) as (_, (session,)):
        assert session.turn(2, 5) == found  # type: ignore[attr-defined]


def test_a_kept_turn_of_a_near_session(table: LatencyTable) -> None:
    with kept(table, CALL, [FakeSession(2.0)]) as (_, (session,)):
        assert session.turn(3, 4) == [2.0] * 4  # type: ignore[attr-defined]
    with kept(table, CALL, [FakeSession(5.0)]) as (_, (session,)):
        assert session.turn(3, 5) == [2.0] * 4 + [5.0]  # type: ignore[attr-defined]


def test_any_other_fault_still_drops_them(table: LatencyTable) -> None:
    with pytest.raises(SluiceError), kept(table, CALL, [Far(2, SluiceError("wrong"))]) as (_, (session,)):
        session.turn(2, 2)  # type: ignore[attr-defined]
        session.turn(2, 2)  # type: ignore[attr-defined]
    assert Path(bursts_of(table.path)).read_bytes() == b""


def test_a_time_in_a_turn_must_be_one() -> None:
    class Broken(FakeSession):
        def turn(self, repeats: int, count: int) -> list[float]:
            return [1.0, float("nan")][:count]

    with pytest.raises(SluiceError, match="reports nan ms per inference"):
        measure([Broken(1.0)], min_bursts=8, max_bursts=8, rng=np.random.default_rng(0))
