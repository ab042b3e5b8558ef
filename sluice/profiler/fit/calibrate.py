"""The calibration, from the sum of pieces to the whole engine: a linear fit, with its error stated.

    T(engine) = intercept + slope * (sum of pieces - sum of joints + cache penalty) + sum_k gain_k * S_k

with pieces and joints net of calls (`sluice.profiler.fit.assemble`, 4).

1. The fit (`sluice.profiler.fit.least_squares`) is to whole engines in random configurations
   (`sluice.profiler.sweep.engine_times`). The stated error is left out: every engine is predicted by a fit that has not
   seen it.
2. The cache penalty is the time to read weights that no longer fit the caches (`sluice.profiler.fit.cache_reload`).
3. ``S_k`` is the sum of the terms of one kind: joints, pieces of factorised layers, merged runs. Dense pieces are
   measured as they stand in the user's graph. Pieces of the other kinds are made for being measured, or measured on
   coarser grids, and their error is common to the kind.
4. A correction (2, 3) is kept only if the error without it is large enough to matter (`EXACT`), the correction lowers
   it by a twentieth, and no kind changes its sign. It is then part of the model's terms, so solver and training loss
   know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.latency import LatencyModel, Term
from sluice.profiler.fit.cache_reload import CachePenalty, fit_penalties, megabytes
from sluice.profiler.fit.least_squares import errors, fit_linear, left_out, mean_error
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.pieces.variants import Alternatives
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import measure_engines, missing_plans, model_key
from sluice.solver.options import EditSpace

__all__ = ["calibrate"]

FEWEST = 4  # engines that two coefficients can be fitted to with one left out
WORTH = 0.95
EXACT = 0.001
STIFFNESS = 0.02 / 0.2  # of a gain
READ, HELD = "reload_ms_per_mb", "cache_mb"
KINDS = ("joints", "ranks", "merges")


def calibrate(
    partition: Partition,
    model: LatencyModel,
    bench: Bench,
    alternatives: Alternatives | None = None,
    engines: int | None = None,
    seed: int = 0,
) -> LatencyModel:
    """The model with slope, intercept and left-out error; engines that the table knows are not measured again."""
    alternatives = alternatives or Alternatives(EditSpace())
    key = model_key(partition, model)
    known = bench.table.engines(key)
    plans = missing_plans(partition, model, alternatives, [widths for widths, _ in known], seed, engines)
    if plans:
        measure_engines(partition, bench, plans, alternatives.options, known=known, record=key)
        known = bench.table.engines(key)
    whole = _Engines([widths for widths, _ in known], np.array([m.ms for _, m in known]))
    raw, measured = whole.sums(model), whole.measured
    if len(raw) < FEWEST:
        # Too few engines to leave one out. The plain sum has seen no engine, so its own error may be stated.
        call_ms = min(model.intercept, 0.5 * float(measured.min()))
        (slope,) = (float(c) for c in fit_linear([raw], measured - call_ms))
        error = errors(call_ms + raw, measured)
        bench.table.put_calibration(key, slope, call_ms, error)
        return model.calibrated(slope, call_ms, error)
    kinds = {kind: whole.sums(own) for kind, own in _by_kind(model, alternatives.options).items()}
    best, reading = _fitted({"slope": raw, "intercept": np.ones(len(raw))}, measured), None
    if WORTH * mean_error(best.predicted, measured) > EXACT:
        weights = megabytes(partition, model, alternatives)
        best, reading = _with_corrections(best, model, weights, kinds, whole)
        model = model if reading is None else reading.applied(model, weights)
    terms = tuple(best.corrected(term, alternatives.options) for term in model.terms)
    slope, intercept = best.coefficients["slope"], best.coefficients["intercept"]
    error = errors(best.predicted, measured)
    stated = {**error, **{n: c for n, c in best.coefficients.items() if n in kinds}}
    if reading is not None:
        stated |= {READ: slope * reading.ms_per_mb, HELD: reading.cache_mb}
    if bench.table.get_calibration(key) != (slope, intercept, stated):  # a complete table is only read
        bench.table.put_calibration(key, slope, intercept, stated)
    return replace(model, terms=terms).calibrated(slope, intercept, error)


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
        slope, known = self.coefficients["slope"], self.coefficients
        return replace(term, ms=term.ms * (1.0 + known.get(_kind(term, options), 0.0) / slope))


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
