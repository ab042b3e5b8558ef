"""The promise is checked on engines, before any fine-tuning: latency does not depend on the weights.

1. A round: solve, cut, build, measure beside the dense engine (`sluice.pipeline.pairs`). The next target is what the
   plan promised, times ``AIM * budget / measured``: tightened where the engine is over budget, relaxed where it is well
   under it, so that the whole budget is used. Promises stay as they are until the search ends; then the profile learns
   what the engines took, for the next search.
2. What a round finds, it finds between the largest promise that was kept within the budget and the least that was not.
   A target outside of that range becomes its middle.
3. The search ends when an engine takes `ENOUGH` to `ACCEPTED` of the budget, when the solver has nothing new to offer,
   and after `ROUNDS` rounds. Of the engines within `ACCEPTED` the one of least loss wins.
4. `ACCEPTED` leaves room, since an engine that is built again differs by 1 to 2% from itself, the choice among several
   engines favours one that was measured too fast, and after training nothing can be chosen anew. Where no engine is
   within it, the fastest is taken if it is within the budget itself.
5. A solution that was rehearsed is the first one of its problem: what was trained is what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError, Unreachable
from sluice.core.plan import Plan
from sluice.core.progress import Advance, told_to
from sluice.core.weight_bytes import Parked
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.pairs import Pairs, PairTimes, structure
from sluice.pipeline.problem import Problem, Solution
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.timing.measure import measure
from sluice.profiler.view import Profile
from sluice.solver.decide import Choice

__all__ = [
    "VerifiedSolution",
    "final_pair",
    "first_verified",
    "measure_configurations",
    "solve_verified",
]

ROUNDS = 4
PATIENCE_MS = 5000.0
AIM = 0.965  # of the budget
ACCEPTED = 0.98  # of the budget, before training
ENOUGH = 0.95  # of the budget: a slower engine within it is not looked for
RELAXED = 1.3  # times the last target, at most


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedSolution:
    """A solution whose engine was measured in one of ``rounds`` rounds; ``engine`` is the `structure` of its file.

    ``foreseen`` is the loss that a rehearsal of this plan forecast, if there was one, ``problem`` what is solved.
    """

    solution: Solution
    times: PairTimes
    rounds: int
    engine: str
    foreseen: float | None = None
    problem: Problem | None = None

    @property
    def choice(self) -> Choice:
        return self.solution.choice

    @property
    def plan(self) -> Plan:
        return self.solution.plan


def measure_configurations(profile: Profile, configurations: Sequence[Mapping[str, int]]) -> list[float]:
    """Milliseconds of engines with the first channels of every group kept, interleaved."""
    runner = profile.runner()
    sessions = [
        runner.build(profile.engine(build_engine(profile.partition, one, profile.options))) for one in configurations
    ]
    reference, rng = profile.reference(runner), np.random.default_rng(0)
    found = measure(sessions, min_bursts=60, reference=reference, patience_ms=PATIENCE_MS, rng=rng)
    return [m.ms for m in found]


def solve_verified(
    problem: Problem, budget: BudgetSpec, dense: onnx.ModelProto, pairs: Pairs | None = None,
    rehearsed: Solution | None = None,
) -> VerifiedSolution:  # fmt: skip
    """Find a plan whose engine meets the budget.

    Args:
        dense: ONNX with parameter names.
        pairs: what was measured for this budget so far; more is added.
        rehearsed: a solution of the problem to begin with.
    Raises:
        SluiceError: the budget cannot be met, or the runtime computes another network.
    """
    profile = problem.profile
    if pairs is None:
        pairs = Pairs(profile, profile.engine(finalize(dense)), budget)
    found: list[VerifiedSolution] = []
    try:
        return _search(problem, budget, dense, pairs, found, rehearsed)
    finally:
        for one in found:
            ratio = one.times.slim_ms / one.times.dense_ms
            profile.learn(one.choice.widths, ratio, uncertain=not one.times.quiet)


def _search(
    problem: Problem, budget: BudgetSpec, dense: onnx.ModelProto, pairs: Pairs, found: list[VerifiedSolution],
    rehearsed: Solution | None,
) -> VerifiedSolution:  # fmt: skip
    """The solution of least loss; what every round found comes into ``found``."""
    profile = problem.profile
    target_ms = AIM * budget.ms(profile.latency.dense_ms())
    least = problem.least_from(target_ms)
    while len(found) < ROUNDS:
        try:
            solution = rehearsed if rehearsed and not found else problem.solve(max(target_ms, least))
        except Unreachable:
            if not found:
                raise
            break
        if any(solution.choice.widths == one.choice.widths for one in found):
            break
        wide = finalize(rewrite_onnx(dense, solution.plan))
        engine = profile.engine(wide)
        times = pairs.settle(engine, ACCEPTED, wide)
        found.append(VerifiedSolution(solution, times, 0, structure(engine), problem=problem))
        del wide, engine  # each is as large as the network
        if solution.choice.widths == profile.latency.dense and times.share <= 1.0:
            return replace(found[-1], rounds=len(found))
        if ENOUGH <= times.share <= ACCEPTED:
            break
        aimed_ms = _next_target(found, target_ms)
        if aimed_ms is None:
            break
        target_ms = aimed_ms
    return _best(found, lambda plan: profile.engine(finalize(rewrite_onnx(dense, plan))), pairs)


def _next_target(found: Sequence[VerifiedSolution], target_ms: float) -> float | None:
    """Rules 1 and 2; None where the last plan is still the best that can be aimed at."""
    last = found[-1]
    aimed_ms = AIM * last.choice.promised_ms / last.times.share
    kept = max((one.choice.promised_ms for one in found if one.times.share <= ACCEPTED), default=0.0)
    missed = min((one.choice.promised_ms for one in found if one.times.share > ACCEPTED), default=math.inf)
    if last.times.share <= ACCEPTED:
        if aimed_ms <= target_ms:
            return None
        aimed_ms = min(aimed_ms, RELAXED * target_ms)
    if kept < aimed_ms < missed:
        return aimed_ms
    return (kept + missed) / 2 if kept < missed else None


def _best(found: Sequence[VerifiedSolution], made: Callable[[Plan], onnx.ModelProto], pairs: Pairs) -> VerifiedSolution:
    """Rules 3 and 4; ``made`` gives the file of an engine by its plan.

    Raises:
        SluiceError: no engine is within the budget.
    """
    rounds = len(found)
    if accepted := [one for one in found if one.times.share <= ACCEPTED]:
        return replace(min(accepted, key=lambda one: one.choice.loss), rounds=rounds)
    fastest = min(found, key=lambda one: one.times.share)
    times = pairs.settle(made(fastest.plan), 1.0)
    if times.share > 1.0:
        busy = "" if times.quiet else ", on a machine that was never quiet"
        raise SluiceError(
            f"no engine within {times.budget_ms:.4g} ms was found in {rounds} round{'' if rounds == 1 else 's'}, the "
            f"fastest took {times.slim_ms:.4g} ms (dense {times.dense_ms:.4g} ms){busy}; ask for at least that"
        )
    return replace(fastest, times=times, rounds=rounds)


def first_verified(
    problems: Sequence[Problem], budget: BudgetSpec, dense: onnx.ModelProto, advance: Advance | None = None,
    rehearsed: Mapping[Problem, Solution] | None = None,
) -> VerifiedSolution:  # fmt: skip
    """The solution of the first problem that has an engine within the budget.

    The plan that trained best may miss the budget by little. Where no problem has such an engine, the error is that of
    the last one, which has the most sites to change. What was measured for one problem is known for all; ``advance`` is
    told where a quiet machine is waited for. ``rehearsed`` are solutions of some problems to begin with.
    """
    profile = problems[-1].profile
    pairs = Pairs(profile, profile.engine(finalize(dense)), budget, told_to(advance))
    refused: dict[Problem, SluiceError] = {}
    for problem in dict.fromkeys(problems):
        try:
            return solve_verified(problem, budget, dense, pairs, (rehearsed or {}).get(problem))
        except SluiceError as error:
            refused[problem] = error
    raise refused[problems[-1]]


def final_pair(
    profile: Profile, dense: onnx.ModelProto | Parked, slim: onnx.ModelProto, budget: BudgetSpec,
    verified: VerifiedSolution, advance: Advance | None = None,
) -> PairTimes:  # fmt: skip
    """The times of the file that is deployed, and of the dense one.

    They are those of the verified engine if the file has its structure. Otherwise both are measured, and also where the
    machine was never quiet before. The mark of a machine that is not quiet now either stays with the times.
    """
    if structure(slim) == verified.engine and verified.times.quiet:
        return verified.times
    times = Pairs(profile, dense, budget, told_to(advance)).settle(slim, 1.0)
    return replace(times, dense_runs=verified.times.dense_runs + times.dense_runs)
