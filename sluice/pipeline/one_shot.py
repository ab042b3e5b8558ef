"""A plan without training: score, price, solve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sluice.artifacts.report_rows import edit_rows
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.core.plan import Plan
from sluice.passes.graph.capture import Inputs
from sluice.pipeline.plain import counted_from
from sluice.pipeline.prepare import check_float32, prepare
from sluice.pipeline.recipe import Recipe
from sluice.solver.options import METHODS, check_methods
from sluice.training.batches import check_data, checked
from sluice.training.losses import loss_of
from sluice.training.train import Data, Loss

__all__ = ["OneShotPlan", "plan_one_shot", "plan_summary"]


@dataclass(frozen=True, slots=True)
class OneShotPlan:
    """A plan made without training, and its promise.

    ``retained`` is the kept share of the importance. ``estimated`` is the share of the pieces' milliseconds that was
    not measured: where the table is another device's, what it lacks is estimated.
    """

    plan: Plan
    budget_ms: float
    dense_ms: float
    promised_ms: float
    retained: float
    estimated: float = 0.0


def plan_one_shot(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: str | Mapping[str, str | float],
    data: Data,
    deployment: Deployment,
    table: str | os.PathLike[str] = ":memory:",
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    loss: Loss | str | None = None,
    progress: bool = True,
) -> OneShotPlan:
    """A plan in one shot: Fisher scores on a few labelled batches of ``data``, then the solver; nothing is trained.

    Arguments and errors are those of `compress`, but nothing needs to run on the device: a table that was filled there
    suffices, if it holds the dense network. What else it lacks is estimated.
    """
    methods = check_methods(methods)
    asked = BudgetSpec.parse(budget)
    check_float32(model)
    taken = loss_of(loss)
    check_data(model, data, loss=taken)
    recipe = Recipe(checked(model, data, taken), taken, progress=progress)
    ready = prepare(
        model, example_inputs, [asked], deployment, recipe, table=table, exclude=exclude,
        methods=methods, elsewhere=True,
    )  # fmt: skip
    dense_ms = ready.measured.latency.dense_ms()
    target_ms = counted_from(ready.plain, asked).ms(dense_ms)
    solution = ready.problem.solve(target_ms)
    choice, estimated = solution.choice, ready.measured.latency.share_estimated(solution.choice.widths)
    return OneShotPlan(solution.plan, target_ms, dense_ms, choice.promised_ms, choice.retained, estimated)


def plan_summary(found: OneShotPlan, out: str) -> tuple[dict[str, Any], list[str]]:
    """The promise of a plan and its edits, as data and as lines; ``out`` is where the plan was written."""
    edits = edit_rows(found.plan)
    data = {
        "dense_ms": found.dense_ms,
        "budget_ms": found.budget_ms,
        "promised_ms": found.promised_ms,
        "retained": found.retained,
        "estimated": found.estimated,
        "widths": dict(found.plan.widths),
        "edits": [asdict(edit) for edit in edits],
    }
    lines = [
        f"promised {found.promised_ms:.4g} ms of {found.dense_ms:.4g} ms dense (budget {found.budget_ms:.4g} ms), "
        f"{found.retained:.1%} of the importance retained; {out}"
    ]
    if found.estimated:
        lines.append(
            f"{found.estimated:.1%} of these milliseconds are estimated, as the table lacks points of the plan; "
            "`sluice profile --complete` on the device measures them"
        )
    return data, [*lines, *(f"  {edit.method} {edit.name}: {edit.detail}" for edit in edits)]
