"""The latency of a network as a function of its configuration, assembled from measured pieces.

A configuration ``w`` gives every site a value: a *width* (channels of an axis group, rank of a factorised weight) or a
*switch*, 0 or 1 (this layer dense, this layer factorised in that form, this block dropped, this segment merged). The
promise is

    T(w) = intercept + slope * (sum_t c_t(w) * ms_t + max(0, sum_t c_t(w) * reload_t - cached_ms))         [ms]
    c_t(w) = weight_t * on_t(w),     ms_t, reload_t at (extent_t1(w), extent_t2(w), ...)

1. A *term* t is a piece of the graph (``weight = number of times it occurs``) or a joint, the time that neighbours save
   when they run together (negative weight). ``on_t`` is the sum of the switches under which the term exists, 1 where it
   names none; at most one of these switches is set.
2. An *extent* is the size of one tensor dimension, affine in the widths: ``const + sum_g coef_g * w_g``
   (several groups where tensors are concatenated, coefficient > 1 after a flatten).
3. ``ms_t`` is known at the points of a rectangular grid (``knots``) and multilinear in between, constant beyond.
4. A *rule* is a linear equation between switches, above all "exactly one of these".
5. The ``max(0, ...)`` is the *cache penalty* (`sluice.profiler.fit.cache_reload`). ``reload_t`` is the time to read the
   weights of a piece once the rest of the network has pushed them out of the caches, zero for a joint; ``cached_ms`` is
   the part of these times that the caches save.

6. A point that was not measured is *estimated*, and has a *bound*: of a piece the least milliseconds that it is
   expected to take, of a joint the most that it is expected to save. `LatencyModel.hopeful` takes points at their
   bounds.

Everything here is frozen and needs numpy only: the same value drives the budget of the training loss, the
solver and the report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["Extent", "LatencyModel", "Rule", "Term"]


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

    Attributes:
        knots: ``knots[k]`` are the increasing values of ``extents[k]`` (channels) at which the time is known.
        ms: milliseconds of one occurrence at the knots, as measured and before calibration, shape
            ``tuple(len(k) for k in knots)``; a 0-d array for a piece that depends on no width. A joint holds the
            milliseconds that it saves, and its ``weight`` is negative.
        reload: milliseconds at the same points, and of the same shape, that reading the weights of the piece takes
            (rule 5); None where it is zero.
        bound: the milliseconds that the points take at best (rule 6), of the same shape; None where it is ``ms``.
        measured: whether the points were measured (rule 6), of the same shape; None where all were.
    """

    name: str
    extents: tuple[Extent, ...]
    knots: tuple[np.ndarray, ...]
    ms: np.ndarray
    weight: float = 1.0
    when: tuple[str, ...] = ()
    reload: np.ndarray | None = None
    bound: np.ndarray | None = None
    measured: np.ndarray | None = None

    def on(self, widths: Mapping[str, float]) -> float:
        """Whether the term exists: the sum of its switches, 1 for a term without switches."""
        return sum(widths[s] for s in self.when) if self.when else 1.0

    def at(self, widths: Mapping[str, float]) -> float:
        """Milliseconds at the given widths, before ``weight`` and switches."""
        return self._between_knots(self.ms, widths)

    def reload_at(self, widths: Mapping[str, float]) -> float:
        """Milliseconds of ``reload`` at the given widths, before ``weight`` and switches."""
        return 0.0 if self.reload is None else self._between_knots(self.reload, widths)

    def measured_at(self, widths: Mapping[str, float]) -> bool:
        """Whether the milliseconds at the given widths were measured; between knots they were not."""
        index = []
        for extent, knots in zip(self.extents, self.knots, strict=True):
            place = int(np.searchsorted(knots, extent.at(widths)))
            if place == len(knots) or knots[place] != extent.at(widths):
                return False
            index.append(place)
        return self.measured is None or bool(self.measured[tuple(index)])

    def _between_knots(self, value: np.ndarray, widths: Mapping[str, float]) -> float:
        for extent, knots in zip(self.extents, self.knots, strict=True):
            x = min(max(extent.at(widths), float(knots[0])), float(knots[-1]))
            hi = min(int(np.searchsorted(knots, x, side="left")), len(knots) - 1)
            lo = max(hi - 1, 0)
            t = 0.0 if hi == lo else (x - knots[lo]) / (knots[hi] - knots[lo])
            value = (1.0 - t) * value[lo] + t * value[hi]
        return float(value)


