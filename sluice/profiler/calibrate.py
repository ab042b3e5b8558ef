"""From the sum of pieces to the whole engine: an affine fit, with its error stated.

    T(engine) = intercept + slope * (sum of pieces - sum of joints)

fitted to whole engines at random widths by least squares of the *relative* residual, so that small engines count as
much as large ones. The stated error is left-out: every engine is predicted by a fit that has not seen it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from sluice.latency import LatencyModel
from sluice.passes.rewrite_onnx import cut_graph
from sluice.profiler.pieces import Dissection
from sluice.profiler.sweep import Bench

__all__ = ["calibrate", "errors", "fit_affine", "measure_engines", "model_key", "random_widths"]

ENGINES = 14


def model_key(dissection: Dissection) -> str:
    """Identity of a network in the table: its pieces in order and its groups."""
    text = ";".join([*(p.key for p in dissection.pieces), *(f"{n}={s}" for n, s in dissection.dense.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def random_widths(model: LatencyModel, rng: np.random.Generator) -> dict[str, int]:
    """A random plan: a common tendency per plan, so that slim and wide networks occur, and a level per group."""
    tendency = rng.uniform(0.25, 1.0)
    widths = {}
    for group, levels in model.levels.items():
        position = np.clip(tendency + rng.uniform(-0.5, 0.5), 0.0, 1.0)
        widths[group] = int(levels[min(int(position * len(levels)), len(levels) - 1)])
    return widths


def measure_engines(
    dissection: Dissection, bench: Bench, plans: Sequence[Mapping[str, int]], *, record: bool = True
) -> list[float]:
    """Milliseconds of whole engines, interleaved in small batches; recorded in the table for calibration."""
    found: list[float] = []
    for start in range(0, len(plans), 8):
        chunk = plans[start : start + 8]
        engines = [cut_graph(dissection.model, dissection.analysis, dissection.masks(plan)) for plan in chunk]
        measured = bench.time([bench.runner.build(engine) for engine in engines])
        key = model_key(dissection)
        for plan, measurement in zip(chunk if record else [], measured if record else [], strict=True):
            bench.table.put_engine(key, plan, measurement)
        found += [m.ms for m in measured]
        bench.progress(start + len(chunk), len(plans))
    return found


def fit_affine(raw: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) minimising ``sum(((slope*raw + intercept) / measured - 1)^2)``."""
    design = np.stack([raw / measured, 1.0 / measured], axis=1)
    slope, intercept = np.linalg.lstsq(design, np.ones(len(raw)), rcond=None)[0]
    return float(slope), float(intercept)


def errors(promised: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of ``|promised / measured - 1|``, Spearman's rank correlation, number of engines."""
    from scipy.stats import spearmanr

    relative = np.abs(promised / measured - 1.0)
    return {
        "median_abs_err": float(np.median(relative)),
        "p95_abs_err": float(np.quantile(relative, 0.95)),
        "spearman": float(spearmanr(promised, measured).statistic),
        "n": float(len(measured)),
    }


def calibrate(dissection: Dissection, model: LatencyModel, bench: Bench, engines: int = ENGINES) -> LatencyModel:
    """The model with slope, intercept and left-out error; engines that the table knows are not measured again."""
    key = model_key(dissection)
    known = bench.table.engines(key)
    if len(known) < engines:
        plans = [model.dense] if not known else []
        plans = [*plans, *(random_widths(model, bench.rng) for _ in range(engines - len(known) - len(plans)))]
        measure_engines(dissection, bench, plans)
        known = bench.table.engines(key)
    raw = np.array([model.raw_ms(widths) for widths, _ in known])
    measured = np.array([m.ms for _, m in known])
    slope, intercept = fit_affine(raw, measured)
    left_out = np.empty(len(raw))
    for i in range(len(raw)):
        rest = np.arange(len(raw)) != i
        a, b = fit_affine(raw[rest], measured[rest])
        left_out[i] = a * raw[i] + b
    error = errors(left_out, measured)
    bench.table.put_calibration(key, slope, intercept, error)
    return model.calibrated(slope, intercept, error)
