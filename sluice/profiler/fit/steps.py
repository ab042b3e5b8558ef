"""Steps between the knots of a thinned grid.

Where its grid would be large, a piece is measured on fewer values of an axis than are known of the group or sum on that
axis. A straight line between two knots is wrong by up to half a step. A curve ``c`` says where the steps are: that of
the piece itself, with its other extents dense, or else the cost of all pieces on the axis. So with ``line_f(v)`` the
line through ``f`` at the two knots around ``v``,

    T(v) = line_T(v) + s * (c(v) - line_c(v)),    s = max(0, T(last) - T(first)) / (c(last) - c(first))

at every position of the other axes.

1. This is exact at the knots, and everywhere where the other axes are dense and the curve is the piece's own.
2. Values become knots of their own as long as the curve misses its line by more than `STEP` of its height, the worst
   first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["with_steps"]

STEP = 0.02


def with_steps(
    knots: Sequence[np.ndarray], ms: np.ndarray, curves: Sequence[Mapping[int, float]]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Knots and times, with the values in between that became knots.

    Args:
        knots: of every axis, increasing.
        ms: milliseconds at them, shape ``(len(knots[0]), ...)``.
        curves: of every axis, milliseconds by the values that may become knots; empty where none is known.
    """
    found = list(knots)
    for axis, (known, curve) in enumerate(zip(knots, curves, strict=True)):
        rise = curve[int(known[-1])] - curve[int(known[0])] if curve else 0.0
        if rise <= 0:
            continue
        found[axis] = _chosen(known, curve)
        times = np.moveaxis(ms, axis, 0)
        scale = np.maximum(times[-1] - times[0], 0.0) / rise
        missed = [curve[int(v)] - float(np.interp(v, known, [curve[int(k)] for k in known])) for v in found[axis]]
        lines = np.stack([_line(v, known, times) + m * scale for v, m in zip(found[axis], missed, strict=True)])
        ms = np.moveaxis(lines, 0, axis)
    return tuple(found), ms


def _chosen(knots: np.ndarray, curve: Mapping[int, float]) -> np.ndarray:
    """The knots, and the values that the curve needs as knots (rule 2)."""
    chosen = {int(k) for k in knots}
    values = [v for v in curve if knots[0] < v < knots[-1]]
    height = max(curve.values()) - min(curve.values())
    while rest := [v for v in values if v not in chosen]:
        at = sorted(chosen)
        lines = np.interp(rest, at, [curve[k] for k in at])
        missed = np.abs([curve[v] for v in rest] - lines)
        worst = int(np.argmax(missed))
        if missed[worst] <= STEP * height:
            break
        chosen.add(rest[worst])
    return np.array(sorted(chosen), dtype=np.float64)


def _line(value: float, knots: np.ndarray, times: np.ndarray) -> np.ndarray:
    high = min(int(np.searchsorted(knots, value)), len(knots) - 1)
    low = max(high - 1, 0)
    share = 0.0 if high == low else (value - knots[low]) / (knots[high] - knots[low])
    return np.asarray((1.0 - share) * times[low] + share * times[high])
