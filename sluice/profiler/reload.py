"""What a network reads again: weights that its pieces, timed one by one, find in the caches.

A piece that is timed alone finds its weights where its last run left them. In the whole engine the weights of all other
layers have been through the caches since, and what these cannot hold comes from memory once more:

    again = max(0, sum_k r_k - p C),        r_k = min(p MB_k, ms_k)                                  [milliseconds]

1. ``p`` is what reading a MB takes beyond what a piece takes by itself. That is at most as long again: a piece that
   does little but read weights reads them from afar when it is alone, too.
2. ``C`` is how many MB the caches hold of one run until the next. Up to there nothing is read again.
3. Both follow from whole engines: of a grid, C in shares of the most weights in any of them and p in what a MB of them
   takes in all, that pair counts with which ``T = intercept + slope * (raw + again)`` predicts left-out engines best.

Engines of VGG16-BN on two threads take what their pieces add up to where they have 5 MB of weights, and 15 to 25% more
where they have 30 to 60: docs/measuring.md. Reconstruction; no paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.latency import LatencyModel, Term
from sluice.profiler.fit import left_out, mean_error
from sluice.profiler.pieces import Dissection, Piece, spread_widths, weight_bytes
from sluice.profiler.variants import Alternatives

__all__ = ["Reading", "find_reading", "megabytes"]

SHARES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
PRICES = tuple(2.0 ** (k / 3) for k in range(-15, 4))
FINER = tuple(2.0 ** (k / 12) for k in range(-3, 4))
FEWEST = 4  # engines that read something again


@dataclass(frozen=True, slots=True)
class Reading:
    """``ms_per_mb`` before the calibration's slope (p), and ``held_mb`` (C)."""

    ms_per_mb: float
    held_mb: float

    def applied(self, model: LatencyModel, weights: Mapping[str, np.ndarray]) -> LatencyModel:
        """The model with what is read again; ``weights`` as of `megabytes`."""

        def applied(term: Term) -> Term:
            if term.name not in weights:
                return term
            return replace(term, reload=np.minimum(self.ms_per_mb * weights[term.name], np.maximum(term.ms, 0.0)))

        return replace(model, terms=tuple(map(applied, model.terms)), spared=self.ms_per_mb * self.held_mb)


def megabytes(dissection: Dissection, model: LatencyModel, alternatives: Alternatives) -> dict[str, np.ndarray]:
    """Megabytes of weights by the name of a piece's term, on its knots."""
    terms = {term.name: term for term in model.terms}
    own = [(piece.name, piece, dissection) for piece in dissection.pieces]
    own += [(f"{p.name} {s.place.switch}", p, s.dissection) for s in alternatives.shown for p in s.place.pieces]
    return {name: _megabytes(piece, cut, terms[name]) for name, piece, cut in own}


def find_reading(ms: np.ndarray, weights: np.ndarray, raw: np.ndarray, measured: np.ndarray) -> Reading | None:
    """The pair of rule 3, None where too few engines read anything again.

    Args:
        ms, weights: milliseconds and MB of every piece in every engine, shape ``(engines, pieces)``, 0 where it has
            none of it.
        raw: what pieces and joints add up to, shape ``(engines,)``.
        measured: milliseconds of the engines.
    """
    most = float(weights.sum(1).max(initial=0.0))
    if most == 0.0:
        return None
    unit = float(raw.sum() / weights.sum())
    pairs = [Reading(price * unit, share * most) for price in PRICES for share in SHARES]
    if not (pairs := [pair for pair in pairs if np.count_nonzero(_again(pair, ms, weights)) >= FEWEST]):
        return None

    def missed(pair: Reading) -> float:
        columns = [raw + _again(pair, ms, weights), np.ones(len(raw))]
        return mean_error(left_out(columns, measured), measured)

    best = min(pairs, key=missed)
    return min((replace(best, ms_per_mb=best.ms_per_mb * finer) for finer in FINER), key=missed)


def _again(pair: Reading, ms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, np.minimum(pair.ms_per_mb * weights, ms).sum(1) - pair.ms_per_mb * pair.held_mb)


def _megabytes(piece: Piece, cut: Dissection, term: Term) -> np.ndarray:
    points: Sequence[tuple[float, ...]] = list(itertools.product(*term.knots))
    found = [weight_bytes(cut, piece, spread_widths(piece, [int(v) for v in p], cut.dense)) for p in points]
    return np.array(found).reshape(term.ms.shape) / 1e6
