"""The latency of a network as a function of its widths, assembled from measured pieces.

For kept widths ``w[g]`` of every axis group ``g`` the promise is

    T(w) = intercept + slope * sum_t  weight_t * ms_t(extent_t1(w), extent_t2(w), ...)        [milliseconds]

1. A *term* t is a piece of the graph (``weight = number of times it occurs``) or a joint, what neighbours save
   when they run together (negative weight).
2. An *extent* is the size of one tensor dimension, affine in the widths: ``const + sum_g coef_g * w_g``
   (several groups where tensors are concatenated, coefficient > 1 after a flatten).
3. ``ms_t`` is known at the points of a rectangular grid (``knots``) and multilinear in between, constant beyond.

Everything here is frozen and needs numpy only: the same value drives the budget of the training loss, the
solver and the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from sluice.errors import SluiceError

__all__ = ["Extent", "LatencyModel", "Term"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A dimension that depends on widths: ``const + sum(coef * width[group])``."""

    coefs: tuple[tuple[str, int], ...]
    const: int = 0

    def at(self, widths: Mapping[str, float]) -> float:
        return self.const + sum(coef * widths[group] for group, coef in self.coefs)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One measured table over the extents it depends on.

    ``knots[k]`` are the increasing values of ``extents[k]`` that were measured; ``ms`` has shape
    ``tuple(len(k) for k in knots)`` (a 0-d array for a piece that depends on no width).
    """

    name: str
    extents: tuple[Extent, ...]
    knots: tuple[np.ndarray, ...]
    ms: np.ndarray
    weight: float = 1.0

    def at(self, widths: Mapping[str, float]) -> float:
        """Milliseconds at the given widths, before ``weight``."""
        value = self.ms
        for extent, knots in zip(self.extents, self.knots, strict=True):
            x = min(max(extent.at(widths), float(knots[0])), float(knots[-1]))
            hi = min(int(np.searchsorted(knots, x, side="left")), len(knots) - 1)
            lo = max(hi - 1, 0)
            t = 0.0 if hi == lo else (x - knots[lo]) / (knots[hi] - knots[lo])
            value = (1.0 - t) * value[lo] + t * value[hi]
        return float(value)


@dataclass(frozen=True, slots=True, eq=False)
class LatencyModel:
    """All terms of one network, the dense widths, and the widths worth offering for every group.

    ``levels[g]`` is increasing and ends with the dense width ``dense[g]``.
    """

    terms: tuple[Term, ...]
    dense: Mapping[str, int]
    levels: Mapping[str, tuple[int, ...]]
    intercept: float = 0.0
    slope: float = 1.0
    error: Mapping[str, float] = field(default_factory=dict)

    def raw_ms(self, widths: Mapping[str, float]) -> float:
        """Sum of pieces minus joints, not calibrated."""
        missing = [g for g in self.dense if g not in widths]
        if missing:
            raise SluiceError(f"no width given for group {missing[0]!r}; give one for each of {sorted(self.dense)}")
        return sum(term.weight * term.at(widths) for term in self.terms)

    def ms(self, widths: Mapping[str, float]) -> float:
        """Promised milliseconds at ``widths``."""
        return self.intercept + self.slope * self.raw_ms(widths)

    def dense_ms(self) -> float:
        return self.ms(self.dense)

    def calibrated(self, slope: float, intercept: float, error: Mapping[str, float]) -> LatencyModel:
        return replace(self, slope=slope, intercept=intercept, error=dict(error))
