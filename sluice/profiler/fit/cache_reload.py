"""The cache penalty: the time to read weights that no longer fit the caches.

A piece that is timed alone finds its weights where its last run left them. In the whole engine the weights of all other
layers have been through the caches since, and those that the caches cannot hold come from memory again:

    penalty = max(0, sum_k r_k - p C),        r_k = min(p MB_k, ms_k)                                  [milliseconds]

1. ``p`` is the time to read a MB, beyond the time of the piece by itself. A piece at most doubles its time: one that
   does little but read weights reads them from memory when it is alone, too. Weights count as fp32 in all precisions.
2. ``C`` is the number of MB that the caches hold from one run to the next. Up to C the penalty is zero, beyond it is
   linear.
3. Both are fitted to whole engines. C is tried in shares of the largest weights of any engine, p in multiples of the
   engines' time per MB. The pair counts with which ``T = intercept + slope * (raw + penalty)`` fits the engines best;
   of equal pairs the one of the least C. For the stated error, each engine is predicted by a pair that has not seen it.

Engines of VGG16-BN on two threads take the sum of their pieces where they have 5 MB of weights, and 12 to 25% more
where they have 32 to 60: docs/measuring.md. Reconstruction; no paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.latency import LatencyModel, Term
from sluice.profiler.fit.assemble import Layout
from sluice.profiler.fit.least_squares import fit_linear

__all__ = ["CachePenalty", "PenaltyFit", "fit_penalties", "megabytes"]

SHARES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
PRICES = tuple(2.0 ** (k / 12) for k in range(-60, 13))
FEWEST = 4  # engines with a penalty, and engines without


@dataclass(frozen=True, slots=True)
class CachePenalty:
    """``ms_per_mb`` is p, before the slope of the calibration; ``cache_mb`` is C."""

    ms_per_mb: float
    cache_mb: float

    def applied(self, model: LatencyModel, weights: Mapping[str, np.ndarray]) -> LatencyModel:
        """The model with this penalty; ``weights`` as of `megabytes`."""

        def cold(term: Term) -> Term:
            if term.name not in weights:
                return term
            return replace(term, reload=np.minimum(self.ms_per_mb * weights[term.name], np.maximum(term.ms, 0.0)))

        return replace(model, terms=tuple(map(cold, model.terms)), cached_ms=self.ms_per_mb * self.cache_mb)

    def folded(self, model: LatencyModel, weights: Mapping[str, np.ndarray]) -> LatencyModel:
        """The model with this penalty in the milliseconds of its terms; for caches that hold nothing (C = 0)."""

        def slower(term: Term) -> Term:
            if term.name not in weights:
                return term
            more = np.minimum(self.ms_per_mb * weights[term.name], np.maximum(term.ms, 0.0))
            return replace(term, ms=term.ms + more, bound=None if term.bound is None else term.bound + more)

        return replace(model, terms=tuple(map(slower, model.terms)))


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyFit:
    """The penalties that can be fitted (rule 3), by increasing C, and the sums of the engines with each.

    ``raw``, shape ``(engines,)``, are the sums of pieces and joints alone, in milliseconds; ``sums``, shape
    ``(pairs, engines)``, are the same with the penalty of each pair.
    """

    pairs: tuple[CachePenalty, ...]
    raw: np.ndarray
    sums: np.ndarray

    def best(self, measured: np.ndarray) -> CachePenalty | None:
        """The pair of rule 3, None where too few engines have a penalty."""
        best = _best(self.sums, measured)
        return None if best is None else self.pairs[best]

    def left_out(
        self, measured: np.ndarray, more: Sequence[np.ndarray] = (), stiffness: Sequence[float] = ()
    ) -> np.ndarray:
        """Every engine as predicted by the pair and the fit, with ``more`` columns, of all other engines."""
        found = np.empty(len(measured))
        for i in range(len(measured)):
            rest = np.arange(len(measured)) != i
            best = _best(self.sums[:, rest], measured[rest])
            own = self.raw if best is None else self.sums[best]
            design = [own, np.ones(len(measured)), *more]
            fitted = fit_linear([c[rest] for c in design], measured[rest], [0.0, 0.0, *stiffness])
            found[i] = sum(k * c[i] for k, c in zip(fitted, design, strict=True))
        return found


def fit_penalties(ms: np.ndarray, weights: np.ndarray, raw: np.ndarray) -> PenaltyFit:
    """The penalties to choose from, for engines whose pieces take ``ms`` and have ``weights`` MB.

    Both have shape ``(engines, pieces)``, and 0 where an engine lacks the piece; ``raw`` has shape ``(engines,)``.
    """
    pairs: list[CachePenalty] = []
    sums: list[np.ndarray] = []
    most, unit = float(weights.sum(1).max(initial=0.0)), float(raw.sum() / max(weights.sum(), 1e-12))
    for share, price in itertools.product(SHARES, PRICES):
        pair = CachePenalty(price * unit, share * most)
        again = np.minimum(pair.ms_per_mb * weights, ms).sum(1) - pair.ms_per_mb * pair.cache_mb
        held = np.count_nonzero(again <= 0.0)
        if len(raw) - held >= FEWEST and (share == 0.0 or held >= FEWEST):
            pairs.append(pair)
            sums.append(raw + np.maximum(0.0, again))
    return PenaltyFit(tuple(pairs), raw, np.array(sums).reshape(len(pairs), len(raw)))


def megabytes(layout: Layout, model: LatencyModel) -> dict[str, np.ndarray]:
    """Megabytes of weights by the name of a piece's term, on its knots, four bytes per element."""
    terms = {term.name: term for term in model.terms}
    found = {}
    for slot in layout.slots:
        if slot.work is not None:
            term = terms[slot.name]
            grid = list(itertools.product(*term.knots))
            points = np.array(grid, dtype=np.float64).reshape(len(grid), len(term.knots))
            found[slot.name] = (4e-6 * slot.work.weights_at(points)).reshape(np.shape(term.ms))
    return found


def _best(sums: np.ndarray, measured: np.ndarray) -> int | None:
    """The index of the pair with the least squares of the relative residual; all pairs are fitted at once."""
    a, b = sums / measured, 1.0 / measured
    aa, ab, bb, at, bt = (a * a).sum(1), a @ b, b @ b, a.sum(1), b.sum()
    scale = np.maximum(aa * bb - ab * ab, 1e-300)
    slope, intercept = (at * bb - bt * ab) / scale, (aa * bt - ab * at) / scale
    missed = ((slope[:, None] * a + intercept[:, None] * b - 1.0) ** 2).sum(1)
    missed[slope <= 0.0] = np.inf
    if not np.isfinite(missed).any():
        return None
    return int(np.argmax(missed <= missed.min() * (1.0 + 1e-6) + 1e-15))
