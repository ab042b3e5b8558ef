"""The calibration, from the sum of pieces to the whole engine: a linear fit, with its error stated.

    T(engine) = intercept + slope * (sum of pieces - sum of joints + cache penalty) + sum_k gain_k * S_k

with pieces and joints net of calls (`sluice.profiler.fit.assemble`, 4).

1. The fit (`sluice.profiler.fit.least_squares`) is to the whole engines that the table knows: the dense one, those that
   were chosen and built, and random ones in a complete table. The stated error is left out: every engine is predicted
   by a fit that has not seen it.
2. The cache penalty is the time to read weights that no longer fit the caches (`sluice.profiler.fit.cache_reload`).
3. ``S_k`` is the sum of the terms of one kind: joints, pieces of factorised layers, merged runs. Dense pieces are
   measured as they stand in the user's graph. Pieces of the other kinds are made for being measured, and their error is
   common to the kind.
4. A correction (2, 3) is kept only if there are `MANY` engines, the error without it is large enough to matter
   (`EXACT`), the correction lowers it by a twentieth, and no kind changes its sign. It is then part of the model's
   terms, so solver and training loss know of it.
5. Of fewer engines, slope and intercept are fitted, to engines known to `NOISE`, with an intercept that is a call give
   or take `BEND`. So one engine gives a slope, and two far from each other a line through both. Pieces are measured as
   they stand in the network, so a slope far from one has a cause: where engines take longer than their pieces, it is
   weights that do not stay in the innermost cache, as they do for a piece alone. So of all prices of a MB of weights
   the one counts with which the line fits best, its slope being one give or take `LEAN` per engine. A small vision
   transformer took 11% longer than its pieces, and plans of half its time 4%: by the slope alone they were promised 7%
   too high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.latency import LatencyModel, Term
from sluice.profiler.fit.assemble import Layout
from sluice.profiler.fit.cache_reload import CachePenalty, fit_penalties, megabytes
from sluice.profiler.fit.least_squares import errors, fit_linear, left_out, mean_error
from sluice.profiler.pieces.engine import model_key
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import EditSpace

__all__ = ["calibrate"]

MANY = 8  # engines from which corrections are fitted
NOISE = 0.01  # of an engine, and of what it would be by a straight line
BEND = 0.05  # of the quickest engine: so far the intercept may be from a call
LEAN = 0.02  # so far the slope may be from one without a cause, for every engine that shows it
PRICES = (0.0, *(0.4 * 2.0 ** (-k / 8) for k in range(56, -1, -1)))  # of the most weights, of the slowest engine's time
WORTH = 0.95
EXACT = 0.001
STIFFNESS = 0.02 / 0.2  # of a gain
READ, HELD = "reload_ms_per_mb", "cache_mb"
KINDS = ("joints", "ranks", "merges")


def calibrate(model: LatencyModel, layout: Layout, table: LatencyTable) -> LatencyModel:
    """The model with slope, intercept and left-out error, by the engines that the table knows; unchanged without any.

    Beside the error, the model's ``error`` holds the gains of the kinds and the cache penalty, where there are any.
    """
    key = model_key(layout.partition, layout.dense)
    known = [(widths, m) for widths, m in table.engines(key) if widths.keys() == layout.dense.keys()]
    if not known:
        return model
    whole = _Engines([widths for widths, _ in known], np.array([m.ms for _, m in known]))
    raw, measured = whole.sums(model), whole.measured
    if len(raw) < MANY:
        return _by_few(model, megabytes(layout, model), whole)
    options = layout.alternatives.options
    kinds = {kind: whole.sums(own) for kind, own in _by_kind(model, options).items()}
    best, reading = _fitted({"slope": raw, "intercept": np.ones(len(raw))}, measured), None
    if WORTH * mean_error(best.predicted, measured) > EXACT:
        weights = megabytes(layout, model)
        best, reading = _with_corrections(best, model, weights, kinds, whole)
        model = model if reading is None else reading.applied(model, weights)
    terms = tuple(best.corrected(term, options) for term in model.terms)
    slope, intercept = best.coefficients["slope"], best.coefficients["intercept"]
    error = errors(best.predicted, measured)
    stated = {**error, **{n: c for n, c in best.coefficients.items() if n in kinds}}
    if reading is not None:
        stated |= {READ: slope * reading.ms_per_mb, HELD: reading.cache_mb}
    return replace(model, terms=terms).calibrated(slope, intercept, stated)


def _by_few(model: LatencyModel, weights: Mapping[str, np.ndarray], engines: _Engines) -> LatencyModel:
    """Rule 5."""
    measured, call_ms = engines.measured, min(model.intercept, 0.5 * float(engines.measured.min()))
    ms, mb = _by_piece(model, weights, engines.plans)
    prices = np.array(PRICES) * float(measured.max()) / max(float(mb.sum(1).max()), 1e-12)
    raw = engines.sums(model)
    sums = [raw + np.minimum(price * mb, ms).sum(1) for price in prices]

    def fit(own: np.ndarray) -> tuple[int, float, float]:
        """The price, the slope and the intercept by these engines."""
        best = int(np.argmin([_line(one[own], measured[own], call_ms, LEAN * len(own))[2] for one in sums]))
        slope, intercept, _ = _line(sums[best][own], measured[own], call_ms)
        return best, slope, intercept

    everyone = np.arange(len(measured))
    best, slope, intercept = fit(everyone)
    # The plain sum has seen no engine, so its own error may be stated where too few are left for a fit.
    unseen = call_ms + raw
    if len(measured) > 2:
        for i in everyone:
            price, *line = fit(everyone[everyone != i])
            unseen[i] = line[0] * sums[price][i] + line[1]
    stated = errors(unseen, measured)
    if best:
        model = CachePenalty(float(prices[best]), 0.0).folded(model, weights)
        stated |= {READ: slope * float(prices[best]), HELD: 0.0}
    return model.calibrated(slope, intercept, stated)


def _line(raw: np.ndarray, measured: np.ndarray, call_ms: float, lean: float = np.inf) -> tuple[float, float, float]:
    """Slope and intercept through few engines, and what they miss; the slope is one give or take ``lean``."""
    bend = BEND * float(measured.min())
    design = np.array([[*(raw / measured / NOISE), 0.0, 1.0 / lean], [*(1.0 / measured / NOISE), 1.0 / bend, 0.0]]).T
    target = np.array([*((measured - call_ms) / measured / NOISE), 0.0, 1.0 / lean])
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    missed = float(np.square(design @ found - target).sum())
    return float(found[0]), call_ms + float(found[1]), missed


@dataclass(frozen=True, slots=True, eq=False)
class _Engines:
    """Configurations and milliseconds of whole engines."""

    plans: Sequence[Mapping[str, int]]
    measured: np.ndarray

    def sums(self, model: LatencyModel) -> np.ndarray:
        """The sum of the model's terms for every engine, milliseconds, shape ``(engines,)``."""
        return np.array([model.raw_ms(widths) for widths in self.plans])


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """Coefficients by name of their column, and the left-out predictions."""

    coefficients: Mapping[str, float]
    predicted: np.ndarray

    def sound(self) -> bool:
        """Rule 4."""
        known, slope = self.coefficients, self.coefficients["slope"]
        return slope > 0 and all(slope + known[kind] > 0 for kind in KINDS if kind in known)

    def corrected(self, term: Term, options: EditSpace) -> Term:
        """The term with its share of the corrections, in milliseconds before the slope."""
        factor = 1.0 + self.coefficients.get(_kind(term, options), 0.0) / self.coefficients["slope"]
        return replace(term, ms=term.ms * factor, bound=None if term.bound is None else term.bound * factor)


