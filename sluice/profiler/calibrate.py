"""From the sum of pieces to the whole engine: a linear fit, with its error stated.

    T(engine) = intercept + slope * (sum of pieces - sum of joints + what is read again) + sum_k gain_k * S_k

with pieces and joints less the calls in them (`sluice.profiler.assemble`, 4).

1. Fitted to whole engines in random configurations (`sluice.profiler.fit`). The stated error is left-out: every engine
   is predicted by a fit that has not seen it.
2. What is read again is weights that the caches do not hold from run to run (`sluice.profiler.reload`).
3. ``S_k`` is what the terms of one kind add up to: joints, pieces of factorised layers, merged runs. Dense pieces are
   measured as they stand in the user's graph, these are made for being measured or measured on coarser grids, and
   what is wrong with one of a kind is wrong with all.
4. A correction (2, 3) is kept only if there is an error to speak of (`EXACT`), it lowers it by a twentieth, and no kind
   is turned upside down. It is then part of the model's terms, so that solver and training loss know of it.
5. Whole engines are timed in turns, as many at once as memory allows: what other tenants do to the caches makes one ten
   seconds differ from the next by up to 5%, which must not tell engines apart. They are timed in passes, until nine in
   ten engines were seen twice near their lowest (`AGREE`) in passes in which the machine was quiet, or there were
   `PASSES`; the figure is each engine's lowest of quiet passes, since noise only ever adds, or else of all. From one
   pass to the next an engine differs by 0.3% on a quiet host (ResNet-20), by 1 to 2.5% on a busy one (MobileNetV2).
6. Where engines of the network are known already, up to `REFERENCES` of them take their turns with the new ones, as
   memory allows, and the new figures are given in the time of the known ones: times the median of ``known / now``. As
   the anchor, but of the network's own kind, which what shares a core slows in a measure of its own. Each of them is
   known to a percent or two, hence many: with six, 40 plans of ResNet-20 took 1.5% longer than promised in the median.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.latency import LatencyModel, Term
from sluice.passes.options import Options
from sluice.passes.sampling import random_configuration
from sluice.profiler.engine import build_engine, with_ranks_in_reach
from sluice.profiler.fit import errors, fit_linear, left_out, mean_error
from sluice.profiler.in_flight import landed
from sluice.profiler.measure import Measurement, best_of
from sluice.profiler.pieces import Dissection
from sluice.profiler.reload import find_reading, left_out_again, megabytes
from sluice.profiler.sweep import BURSTS, Bench
from sluice.profiler.table import encode_widths
from sluice.profiler.variants import Alternatives
from sluice.runtime.runner import Session

__all__ = ["calibrate", "measure_engines", "missing_plans", "model_key"]

ENGINES = 14
RESTRUCTURED = 48  # where not only widths vary
FEWEST = 4  # engines that two coefficients can be fitted to with one left out
AGREE, PASSES = 0.015, 3
REFERENCES = 16
OF_PLANS = 1
AT_ONCE = 2**30  # bytes of ONNX and of `_working_bytes`; a runtime takes two to three times as much
WORTH = 0.95
EXACT = 0.001
STIFFNESS = 0.02 / 0.2  # of a gain
READ, HELD = "reload_ms_per_mb", "held_mb"
KINDS = ("joints", "ranks", "merges")


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
    seed: int,
    engines: int | None = None,
) -> list[dict[str, int]]:
    """Plans that make ``known`` up to ``engines`` different ones, the dense one among them, if there are so many.

    The same after a kill, and for all shards: from ``seed`` on, numbers that nothing else draws.
    """
    rng = np.random.default_rng([seed, OF_PLANS])
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
    known: Sequence[tuple[Mapping[str, int], Measurement]] = (),
    record: str = "",
) -> list[float]:
    """Milliseconds of whole engines (rule 5), in the time of those that are ``known`` (6).

    They are kept in the table under the key ``record``, if there is one.
    """
    if not plans:  # a complete table is only read
        return []
    found: list[Measurement] = []
    working = _working_bytes(dissection)
    network = hashlib.sha256(";".join(p.key for p in dissection.pieces).encode()).hexdigest()[:24]
    known = _spread(known, AT_ONCE // (dissection.model.ByteSize() + working))
    references = [bench.session(build_engine(dissection, plan, options), part=False) for plan, _ in known]
    while len(found) < len(plans):
        sessions: list[Session] = []
        size = 0
        for plan in plans[len(found) :]:
            engine = build_engine(dissection, plan, options)
            size += engine.ByteSize() + working
            if sessions and size > AT_ONCE:
                break
            sessions.append(bench.session(engine, part=False))
        together = [*(plan for plan, _ in known), *plans[len(found) : len(found) + len(sessions)]]
        names = [f"{network} {encode_widths(plan)}" for plan in together]
        now = _passes(bench, [*references, *sessions], names)
        ratios = [there.ms / m.ms for (_, there), m in zip(known, now, strict=False)]
        scale = float(np.median(ratios)) if known else 1.0
        found += [replace(m, ms=scale * m.ms) for m in now[len(known) :]]
        bench.progress(len(found), len(plans))
    if record:
        bench.table.put_engines(record, zip(plans, found, strict=True))
    landed(bench.table)
    return [m.ms for m in found]


def _spread(
    known: Sequence[tuple[Mapping[str, int], Measurement]], most: int
) -> list[tuple[Mapping[str, int], Measurement]]:
    """At most `REFERENCES` of the engines, and ``most``, but `FEWEST`, from the quickest to the slowest."""
    ordered = sorted(known, key=lambda engine: engine[1].ms)
    count = min(REFERENCES, max(FEWEST, most), len(ordered))
    return [ordered[round(k * (len(ordered) - 1) / max(1, count - 1))] for k in range(count)]


def _passes(bench: Bench, sessions: Sequence[Session], names: Sequence[str]) -> list[Measurement]:
    """Rule 5."""
    passes: list[tuple[Measurement, ...]] = []
    agreed = False
    while not agreed and len(passes) < PASSES:
        passes.append(bench.time(sessions, [f"{name} pass {len(passes)}" for name in names], BURSTS))
        quiet = [[m.ms for m in found] for found in passes if not all(m.uncertain for m in found)]
        lowest = np.sort(quiet, axis=0)[:2]
        agreed = len(lowest) > 1 and float(np.quantile(lowest[1] / lowest[0], 0.9)) <= 1.0 + AGREE
    return [best_of(tries) for tries in zip(*passes, strict=True)]


def _working_bytes(dissection: Dissection) -> int:
    """What an engine holds beside its weights at the least: inputs and outputs of one node, where they are largest."""
    shapes = dissection.analysis.shapes
    moving = shapes.keys() - dissection.analysis.tensors.keys()
    tensors = [{*node.input, *node.output} & moving for node in dissection.model.graph.node]
    return 4 * max(sum(math.prod(shapes[name]) for name in names) for names in tensors)


def calibrate(
    dissection: Dissection,
    model: LatencyModel,
    bench: Bench,
    alternatives: Alternatives | None = None,
    engines: int | None = None,
    seed: int = 0,
) -> LatencyModel:
    """The model with slope, intercept and left-out error; engines that the table knows are not measured again."""
    alternatives = alternatives or Alternatives(Options())
    key = model_key(dissection, model)
    known = bench.table.engines(key)
    plans = missing_plans(dissection, model, alternatives, [widths for widths, _ in known], seed, engines)
    if plans:
        measure_engines(dissection, bench, plans, alternatives.options, known=known, record=key)
        known = bench.table.engines(key)
    plans, measured = [widths for widths, _ in known], np.array([m.ms for _, m in known])

    def sums(terms: Sequence[Term]) -> np.ndarray:
        of_these = replace(model, terms=tuple(terms))
        return np.array([of_these.raw_ms(widths) for widths in plans])

    raw = sums(model.terms)
    if len(raw) < FEWEST:
        # Nothing can be left out; the plain sum has seen no engine either.
        call_ms = min(model.intercept, 0.5 * float(measured.min()))
        (slope,) = (float(c) for c in fit_linear([raw], measured - call_ms))
        error = errors(call_ms + raw, measured)
        bench.table.put_calibration(key, slope, call_ms, error)
        return model.calibrated(slope, call_ms, error)
    kinds = {kind: sums(terms) for kind, terms in _by_kind(model, alternatives.options).items()}
    weights = megabytes(dissection, model, alternatives)
    by_piece = _by_piece(model, weights, plans)
    reading = find_reading(*by_piece, raw, measured)
    cold = model if reading is None else reading.applied(model, weights)
    raw_cold = np.array([cold.raw_ms(widths) for widths in plans])

    def fitted(kind: LatencyModel, more: Mapping[str, np.ndarray]) -> _Fit:
        fit = _fitted({"slope": raw if kind is model else raw_cold, "intercept": np.ones(len(raw)), **more}, measured)
        if kind is model:
            return fit
        unseen = left_out_again(*by_piece, raw, measured, list(more.values()), [STIFFNESS for _ in more])
        return replace(fit, predicted=unseen)

    best, of = fitted(model, {}), model
    for kind, more in ((cold, {}), (model, kinds), (cold, kinds)):
        most = WORTH * mean_error(best.predicted, measured)
        if most > EXACT and (kind is not model or more):
            fit = fitted(kind, more)
            if fit.sound() and mean_error(fit.predicted, measured) < most:
                best, of = fit, kind
    terms = tuple(best.corrected(term, alternatives.options) for term in of.terms)
    slope, intercept = best.coefficients["slope"], best.coefficients["intercept"]
    error = errors(best.predicted, measured)
    stated = {**error, **{n: c for n, c in best.coefficients.items() if n in kinds}}
    if reading is not None and of is cold:
        stated |= {READ: slope * reading.ms_per_mb, HELD: reading.held_mb}
    if bench.table.get_calibration(key) != (slope, intercept, stated):  # a complete table is only read
        bench.table.put_calibration(key, slope, intercept, stated)
    return replace(of, terms=terms).calibrated(slope, intercept, error)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """Coefficients by name of their column, and the left-out predictions."""

    coefficients: Mapping[str, float]
    predicted: np.ndarray

    def sound(self) -> bool:
        """Rule 4."""
        known, slope = self.coefficients, self.coefficients["slope"]
        return slope > 0 and all(slope + known[kind] > 0 for kind in KINDS if kind in known)

    def corrected(self, term: Term, options: Options) -> Term:
        """The term with its share of the corrections, in milliseconds before the slope."""
        slope, known = self.coefficients["slope"], self.coefficients
        return replace(term, ms=term.ms * (1.0 + known.get(_kind(term, options), 0.0) / slope))


def _fitted(columns: Mapping[str, np.ndarray], measured: np.ndarray) -> _Fit:
    stiffness = [STIFFNESS if name in KINDS else 0.0 for name in columns]
    values = [float(c) for c in fit_linear(list(columns.values()), measured, stiffness)]
    return _Fit(dict(zip(columns, values, strict=True)), left_out(list(columns.values()), measured, stiffness))


def _kind(term: Term, options: Options) -> str:
    """One of `KINDS`, or nothing for a piece of the dense graph."""
    if term.weight < 0:
        return "joints"
    switch = term.when[0] if term.when else ""
    if switch in options.merges:
        return "merges"
    return "ranks" if any(switch == option.switch for option in options.ranks) else ""


def _by_kind(model: LatencyModel, options: Options) -> dict[str, list[Term]]:
    found = {kind: [term for term in model.terms if _kind(term, options) == kind] for kind in KINDS}
    return {kind: terms for kind, terms in found.items() if terms}


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