@dataclass(frozen=True, slots=True)
class Rule:
    """``sum(coef * value[switch]) == total`` in every configuration that exists."""

    coefs: tuple[tuple[str, int], ...]
    total: int = 1

    def holds(self, widths: Mapping[str, float]) -> bool:
        return abs(sum(coef * widths[s] for s, coef in self.coefs) - self.total) < 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class LatencyModel:
    """All terms of one network, its dense configuration, and the levels of every site.

    ``levels[g]`` is increasing. For an axis group or a rank it ends with the largest value ``dense[g]``; for a switch
    it is ``(0, 1)``, or the only value that the switch may have.
    """

    terms: tuple[Term, ...]
    dense: Mapping[str, int]
    levels: Mapping[str, tuple[int, ...]]
    intercept: float = 0.0
    slope: float = 1.0
    error: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    switches: frozenset[str] = frozenset()
    cached_ms: float = 0.0

    def raw_ms(self, widths: Mapping[str, float]) -> float:
        """Sum of pieces, minus joints, plus the cache penalty, before calibration."""
        missing = [g for g in self.dense if g not in widths]
        if missing:
            raise SluiceError(f"no width given for group {missing[0]!r}; give one for each of {sorted(self.dense)}")
        found = ((term, term.on(widths)) for term in self.terms)
        return sum(on * term.weight * term.at(widths) for term, on in found if on) + self.reload_ms(widths)

    def reload_ms(self, widths: Mapping[str, float]) -> float:
        """The cache penalty (rule 5) in milliseconds, before calibration."""
        found = ((term, term.on(widths)) for term in self.terms if term.reload is not None)
        return max(0.0, sum(on * term.weight * term.reload_at(widths) for term, on in found if on) - self.cached_ms)

    def ms(self, widths: Mapping[str, float]) -> float:
        """Promised milliseconds at ``widths``."""
        return self.intercept + self.slope * self.raw_ms(widths)

    def dense_ms(self) -> float:
        return self.ms(self.dense)

    def hopeful(self) -> LatencyModel:
        """The same model with every point at its bound (rule 6): no configuration is promised more than it takes."""
        terms = (t if t.bound is None else replace(t, ms=t.bound, bound=None) for t in self.terms)
        return replace(self, terms=tuple(terms))

    def measured_at(self, widths: Mapping[str, float]) -> bool:
        """Whether the promise at ``widths`` follows from measured points alone."""
        return all(term.measured_at(widths) for term in self.terms if term.on(widths))

    def share_estimated(self, widths: Mapping[str, float]) -> float:
        """The part of the milliseconds of pieces at ``widths`` that is estimated, in [0, 1]."""
        found = [(t.weight * t.at(widths), t.measured_at(widths)) for t in self.terms if t.weight > 0 and t.on(widths)]
        return sum(ms for ms, known in found if not known) / (sum(ms for ms, _ in found) or 1.0)

    def pinned(self, sites: Collection[str]) -> LatencyModel:
        """The same model in which these sites stay dense."""
        levels = {site: (self.dense[site],) if site in sites else tuple(v) for site, v in self.levels.items()}
        return replace(self, levels=levels)

    def narrowed(self, places: Mapping[str, Sequence[int]]) -> LatencyModel:
        """The same model with the levels at these places alone, by site."""
        return replace(self, levels={site: tuple(v[k] for k in places[site]) for site, v in self.levels.items()})

    def calibrated(self, slope: float, intercept: float, error: Mapping[str, float]) -> LatencyModel:
        return replace(self, slope=slope, intercept=intercept, error=dict(error))