def _fitted(columns: Mapping[str, np.ndarray], measured: np.ndarray, predicted: np.ndarray | None = None) -> _Fit:
    """The fit to all engines; ``predicted``, if a penalty was fitted too, are the left-out predictions of both."""
    design, stiffness = list(columns.values()), [STIFFNESS if name in KINDS else 0.0 for name in columns]
    values = [float(c) for c in fit_linear(design, measured, stiffness)]
    unseen = left_out(design, measured, stiffness) if predicted is None else predicted
    return _Fit(dict(zip(columns, values, strict=True)), unseen)


def _with_corrections(
    plain: _Fit,
    model: LatencyModel,
    weights: Mapping[str, np.ndarray],
    kinds: Mapping[str, np.ndarray],
    engines: _Engines,
) -> tuple[_Fit, CachePenalty | None]:
    """The fit with the corrections that rule 4 keeps, and the cache penalty if it is one of them."""
    raw, measured = engines.sums(model), engines.measured
    again = fit_penalties(*_by_piece(model, weights, engines.plans), raw)
    found = again.best(measured)
    best, kept = plain, None
    for own, more in ((found, {}), (None, kinds), (found, kinds)):
        most = WORTH * mean_error(best.predicted, measured)
        if most <= EXACT or (own is None and not more):
            continue
        columns, unseen = {"slope": raw, "intercept": np.ones(len(raw)), **more}, None
        if own is not None:
            columns["slope"] = engines.sums(own.applied(model, weights))
            unseen = again.left_out(measured, list(more.values()), [STIFFNESS for _ in more])
        fit = _fitted(columns, measured, unseen)
        if fit.sound() and mean_error(fit.predicted, measured) < most:
            best, kept = fit, own
    return best, kept


def _kind(term: Term, options: EditSpace) -> str:
    """One of `KINDS`, or nothing for a piece of the dense graph."""
    if term.weight < 0:
        return "joints"
    switch = term.when[0] if term.when else ""
    if switch in options.merges:
        return "merges"
    return "ranks" if any(switch == option.switch for option in options.ranks) else ""


def _by_kind(model: LatencyModel, options: EditSpace) -> dict[str, LatencyModel]:
    """For every kind that has terms, the model with these terms alone."""
    found = {kind: tuple(term for term in model.terms if _kind(term, options) == kind) for kind in KINDS}
    return {kind: replace(model, terms=terms) for kind, terms in found.items() if terms}


def _by_piece(
    model: LatencyModel, weights: Mapping[str, np.ndarray], plans: Sequence[Mapping[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds and MB of every piece in every engine."""
    pieces = [(term, replace(term, ms=weights[term.name])) for term in model.terms if term.name in weights]
    ms, mb = np.zeros((len(plans), len(pieces))), np.zeros((len(plans), len(pieces)))
    for row, widths in enumerate(plans):
        for k, (term, heavy) in enumerate(pieces):
            if count := term.on(widths) * term.weight:
                ms[row, k], mb[row, k] = count * max(0.0, term.at(widths)), count * heavy.at(widths)
    return ms, mb
