"""Measure what a solver asks for: solve with unknown points at their bounds, measure what the plan uses, repeat.

1. *Optimism*. Every solver is given the model with its unknown points at their bounds (`LatencyModel.hopeful`). What
   its choice uses and is unknown is measured, all solvers' points in one call. Then it is asked again, first near its
   last choice, which takes a fraction of the time, and everywhere once its choice there is measured. A choice near the
   last one whose loss is no larger than that of the choice everywhere, under bounds, is as good as that one.
2. *End*. A choice all of whose points are measured is promised what it takes, and no other configuration is promised
   more than it takes, as long as the bounds hold. So it is the optimum of the complete table, within the gap that the
   solver proved. This is the argument of A*.
3. *Neighbours*. A bound too high hides a plan, most likely one that is near: the same kernel at the next width. So the
   `NEAR` best steps of one level from the choice (`sluice.solver.descent.steps_from`) are measured as well. If one of
   them takes less than its bound, the solver is asked again.
4. After `ROUNDS` rounds the estimates themselves count: what is chosen under them is measured, and the last choice
   that is measured stands.
5. Where nothing can be measured, the table being of another device or the time being up, estimates are all there is.

6. *Walk*. A profile without a task in view measures the plans of some budgets, the least of all among them, under
   *neutral* losses: ``(1 - width / size)^2`` for widths and ranks, `STRUCTURE` for a change of structure. Engines of
   these plans calibrate the model along the way from the dense network to the quickest one. These losses are made up,
   so a plan need be no nearer to the optimum than `GAP`.

How much of a promise is estimated under rules 4 and 5, `LatencyModel.share_estimated` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sluice.core.errors import Unreachable
from sluice.core.latency import LatencyModel
from sluice.profiler.view import Profile
from sluice.solver.decide import Choice, decide, least_ms, restricted

__all__ = ["SHARES", "Solve", "by_need", "solve_by_need", "walk"]

ROUNDS, LAST, NEAR = 24, 4, 8
SHARES = (0.75, 0.5, 0.35, 0.25)  # of the dense milliseconds, of the plans of a walk
STRUCTURE = 0.3
GAP = 0.05
SLACK = 1e-6  # relative, of two sums of the same milliseconds
# Chooses under a model; near a former choice, if there is one and the solver can.
Solve = Callable[[LatencyModel, Mapping[str, int] | None], Choice]
Steps = Callable[[LatencyModel, Mapping[str, int]], list[dict[str, int]]]


def solve_by_need(profile: Profile, solve: Solve, steps: Steps | None = None) -> Choice:
    """The choice of one solver, its points measured, and those of the best ``steps`` from it (rule 3).

    Raises:
        Unreachable: even at the bounds nothing reaches what is asked.
    """
    near: list[Mapping[str, int] | None] = [None]
    for _ in range(LAST):
        (found,) = by_need(profile, [solve], near=near)
        if isinstance(found, Unreachable):
            raise found
        choice = found
        if steps is None or not profile.open or not _surprised(profile, steps(profile.latency, choice.widths)[:NEAR]):
            break
        near = [choice.widths]
    return choice


def _surprised(profile: Profile, configurations: Sequence[Mapping[str, int]]) -> bool:
    """Measure what the configurations use; whether one of them takes less than its bound."""
    hopeful = profile.latency.hopeful()
    if not profile.ask(configurations):
        return False
    return any(profile.latency.ms(widths) < (1.0 - SLACK) * hopeful.ms(widths) for widths in configurations)


def by_need(
    profile: Profile,
    solvers: Sequence[Solve],
    rounds: int = ROUNDS,
    near: Sequence[Mapping[str, int] | None] = (),
) -> list[Choice | Unreachable]:
    """What every solver chooses, all points of the choices measured; in place of a choice, why there is none.

    Without ``rounds`` the estimates count from the start (rule 4): choices are found sooner, and need not be the best.
    ``near`` are configurations from which the solvers start, one each.
    """
    found: dict[int, Choice | Unreachable] = {}
    last = dict(enumerate(near))
    known: dict[int, Choice] = {}  # near the choice before, and measured
    for attempt in range(rounds + LAST):
        model = profile.latency
        given = model.hopeful() if attempt < rounds and profile.open else model
        wanted = []
        for k, solve in enumerate(solvers):
            if k in found:
                continue
            try:
                choice = solve(given, last.get(k))
            except Unreachable as error:
                found[k] = error
                continue
            missing = profile.open and not profile.knows(choice.widths)
            if missing and not choice.local and k in known and known[k].loss <= choice.loss:
                found[k] = known[k]
                continue
            last[k] = choice.widths if missing else None
            wanted += [choice.widths] if missing else []
            if choice.local and not missing and attempt < rounds:
                known[k] = choice
            elif not missing or attempt == rounds + LAST - 1:
                found[k] = choice
        if wanted:
            profile.ask(wanted)
        if len(found) == len(solvers):
            break
    model = profile.latency
    return [
        choice if isinstance(choice, Unreachable) else replace(choice, promised_ms=model.ms(choice.widths))
        for choice in (found[k] for k in range(len(solvers)))
    ]


def walk(profile: Profile, methods: Sequence[str], shares: Sequence[float] = SHARES) -> None:
    """Measure the plans and engines of rule 6; ``shares`` of the dense milliseconds out of reach are left out."""
    sites = profile.options.sites(profile.latency, methods)
    losses = neutral_losses(restricted(profile.latency, sites))
    dense_ms = profile.latency.dense_ms()

    def plan(share: float) -> Solve:
        return lambda latency, near: decide(restricted(latency, sites), losses, share * dense_ms, gap=GAP, near=near)

    solvers: list[Solve] = [lambda latency, near: least_ms(restricted(latency, sites)), *map(plan, shares)]
    chosen = [choice.widths for choice in by_need(profile, solvers) if not isinstance(choice, Unreachable)]
    if profile.open:
        profile.time_engines(chosen)


def neutral_losses(model: LatencyModel) -> dict[str, np.ndarray]:
    """Losses that know no task (rule 6), for every site that may move."""
    losses = {}
    for site, levels in model.levels.items():
        if len(levels) > 1:
            size = model.dense[site]
            values = np.asarray(levels, dtype=np.float64)
            moved = STRUCTURE * np.abs(values - size) if site in model.switches else (1.0 - values / size) ** 2
            losses[site] = moved if not site.endswith("|dense") else np.zeros(len(levels))
    return losses
