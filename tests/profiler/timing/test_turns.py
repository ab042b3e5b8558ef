"""Bursts in a row of a session that takes them at once, as one does that is far away."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.core.errors import LostLine, SluiceError
from sluice.profiler.timing.measure import measure
from sluice.runtime.base.runner import turn
from tests.device import FakeSession


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
        if self.failure is not None and self.fails_at is not None and self.taken >= self.fails_at:
            raise self.failure
        self.taken += count
        return [float(self.taken - count + 1 + k) for k in range(count)]


def test_a_near_session_takes_its_bursts_one_by_one() -> None:
    assert turn(FakeSession(2.0), 3, 4) == [2.0] * 4
    far = Far()
    assert turn(far, 3, 4) == [1.0, 2.0, 3.0, 4.0] and far.asked == [(3, 4)]


def test_a_turn_is_asked_for_at_once() -> None:
    far = Far()
    (found,) = measure([far], min_bursts=8, max_bursts=8, burst_ms=0.1, warmup_ms=0.1, rng=np.random.default_rng(0))
    # Two inferences of a turn are of bursts of one, and the last turn has no more bursts than are left.
    assert found.samples == 8 and far.asked[0] == (1, 1) and set(far.asked[1:]) == {(1, 2)}


def test_a_lost_line_ends_the_call() -> None:
    """A figure of half the turns would be none; the call is made again as a whole."""
    with pytest.raises(LostLine):
        measure(
            [FakeSession(1.0), Far(9, LostLine("gone"))], min_bursts=40, max_bursts=40, rng=np.random.default_rng(0)
        )


def test_a_time_in_a_turn_must_be_one() -> None:
    class Broken(FakeSession):
        def turn(self, repeats: int, count: int) -> list[float]:
            return [1.0, float("nan")][:count]

    with pytest.raises(SluiceError, match="reports nan ms per inference"):
        measure([Broken(1.0)], min_bursts=8, max_bursts=8, rng=np.random.default_rng(0))
