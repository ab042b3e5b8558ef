"""A measured time: milliseconds, their spread, and whether they are to be relied on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sluice.runtime.base.runner import Clock

__all__ = ["Measurement", "best_of"]

UNCERTAIN = 0.12  # a spread beyond this tells of a figure that is not to be relied on


@dataclass(frozen=True, slots=True)
class Measurement:
    """``ms`` per inference, its relative ``spread`` (rule 3), the number of bursts behind it, and the clock.

    Where the reference stayed far from calm (5), the spread is at least what it was slow by and `UNCERTAIN`.
    """

    ms: float
    spread: float
    samples: int
    clock: Clock

    @property
    def uncertain(self) -> bool:
        return self.spread > UNCERTAIN


def best_of(found: Iterable[Measurement]) -> Measurement:
    """The lowest of those that are certain, since noise only adds, or else of all."""
    return min(found, key=lambda m: (m.uncertain, m.ms))
