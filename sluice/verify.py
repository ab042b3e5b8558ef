"""The promise is checked on engines, before any fine-tuning: latency does not depend on the weights.

Solve, cut, build, measure beside the dense engine. Over budget: solve again with the target tightened by what was
missed. Well under budget: solve again with the target relaxed, for the budget is there to be used. At most `ROUNDS`
rounds; of those within the budget the one that retains most importance wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.budget import parse_budget
from sluice.errors import SluiceError
from sluice.onnx_file import finalize
from sluice.passes.decide import Choice, decide, least_ms
from sluice.passes.resolve import make_plan
from sluice.passes.rewrite_onnx import cut_graph, rewrite_onnx
from sluice.passes.sites import Analysis
from sluice.plan import InputSpec, Plan
from sluice.profiler.measure import measure
from sluice.profiler.profile import Profile

__all__ = ["Settled", "measure_pair", "measure_widths", "settle"]

ROUNDS = 4
RUNS = 3
AIM = 0.985  # of the budget: room for the noise of the last measurement
ENOUGH = 0.96  # of the budget: no need to look for more


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """A choice whose engine was measured; ``dense_ms`` and ``measured_ms`` come from one interleaved run."""

    choice: Choice
    kept: Mapping[str, tuple[int, ...]]
    plan: Plan
    budget_ms: float
    dense_ms: float
    measured_ms: float
    rounds: int


def measure_pair(profile: Profile, dense: onnx.ModelProto, slim: onnx.ModelProto, seed: int = 0) -> tuple[float, float]:
    """Milliseconds of both engines, interleaved; of three such runs the one with the median ratio.

    One run may fall into an episode in which the host slows one engine more than the other.
    """
    runner = profile.runner()
    sessions = [runner.build(model, batch=profile.fingerprint.batch) for model in (dense, slim)]
    anchor, rng = profile.anchor(runner), np.random.default_rng(seed)
    runs = [
        measure(sessions, min_rounds=60, max_rounds=160, target_spread=0.015, anchor=anchor, rng=rng)
        for _ in range(RUNS)
    ]
    first, second = sorted(runs, key=lambda run: run[1].ms / run[0].ms)[RUNS // 2]
    return first.ms, second.ms


def measure_widths(profile: Profile, plans: Sequence[Mapping[str, int]]) -> list[float]:
    """Milliseconds of engines with the first channels of every group kept, interleaved."""
    runner, cut = profile.runner(), profile.dissection
    sessions = [runner.build(cut_graph(cut.model, cut.analysis, cut.masks(widths))) for widths in plans]
    found = measure(sessions, min_rounds=60, anchor=profile.anchor(runner), rng=np.random.default_rng(0))
    return [m.ms for m in found]


def settle(
    profile: Profile,
    analysis: Analysis,
    importance: Mapping[str, np.ndarray],
    budget: str | Mapping[str, str | float],
    dense: onnx.ModelProto,
    inputs: tuple[InputSpec, ...] = (),
) -> Settled:
    """Choose widths whose engine meets the budget.

    Args:
        analysis: of the captured module (the plan is made for its tensors).
        dense: ONNX with parameter names.
    Raises:
        SluiceError: the budget cannot be met.
    """
    dense_engine = finalize(dense)
    target_ms = AIM * parse_budget(budget, profile.latency.dense_ms())
    least = least_ms(profile.latency).promised_ms
    best: Settled | None = None
    fastest: Settled | None = None
    for attempt in range(1, ROUNDS + 1):
        choice = decide(profile.latency, importance, max(target_ms, least))
        kept = choice.kept(importance)
        plan = make_plan(analysis, kept, inputs)
        dense_ms, slim_ms = measure_pair(profile, dense_engine, finalize(rewrite_onnx(dense, plan)), seed=attempt)
        budget_ms = parse_budget(budget, dense_ms)
        found = Settled(choice, kept, plan, budget_ms, dense_ms, slim_ms, attempt)
        if fastest is None or slim_ms / budget_ms < fastest.measured_ms / fastest.budget_ms:
            fastest = found
        if slim_ms <= AIM * 1.01 * budget_ms and (best is None or choice.retained >= best.choice.retained):
            best = found
        if choice.widths == profile.latency.dense and slim_ms <= budget_ms:
            return found  # nothing has to go
        if ENOUGH * budget_ms <= slim_ms <= AIM * 1.01 * budget_ms:
            break
        change = float(np.clip((AIM + ENOUGH) / 2 * budget_ms / slim_ms, 0.5, 1.15))
        # Widths come in levels, so the promise may lie well below the target; tightening starts from the promise, or
        # the same widths would be chosen again.
        target_ms = change * (target_ms if change > 1 else min(target_ms, choice.promised_ms))
    chosen = best or fastest
    assert chosen is not None
    if chosen.measured_ms > chosen.budget_ms:
        raise SluiceError(
            f"no engine within {chosen.budget_ms:.4g} ms was found in {ROUNDS} rounds, the fastest took "
            f"{chosen.measured_ms:.4g} ms (dense {chosen.dense_ms:.4g} ms); ask for at least that"
        )
    return chosen
