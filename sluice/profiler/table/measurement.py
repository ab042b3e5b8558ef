"""A measured time: milliseconds, their spread, and whether they are to be relied on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sluice.runtime.base.runner import Clock

__all__ = ["Measurement", "best_of"]

UNCERTAIN = 0.12  # a larger spread tells of a figure that is not to be relied on


@dataclass(frozen=True, slots=True)
class Measurement:
    """``ms`` per inference, its relative ``spread``, the number of bursts behind it, and the clock.

    Spread is rule 3 of `sluice.profiler.timing.measure`. Where the reference engine was slow to the end (rule 5), the
    spread is at least the excess of the reference engine, and at least `UNCERTAIN`.
    """

    ms: float
    spread: float
    samples: int
    clock: Clock

    @property
    def uncertain(self) -> bool:
        return self.spread > UNCERTAIN


def best_of(found: Iterable[Measurement]) -> Measurement:
    """The lowest of the certain measurements, since noise only adds; if none is certain, the lowest of all."""
    return min(found, key=lambda m: (m.uncertain, m.ms))
