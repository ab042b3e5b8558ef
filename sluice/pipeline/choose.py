"""The scenarios of a problem, and the order in which they are trusted.

Losses are of single changes, before training, and changes interact. So the problem is solved under several scenarios:
all methods at the measured losses, each method alone, structure at half and at twice its loss. Plans that differ are
cut and trained for a few steps (`sluice.training.rehearse`), but for those of far too large a loss (`HOPELESS`). The
scenario whose plan trains best comes first.

The first scenario is solved by need. The others are solved under estimates (`sluice.profiler.need`, 3), which measures
less: a plan near the best is as good to compare. The one that is settled on is solved by need when it is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx, nn

from sluice.core.errors import Unreachable
from sluice.core.latency import LatencyModel
from sluice.pipeline.layermerge import BONUSES, DepthProblem
from sluice.pipeline.problem import Problem, Solution
from sluice.profiler.need import by_need
from sluice.solver.decide import Choice
from sluice.solver.options import EditSpace
from sluice.training.recovery import Recovery
from sluice.training.rehearse import rehearse
from sluice.training.train import Data, Loss
from sluice.training.trial import quick_rate

__all__ = ["Scenario", "choose"]

PRICES = (0.5, 2.0)
HOPELESS = 3.0  # times the least loss of a scenario: not worth a rehearsal


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """A problem under one pricing, its solution, the held-out loss of its plan after every round of rehearsal."""

    name: str
    problem: Problem
    solution: Solution
    rehearsed: tuple[float, ...] = ()


def choose(
    problem: Problem,
    methods: Sequence[str],
    target_ms: float,
    build: Callable[[Solution], fx.GraphModule],
    *,
    data: Data,
    teacher: nn.Module,
    loss: Loss,
    recovery: Recovery,
    steps: int,
    progress: bool = True,
) -> list[Scenario]:
    """All scenarios whose plans differ, the most trusted first.

    Args:
        target_ms: promised milliseconds of every plan.
        build: makes the trainable slim network of a plan.
        recovery: optimizer, schedule and rate of the rehearsal; a rate to be found is found on the first plan.
        steps: of training in the first round of the rehearsal; 0 trusts the measured losses.
    """
    scenarios = _scenarios(problem, methods, target_ms)
    if len(scenarios) == 1 or not steps:
        return scenarios
    plans = [build(r.solution) for r in scenarios]
    lr = quick_rate(plans[0], data, teacher=teacher, loss=loss, recovery=recovery, steps=steps, progress=progress)
    found = rehearse(
        plans, data, teacher=teacher, loss=loss, lr=lr, recovery=recovery, steps=steps, progress=progress
    )  # fmt: skip
    heard = [replace(r, rehearsed=tuple(losses)) for r, losses in zip(scenarios, found, strict=True)]
    return sorted(heard, key=lambda r: (-len(r.rehearsed), r.rehearsed[-1]))


def _scenarios(problem: Problem, methods: Sequence[str], target_ms: float) -> list[Scenario]:
    options, latency = problem.profile.options, problem.profile.latency
    asked = {"together": problem}
    if isinstance(problem, DepthProblem):
        others = {f"bonus {bonus:g}": replace(problem, bonus=bonus) for bonus in BONUSES if bonus != problem.bonus}
        asked = {f"bonus {problem.bonus:g}": problem, **others}
    if len(methods) > 1:
        for price in PRICES:
            asked[f"structure at {price:g}"] = replace(problem, losses=_priced(problem.losses, options, price))
        for method in methods:
            asked[f"{method} alone"] = replace(problem, sites=options.sites(latency, [method]))
    first = problem.solve(target_ms)
    most = HOPELESS * _price(problem, first.choice)
    likely = {name: one for name, one in list(asked.items())[1:] if _may_pay(problem, one, target_ms, most)}
    solvers = [_solver(one, target_ms) for one in likely.values()]
    scenarios = [Scenario(next(iter(asked)), problem, first)]
    for (name, one), choice in zip(likely.items(), by_need(problem.profile, solvers, rounds=0), strict=True):
        if isinstance(choice, Unreachable) or _price(problem, choice) > most:
            continue
        solution = one.solution(choice)
        if all(solution.plan != other.solution.plan for other in scenarios):
            scenarios.append(Scenario(name, one, solution))
    return scenarios


def _may_pay(problem: Problem, one: Problem, target_ms: float, most: float) -> bool:
    """Whether the plan that is best if all unknown points are at their bounds has no hopeless price.

    Nothing is measured for a scenario whose plan has. Of a method alone no plan of measured points has a lower price,
    as long as the bounds hold. Where structure is priced otherwise, this is a guess.
    """
    profile = problem.profile
    try:
        return _price(problem, one.choose(profile.latency.hopeful(), target_ms)) <= most
    except Unreachable:
        return False  # this method alone does not reach the target


def _solver(problem: Problem, target_ms: float) -> Callable[[LatencyModel], Choice]:
    return lambda latency: problem.choose(latency, target_ms)


def _price(problem: Problem, choice: Choice) -> float:
    """The sum of the losses as measured."""
    levels, widths = problem.model.levels, choice.widths
    return sum(
        float(values[levels[site].index(widths[site])])
        for site, values in problem.losses.items()
        if widths[site] in levels[site]
    )


def _priced(losses: Mapping[str, np.ndarray], options: EditSpace, price: float) -> dict[str, np.ndarray]:
    structural = {name for o in options.ranks for name in (o.switch, o.rank)} | {*options.drops, *options.merges}
    return {site: values * price if site in structural else values for site, values in losses.items()}
