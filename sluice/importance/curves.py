"""The losses of all levels of a site from a few that were measured.

1. At most `LEVELS` values of a site are measured, the rest interpolated; losses do not grow with the value.
2. Where noise hides a loss, a `FLOOR` in proportion to the removed part keeps the solver from removing it for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sluice.core.latency import LatencyModel

__all__ = ["FLOOR", "LEVELS", "curve", "floored"]

LEVELS = 4
FLOOR = 1e-3  # of the median loss of a whole site


def curve(levels: Sequence[int], change: Callable[[int], float], dense: int | None) -> np.ndarray:
    """Losses at all levels from `LEVELS` measured ones, not growing with the level."""
    open_levels = [level for level in levels if level != dense]
    count = min(LEVELS, len(open_levels))
    picked = sorted({open_levels[round(float(k))] for k in np.linspace(0, len(open_levels) - 1, count)})
    values = [change(level) for level in picked]
    if dense is not None:
        picked, values = [*picked, dense], [*values, 0.0]
    falling = np.maximum.accumulate(np.array(values)[::-1])[::-1]
    return np.asarray(np.interp(levels, picked, falling))


def floored(losses: dict[str, np.ndarray], model: LatencyModel) -> dict[str, np.ndarray]:
    """The losses with the floor of rule 2, by site."""
    tops = [float(values.max()) for values in losses.values() if values.max() > 0]
    floor = FLOOR * float(np.median(tops)) if tops else 1.0
    found = {}
    for site, values in losses.items():
        levels = np.asarray(model.levels[site], float)
        removed = levels if site in model.switches else 1.0 - levels / levels[-1]
        found[site] = values + floor * removed
    return found
