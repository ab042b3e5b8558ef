"""The portfolio of a problem, and the order in which its plans are trusted.

Losses are of single changes, before training, and changes interact. So the problem is solved under several scenarios:
all methods at the measured losses, each method alone, structure at half and at twice its loss. Plans that differ, but
for those of far too large a loss (`HOPELESS`), are joined by candidates whose prices are spread at random, and by
uniform widths (`sluice.pipeline.candidates`): as many as the steps of the rehearsal can tell apart. These are cut and
trained for a while (`sluice.training.rehearse`). The plan with the best forecast comes first.

Where gates are asked for, they start at that plan (`sluice.pipeline.gate_candidate`), and what they make of it is
trained beside it anew, both from the cut. That takes a third of the steps of the fine-tune on top of the rehearsal, and
this comparison a third of these; its losses are those that both are told with. Without a rehearsal there are no gates.
A network that came down to the budget in stops (`sluice.pipeline.progressive`) gives its plan in the same way.

A scenario that misses the target, but not the budget, has its fastest plan: the target has a margin, since engines
decide in the end (`sluice.pipeline.verify`). The best plan of a keyword spotter at 15% was 1.5% beyond the target on
one table and within it on the next.

The first scenario is solved by need. The others are solved under estimates (`sluice.profiler.need`, 4), which measures
less: a plan near the best is as good to compare. The one that is settled on is solved by need when it is verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx, nn

from sluice.core.errors import Unreachable
from sluice.pipeline.candidates import UniformProblem, perturbed, stratum
from sluice.pipeline.gate_candidate import GateCandidate
from sluice.pipeline.kept_stages import rate_once, rehearsed_once
from sluice.pipeline.layermerge import BONUSES, DepthProblem
from sluice.pipeline.problem import Problem, Solution
from sluice.pipeline.progressive import Descent
from sluice.pipeline.verify import ACCEPTED, AIM
from sluice.profiler.need import Solve, by_need
from sluice.solver.decide import Choice
from sluice.solver.options import EditSpace
from sluice.training.recovery import AUTO, Recovery
from sluice.training.rehearse import FAR, HELD, batches_behind, forecast, rehearsal_cost, rehearse
from sluice.training.stages import NOTHING, Stages
from sluice.training.train import Data, Loss
from sluice.training.trial import quick_rate

__all__ = ["Scenario", "choose", "late_steps"]

PRICES = (0.5, 2.0)
HOPELESS = 3.0  # times the least loss of a scenario: not worth a rehearsal
MOST = 12  # candidates
LEAST, ENOUGH = 8, 12  # steps of a first round: fewer tell nothing, more candidates are asked for beyond
TRIED = 3  # first rounds that the rate takes
# Of the steps of the fine-tune: for gates and for the comparison of their plan with the one they started at; of these
# the comparison's.
GATES, DUEL = 1 / 3, 1 / 3
Build = Callable[[Solution], fx.GraphModule]


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """A problem under one pricing, its solution, the held-out loss of its plan after every round of rehearsal.

    ``foreseen`` is the forecast for the end of the fine-tune, where there were rounds enough for one.
    """

    name: str
    problem: Problem
    solution: Solution
    rehearsed: tuple[float, ...] = ()
    foreseen: float | None = None


def choose(
    problem: Problem,
    methods: Sequence[str],
    target_ms: float,
    build: Build,
    *,
    data: Data,
    teacher: nn.Module,
    loss: Loss,
    recovery: Recovery,
    steps: int,
    total: int = 0,
    gates: GateCandidate | None = None,
    descent: Descent | None = None,
    stages: Stages = NOTHING,
    progress: bool = True,
) -> list[Scenario]:
    """All candidates whose plans differ, the most trusted first; behind them those for which there were no steps.

    Args:
        target_ms: promised milliseconds of every plan.
        build: makes the trainable slim network of a plan.
        recovery: optimizer, schedule and rate of the rehearsal; a rate to be found is found on the first plan.
        steps: of training, of all candidates together; too few, as none, trust the measured losses.
        total: steps of the fine-tune to come.
        gates: makes one more candidate of the first one, where ``total`` leaves it steps enough; None for none.
        descent: a network whose plan is one more candidate, on the same condition; None for none.
        stages: where the rate and the losses of the rehearsals are kept.
    """
    learning, once = late_steps(total)
    late = (gates is not None or descent is not None) and type(problem) is Problem and once >= LEAST
    scenarios = _scenarios(problem, methods, target_ms)
    room = _room(steps) - len(scenarios)
    if room > 0 and type(problem) is Problem:
        scenarios += _spread(problem, methods, target_ms, room, scenarios)
    strata = [stratum(one.solution.plan) for one in scenarios]
    firsts = {
        count: steps // (rehearsal_cost(count, len(set(strata[:count]))) + (TRIED if recovery.lr == AUTO else 0))
        for count in range(2, len(scenarios) + 1)
    }
    alone = min(ENOUGH, steps // TRIED)  # for the rate of gates at a plan without others
    count = max((count for count, first in firsts.items() if first >= LEAST), default=int(late and alone >= LEAST))
    if not count:
        return scenarios
    first, strata = firsts.get(count, alone), strata[:count]
    own = stages.for_([one.solution.plan.to_json() for one in scenarios[:count]], first, total)
    lr = rate_once(
        own,
        lambda: quick_rate(
            build(scenarios[0].solution), data, teacher=teacher, loss=loss, recovery=recovery, steps=first,
            progress=progress,
        ),
    )  # fmt: skip

    def trained(
        name: str, plans: Mapping[Solution, Build], steps: int, strata: Sequence[object], far: float = FAR
    ) -> list[tuple[float, ...]]:
        def train() -> list[tuple[float, ...]]:
            found = rehearse(
                [made(one) for one, made in plans.items()], data, teacher=teacher, loss=loss, lr=lr, recovery=recovery,
                steps=steps, total=total, strata=strata, far=far, progress=progress,
            )  # fmt: skip
            return [tuple(losses) for losses in found]

        return rehearsed_once(own, name, [one.plan for one in plans], train)

    found = trained("rehearsal", {one.solution: build for one in scenarios[:count]}, first, strata)
    heard = [_heard(one, losses, first, total) for one, losses in zip(scenarios, found, strict=False)]
    if count > 1:
        heard.sort(key=lambda one: (-len(one.rehearsed), forecast(one.rehearsed, first, total)))
    heard += scenarios[count:]
    if not late:
        return heard

    def rivals() -> Iterator[tuple[Scenario, Build]]:
        if gates is not None:
            stream, leader = batches_behind(data, HELD), heard[0].solution
            made = gates.learn(problem, leader, target_ms, stream, learning, lr)
            for one in [] if made is None else _distinct(problem, {"gates": made}, target_ms, heard):
                yield one, build
        if descent is not None:
            for one in _distinct(problem, {"stops": descent.ready.problem}, target_ms, ()):
                yield one, descent.build

    builds = {heard[0].solution: build}
    for rival, own_build in rivals():
        builds[rival.solution] = own_build
        two = {one.solution: builds[one.solution] for one in (heard[0], rival)}
        before, after = trained(f"duel with {rival.name}", two, once, (0, 1), math.inf)
        better = forecast(after, once, total) < forecast(before, once, total)
        first_two = [_heard(rival, after, once, total), _heard(heard[0], before, once, total)]
        heard = [*(first_two if better else reversed(first_two)), *heard[1:]]
    return heard


def late_steps(total: int) -> tuple[int, int]:
    """The steps for a late candidate, of ``total`` of the fine-tune, and of the first round of its comparison."""
    share = int(GATES * total)
    return share - int(DUEL * share), int(DUEL * share) // rehearsal_cost(2, 2)


def _heard(one: Scenario, losses: tuple[float, ...], first: int, total: int) -> Scenario:
    foreseen = forecast(losses, first, total) if len(losses) > 1 and total > 0 else math.inf
    return replace(one, rehearsed=losses, foreseen=foreseen if math.isfinite(foreseen) else None)


def _room(steps: int) -> int:
    """The most candidates, `MOST` at the most, whose first rounds have `ENOUGH` steps each."""
    counts = range(2, MOST + 1)
    return max((n for n in counts if (rehearsal_cost(n, (n + 1) // 2) + TRIED) * ENOUGH <= steps), default=0)


def _spread(
    problem: Problem, methods: Sequence[str], target_ms: float, room: int, known: Sequence[Scenario]
) -> list[Scenario]:
    """Candidates of `sluice.pipeline.candidates` whose plans are not known yet, ``room`` at the most."""
    asked: dict[str, Problem] = {}
    if "filter" in methods:
        sites = problem.profile.options.sites(problem.profile.latency, ["filter"])
        asked["uniform widths"] = UniformProblem(
            problem.profile, problem.analysis, sites, problem.losses, problem.scores, problem.inputs
        )
    draws = perturbed(problem)
    asked |= {f"spread prices {k + 1}": next(draws) for k in range(room - len(asked))}
    return _distinct(problem, asked, target_ms, known)


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
    scenarios = [Scenario(next(iter(asked)), problem, first)]
    return scenarios + _distinct(problem, likely, target_ms, scenarios, most)


def _distinct(
    problem: Problem, asked: Mapping[str, Problem], target_ms: float, known: Sequence[Scenario], most: float = math.inf
) -> list[Scenario]:
    """Those of the problems, solved side by side, whose plans are new and have a price of ``most`` in ``problem``."""
    found: list[Scenario] = []
    solvers = [_solver(one, target_ms) for one in asked.values()]
    for (name, one), choice in zip(asked.items(), by_need(problem.profile, solvers, rounds=0), strict=True):
        if isinstance(choice, Unreachable):
            choice = _barely(one, target_ms, choice)
        if isinstance(choice, Unreachable) or _price(problem, choice) > most:
            continue
        solution = one.solution(choice)
        if all(solution.plan != other.solution.plan for other in (*known, *found)):
            found.append(Scenario(name, one, solution))
    return found


def _barely(problem: Problem, target_ms: float, refused: Unreachable) -> Choice | Unreachable:
    """The fastest plan of a problem that misses the target by less than its margin under the budget; engines decide."""
    least = problem.least_from(target_ms)
    return refused if least * AIM > target_ms * ACCEPTED else problem.estimated(max(target_ms, least))


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


def _solver(problem: Problem, target_ms: float) -> Solve:
    return lambda latency, near: problem.choose(latency, target_ms, near)


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
