"""From the sum of pieces to the whole engine: a linear fit, with its error stated.

    T(engine) = intercept + slope * (sum of pieces - sum of joints) + traffic * (MB of weights)

1. Fitted to whole engines in random configurations by least squares of the *relative* residual, so that small engines
   count as much as large ones. The stated error is left-out: every engine is predicted by a fit that has not seen it.
2. The third term is a cache effect: a piece that is timed alone finds its weights where the last run left them, in
   the whole engine the other layers' weights have been through the cache since. It is kept only if its coefficient
   is positive and it lowers the left-out error, and is then added to the pieces' own tables, so that the
   solver and the training loss know of it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sluice.latency import LatencyModel, Term
from sluice.passes.options import Options
from sluice.passes.sampling import random_configuration
from sluice.profiler import timing_cache
from sluice.profiler.engine import build_engine, with_ranks_in_reach
from sluice.profiler.pieces import Dissection, Piece, spread_widths, weight_bytes
from sluice.profiler.sweep import Bench
from sluice.profiler.variants import Alternatives

__all__ = [
    "calibrate",
    "errors",
    "fit_linear",
    "left_out",
    "measure_engines",
    "missing_plans",
    "model_key",
    "rank_correlation",
]

ENGINES = 14
RESTRUCTURED = 24  # where not only widths vary
FEWEST = 4  # engines that two coefficients can be fitted to with one left out


def model_key(dissection: Dissection, model: LatencyModel) -> str:
    """Identity of a network in the table: its pieces in order, and everything that may be chosen."""
    sites = [f"{n}={s}" for n, s in model.dense.items()]
    text = ";".join([*(p.key for p in dissection.pieces), *sites])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def missing_plans(
    dissection: Dissection,
    model: LatencyModel,
    alternatives: Alternatives,
    known: Sequence[Mapping[str, int]],
    rng: np.random.Generator,
    engines: int | None = None,
) -> list[dict[str, int]]:
    """Plans that make ``known`` up to ``engines`` different ones, the dense one among them, if there are so many."""
    engines = engines or (RESTRUCTURED if model.switches else ENGINES)

    def draw() -> dict[str, int]:
        return with_ranks_in_reach(dissection, model, random_configuration(model, rng), alternatives.options)

    seen = {tuple(sorted(widths.items())) for widths in known}
    plans: list[dict[str, int]] = []
    for plan in itertools.chain([dict(model.dense)], (draw() for _ in range(20 * engines))):
        if len(seen) >= engines:
            break
        if (identity := tuple(sorted(plan.items()))) not in seen:
            seen.add(identity)
            plans.append(plan)
    return plans


def measure_engines(
    dissection: Dissection,
    bench: Bench,
    plans: Sequence[Mapping[str, int]],
    options: Options | None = None,
    *,
    record: str = "",
) -> list[float]:
    """Milliseconds of whole engines, interleaved in small batches; kept in the table under the key ``record``."""
    found: list[float] = []
    for start in range(0, len(plans), 8):
        chunk = plans[start : start + 8]
        engines = [build_engine(dissection, plan, options) for plan in chunk]
        measured = bench.time([bench.session(engine, part=False) for engine in engines])
        for plan, measurement in zip(chunk if record else [], measured if record else [], strict=True):
            bench.table.put_engine(record, plan, measurement)
        found += [m.ms for m in measured]
        bench.progress(start + len(chunk), len(plans))
        timing_cache.keep(bench.runner, bench.table)
    return found


def fit_linear(columns: Sequence[np.ndarray], measured: np.ndarray) -> np.ndarray:
    """Coefficients ``c`` minimising ``sum((sum_k c_k * columns_k / measured - 1)^2)``."""
    design = np.stack([column / measured for column in columns], axis=1)
    return np.asarray(np.linalg.lstsq(design, np.ones(len(measured)), rcond=None)[0])


def left_out(columns: Sequence[np.ndarray], measured: np.ndarray) -> np.ndarray:
    """Every engine as predicted by a fit to all the others."""
    found = np.empty(len(measured))
    for i in range(len(measured)):
        rest = np.arange(len(measured)) != i
        coefficients = fit_linear([c[rest] for c in columns], measured[rest])
        found[i] = sum(k * c[i] for k, c in zip(coefficients, columns, strict=True))
    return found


def errors(promised: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of ``|promised / measured - 1|``, Spearman's rank correlation, number of engines.

    There is no rank correlation where all engines are promised, or take, the same.
    """
    relative = np.abs(promised / measured - 1.0)
    ranked = len(np.unique(promised)) > 1 and len(np.unique(measured)) > 1
    return {
        "median_abs_err": float(np.median(relative)),
        "p95_abs_err": float(np.quantile(relative, 0.95)),
        **({"spearman": rank_correlation(promised, measured)} if ranked else {}),
        "n": float(len(measured)),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing the mean of theirs."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, index, count = np.unique(values, return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(count) - (count - 1) / 2)[index])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def calibrate(
    dissection: Dissection,
    model: LatencyModel,
    bench: Bench,
    alternatives: Alternatives | None = None,
    engines: int | None = None,
) -> LatencyModel:
    """The model with slope, intercept and left-out error; engines that the table knows are not measured again."""
    alternatives = alternatives or Alternatives(Options())
    key = model_key(dissection, model)
    known = bench.table.engines(key)
    plans = missing_plans(dissection, model, alternatives, [widths for widths, _ in known], bench.rng, engines)
    if plans:
        measure_engines(dissection, bench, plans, alternatives.options, record=key)
        known = bench.table.engines(key)
    raw = np.array([model.raw_ms(widths) for widths, _ in known])
    measured = np.array([m.ms for _, m in known])
    one = np.ones(len(raw))
    columns = [raw, one]
    if len(raw) < FEWEST:
        # Nothing can be left out; the plain sum has seen no engine either.
        (slope,) = (float(c) for c in fit_linear([raw], measured))
        error = errors(raw, measured)
        bench.table.put_calibration(key, slope, 0.0, error)
        return model.calibrated(slope, 0.0, error)
    predicted = left_out(columns, measured)
    traffic = _traffic(dissection, model, alternatives)
    megabytes = np.array([sum(t.on(widths) * t.at(widths) for t in traffic.values()) for widths, _ in known])
    with_traffic = left_out([raw, one, megabytes], measured)
    better = float(np.mean(np.abs(with_traffic / measured - 1))) < 0.95 * float(
        np.mean(np.abs(predicted / measured - 1))
    )
    if better and fit_linear([raw, one, megabytes], measured)[2] > 0:
        columns, predicted = [raw, one, megabytes], with_traffic
    slope, intercept, *rest = (float(c) for c in fit_linear(columns, measured))
    if rest:
        terms = [
            replace(t, ms=t.ms + rest[0] / slope * traffic[t.name].ms) if t.name in traffic else t for t in model.terms
        ]
        model = replace(model, terms=tuple(terms))
    error = errors(predicted, measured)
    stated = {**error, "traffic_ms_per_mb": rest[0] if rest else 0.0}
    if bench.table.get_calibration(key) != (slope, intercept, stated):  # a complete table is only read
        bench.table.put_calibration(key, slope, intercept, stated)
    return model.calibrated(slope, intercept, error)


def _traffic(dissection: Dissection, model: LatencyModel, alternatives: Alternatives) -> dict[str, Term]:
    """Megabytes of weights of every piece, on the knots of its term."""
    terms = {term.name: term for term in model.terms}
    own = [(piece.name, piece, dissection) for piece in dissection.pieces]
    own += [(f"{p.name} {s.place.switch}", p, s.dissection) for s in alternatives.shown for p in s.place.pieces]
    return {name: replace(terms[name], ms=_megabytes(piece, cut, terms[name])) for name, piece, cut in own}


def _megabytes(piece: Piece, cut: Dissection, term: Term) -> np.ndarray:
    points = itertools.product(*term.knots)
    found = [weight_bytes(cut, piece, spread_widths(piece, [int(v) for v in p], cut.dense)) for p in points]
    return np.array(found).reshape(term.ms.shape) / 1e6
