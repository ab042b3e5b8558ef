"""The plan of one budget: rehearsed by short trainings, verified on engines.

1. Where something is trained, plans are rehearsed, and the one that trains best comes first (`sluice.pipeline.choose`).
2. Engines are built and measured in that order until one is within the budget (`sluice.pipeline.verify`).
3. A network that came down in stops is one more that may be cut (`sluice.pipeline.progressive`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx
from torch import fx

from sluice.core.budget_spec import BudgetSpec
from sluice.core.progress import stage
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.groups import Analysis
from sluice.pipeline.choose import Scenario, choose, late_steps
from sluice.pipeline.gate_candidate import GateCandidate
from sluice.pipeline.kept_stages import Reading, verified_once
from sluice.pipeline.prepare import Prepared, trainable
from sluice.pipeline.progressive import Descent, descend
from sluice.pipeline.recipe import Recipe
from sluice.pipeline.verify import AIM, VerifiedSolution, first_verified

__all__ = ["Settled", "settle"]


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """What is cut, and by which plan.

    ``captured`` and ``dense_onnx`` are the network of ``ready`` without gates, ``slim`` is the trainable cut one.
    """

    ready: Prepared
    captured: fx.GraphModule
    dense_onnx: onnx.ModelProto
    verified: VerifiedSolution
    readings: list[Reading]
    slim: fx.GraphModule


def settle(ready: Prepared, budget: BudgetSpec, recipe: Recipe) -> Settled:
    """Decide and verify the plan of ``budget``. What is settled is kept among the stages of the recipe."""
    captured = ready.captured()
    analysis = analyze(captured, needed=False, dims=True)  # once, for the plans of all scenarios
    dense_onnx = ready.dense_onnx(captured)
    target_ms = AIM * budget.ms(ready.measured.latency.dense_ms())
    trains = recipe.data is not None and recipe.epochs > 0
    descent = None
    if recipe.progressive and trains:
        descent = descend(ready, target_ms, recipe, late_steps(recipe.steps())[0])

    def verified_plan() -> tuple[VerifiedSolution, list[Reading]]:
        scenarios = _rehearsed(ready, captured, analysis, target_ms, recipe, descent) if trains else []
        with stage("decide and verify on engines", recipe.progress) as advance:
            rehearsed = {s.problem: s.solution for s in reversed(scenarios)}
            problems = [*(s.problem for s in scenarios), ready.problem]
            verified = first_verified(problems, budget, dense_onnx, advance, rehearsed)
        ahead = next((s.foreseen for s in scenarios if s.solution is verified.solution), None)
        readings = [(s.name, s.solution.choice.promised_ms, s.rehearsed) for s in scenarios]
        return replace(verified, foreseen=ahead), readings

    lower = {} if descent is None else {"stops": descent.ready.problem}
    verified, readings = verified_once(recipe.stages, {"dense": ready.problem, **lower}, verified_plan)
    if descent is not None and verified.problem is descent.ready.problem:
        ready, captured = descent.ready, descent.captured
        dense_onnx = ready.dense_onnx(captured)
    return Settled(ready, captured, dense_onnx, verified, readings, trainable(captured, verified.plan, analysis))


def _rehearsed(
    ready: Prepared,
    captured: fx.GraphModule,
    analysis: Analysis,
    target_ms: float,
    recipe: Recipe,
    descent: Descent | None,
) -> Sequence[Scenario]:
    """Rule 1: the plans from the best to the worst."""
    assert recipe.data is not None
    problem, total = ready.problem, recipe.steps()
    gates = None
    if recipe.gates:
        space = ready.gated.meta["space"]
        gates = GateCandidate(
            captured, space, ready.methods, ready.teacher, recipe.loss, recipe.recovery, recipe.progress
        )  # fmt: skip
    return choose(
        problem, ready.methods, max(target_ms, problem.least_from(target_ms)),
        lambda solution: trainable(captured, solution.plan, analysis),
        data=recipe.data, teacher=ready.teacher, loss=recipe.loss, recovery=recipe.recovery,
        steps=int(recipe.rehearsal * total), total=total, gates=gates,
        descent=descent, stages=recipe.stages, progress=recipe.progress,
    )  # fmt: skip
