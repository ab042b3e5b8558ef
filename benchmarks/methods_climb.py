"""The best of a grid of rates and losses, found as a careful user would: by whole trainings, uphill.

1. Every *variant* (a network that meets the budget) is trained at the rate `START` with the first loss.
2. From the best variant the rate climbs to its neighbours on the grid, until both neighbours are worse.
3. Every other loss is trained at that rate, and where one of them is better, it climbs as well.

Each training takes all epochs, and none of them counts for another. The best of all by the accuracy that is reported
in the end is the result: a choice that flatters whoever is tuned so. Accuracy over rates has one summit in all tables
of trainings that we have, so what the climb leaves out is what a whole grid would not have chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["START", "Setting", "climb"]

START = 1e-2


@dataclass(frozen=True, slots=True)
class Setting:
    variant: str
    rate: float
    loss: str


def climb(
    variants: Sequence[str], rates: Sequence[float], losses: Sequence[str], train: Callable[[Setting], float],
    start: float = START,
) -> dict[Setting, float]:  # fmt: skip
    """Everything that was trained, in its order, with its figure; the largest is the result."""
    found: dict[Setting, float] = {}

    def figure(setting: Setting) -> float:
        if setting not in found:
            found[setting] = train(setting)
        return found[setting]

    def up(setting: Setting) -> Setting:
        while True:
            at = rates.index(setting.rate)
            near = [Setting(setting.variant, rates[k], setting.loss) for k in (at - 1, at + 1) if 0 <= k < len(rates)]
            best = max(near, key=figure, default=setting)
            if not near or figure(best) <= figure(setting):
                return setting
            setting = best

    first = max((Setting(variant, start, losses[0]) for variant in variants), key=figure)
    leader = up(first)
    others = [Setting(leader.variant, leader.rate, loss) for loss in losses if loss != leader.loss]
    if others:
        best = max(others, key=figure)
        if figure(best) > figure(leader):
            up(best)
    return found
