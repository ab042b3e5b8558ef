"""The widths to keep: most retained importance within the promised milliseconds, solved exactly.

    maximise   sum_g sum_l  R[g,l] x[g,l]                 R[g,l] = A^2 - (sum of sqrt(s_j) over the removed j)^2
    subject to sum_l x[g,l] = 1,  x binary                one level per group
               intercept + slope * sum_t weight_t * ms_t(widths) <= target

The latency row (`sluice.passes.program`) is the model itself up to the solver's tolerance. ``promised_ms`` is
nevertheless recomputed from ``LatencyModel.ms``; a solution that exceeds the target by more than a millionth is solved
again, tightened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sluice.errors import SluiceError
from sluice.latency import LatencyModel
from sluice.passes.program import Program

__all__ = ["Choice", "decide", "least_ms", "restricted", "unreachable"]

TOLERANCE = 1e-6  # relative excess of the recomputed promise that still counts as met


@dataclass(frozen=True, slots=True)
class Choice:
    """One width per group, and what it promises.

    ``retained`` is the kept share of the total importance (of the channels, for ``least_ms``); ``gap`` is the relative
    distance to the best bound that the solver proved.
    """

    widths: Mapping[str, int]
    promised_ms: float
    retained: float
    gap: float
    seconds: float

    def kept(self, importance: Mapping[str, np.ndarray]) -> Mapping[str, tuple[int, ...]]:
        """Sorted indices of the most important channels of every group; of equal scores the first."""
        return {g: tuple(sorted(_order(importance[g])[:w].tolist())) for g, w in self.widths.items()}


def decide(
    model: LatencyModel,
    importance: Mapping[str, np.ndarray],
    target_ms: float,
    *,
    gap: float = 1e-3,
    time_limit_s: float = 20.0,
) -> Choice:
    """The widths that retain most importance within ``target_ms``.

    Args:
        model: what the widths cost.
        importance: for every group its channels' scores, shape ``(dense[g],)``: squared changes of the loss (rule 0).
        target_ms: milliseconds that ``model.ms(widths)`` must not exceed.
        gap: relative distance to the optimum at which the solver may stop.
        time_limit_s: after this many seconds the best widths found so far are returned, with their gap.

    Raises:
        SluiceError: importance of the wrong shape or sign, a target below what any widths reach, or no widths found
            in time.
    """
    started = time.perf_counter()
    gains = _gains(model, importance)
    dense_ms = model.dense_ms()
    if not math.isfinite(target_ms):
        raise SluiceError(f"budget is {target_ms} ms; give a finite number of milliseconds")
    if dense_ms <= target_ms:
        return Choice(dict(model.dense), dense_ms, 1.0, 0.0, time.perf_counter() - started)
    program = Program(model)
    objective = program.over_levels({g: -gain for g, gain in gains.items()})
    bound = target_ms
    for _ in range(8):
        left = time_limit_s - (time.perf_counter() - started)
        solved = _solve(program, objective, bound, gap, max(left, 0.1))
        if solved is None:
            least = least_ms(model, time_limit_s=time_limit_s)
            if least.promised_ms > target_ms * (1 + TOLERANCE):
                raise unreachable(target_ms, least.promised_ms, dense_ms)
            widths, proved = dict(least.widths), 0.0
        else:
            widths, proved = solved
        promised = model.ms(widths)
        if promised <= target_ms + TOLERANCE * abs(target_ms):
            retained = sum(gains[g][model.levels[g].index(w)] for g, w in widths.items())
            return Choice(widths, promised, float(retained), proved, time.perf_counter() - started)
        bound -= 2 * (promised - target_ms)
    raise RuntimeError(f"the solver's latency row and the model disagree at {widths}")


def least_ms(model: LatencyModel, *, time_limit_s: float = 20.0) -> Choice:
    """The widths of the least promised milliseconds; of equally fast ones those that keep most channels."""
    started = time.perf_counter()
    program = Program(model)
    solved = _solve(program, program.cost, None, 1e-6, time_limit_s)
    if solved is None:
        raise RuntimeError("a program without a budget has no solution")
    widths, proved = solved
    fastest = model.ms(widths)
    channels = sum(model.dense.values())
    keep = program.over_levels({g: -np.asarray(model.levels[g], float) / channels for g in model.dense})
    fuller = _solve(program, keep, fastest, 1e-6, time_limit_s)
    if fuller is not None and model.ms(fuller[0]) <= fastest + 1e-9 * abs(fastest):
        widths = fuller[0]
    return Choice(widths, model.ms(widths), sum(widths.values()) / channels, proved, time.perf_counter() - started)


def unreachable(target_ms: float, least: float, dense: float) -> SluiceError:
    """The error for a budget below the least that the gates reach, in milliseconds."""
    return SluiceError(
        f"budget {_ms(target_ms)} cannot be met: filter gates alone reach {_ms(least, up=True)} "
        f"({100 * least / dense:.1f}% of dense {_ms(dense)}); ask for at least that"
    )


def _solve(
    program: Program, objective: np.ndarray, bound_ms: float | None, gap: float, time_limit_s: float
) -> tuple[dict[str, int], float] | None:
    """Widths and proved gap, or None where no widths satisfy the bound."""
    model = program.model
    constraints = [program.rows()]
    # Milliseconds may be tiny; HiGHS' feasibility tolerance is absolute, so both rows are put on a scale of one.
    unit = max(abs(model.slope) * float(np.abs(program.cost).max(initial=0.0)), 1e-12)
    if bound_ms is not None:
        room = bound_ms - model.intercept - model.slope * program.constant
        constraints.append(LinearConstraint(model.slope / unit * program.cost[None, :], -np.inf, room / unit))
    else:
        objective = model.slope / unit * objective
    result = milp(
        objective,
        integrality=program.integrality,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": time_limit_s},
    )
    if result.x is None and "nfeasible" in result.message:
        return None
    if result.x is None:
        raise SluiceError(
            f"no widths found in {time_limit_s:.0f} s for {len(model.dense)} groups ({result.message.strip()}); "
            "raise time_limit_s or offer fewer levels per group"
        )
    return program.widths(result.x), float(result.mip_gap or 0.0)


def _gains(model: LatencyModel, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Share of the total that every level of every group retains (rule 0), shape ``(len(levels[g]),)``."""
    sums = {}
    for group, size in model.dense.items():
        if group not in importance:
            raise SluiceError(f"no importance given for group {group!r}; give scores of shape ({size},)")
        scores = np.asarray(importance[group], dtype=float)
        if scores.shape != (size,):
            raise SluiceError(f"importance of group {group!r} has shape {scores.shape}; it must be ({size},)")
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise SluiceError(f"importance of group {group!r} is negative or not finite; give non-negative scores")
        kept = np.concatenate([[0.0], np.cumsum(np.sqrt(scores[_order(scores)]))])
        sums[group] = kept[-1] ** 2 - (kept[-1] - kept) ** 2
    total = sum(s[-1] for s in sums.values())
    if total <= 0:
        raise SluiceError(f"importance is zero in all of {len(sums)} groups; give at least one positive score")
    return {group: s[list(model.levels[group])] / total for group, s in sums.items()}


def _order(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-np.asarray(scores, dtype=float), kind="stable")


def _ms(value: float, *, up: bool = False) -> str:
    """At least three significant digits; rounded up where the figure is one to ask for."""
    decimals = 2 if abs(value) >= 1 or value == 0 else 2 - math.floor(math.log10(abs(value)))
    if up:
        value = math.ceil(value * 10**decimals - 1e-9) / 10**decimals
    return f"{value:.{decimals}f} ms"


def restricted(model: LatencyModel, groups: frozenset[str]) -> LatencyModel:
    """The same model in which all other groups stay dense."""
    levels = {g: tuple(model.levels[g]) if g in groups else (size,) for g, size in model.dense.items()}
    return replace(model, levels=levels)
