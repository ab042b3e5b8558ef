"""Measure what a solver asks for: solve with unknown points at their bounds, measure what the plan uses, repeat.

1. *Optimism*. Every solver is given the model with its unknown points at their bounds (`LatencyModel.hopeful`). What
   its choice uses and is unknown is measured, all solvers' points in one call. Then it is asked again.
2. *End*. A choice all of whose points are measured is promised what it takes, and no other configuration is promised
   more than it takes, as long as the bounds hold. So it is the optimum of the complete table, within the gap that the
   solver proved. This is the argument of A*.
3. After `ROUNDS` rounds the estimates themselves count: what is chosen under them is measured, and the last choice
   that is measured stands.
4. Where nothing can be measured, the table being of another device, estimates are all there is.

5. *Walk*. A profile without a task in view measures the plans of some budgets, the least of all among them, under
   *neutral* losses: ``(1 - width / size)^2`` for widths and ranks, `STRUCTURE` for a change of structure. Engines of
   these plans calibrate the model along the way from the dense network to the quickest one.

A figure of another device is an estimate as well, so rule 4 says so in the report (`LatencyModel.share_estimated`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sluice.core.errors import Unreachable
from sluice.core.latency import LatencyModel
from sluice.profiler.view import Profile
from sluice.solver.decide import Choice, decide, least_ms, restricted

__all__ = ["Solve", "by_need", "solve_by_need", "walk"]

ROUNDS, LAST = 24, 4
SHARES = (0.75, 0.5, 0.35, 0.25)  # of the dense milliseconds, of the plans of a walk
STRUCTURE = 0.3
Solve = Callable[[LatencyModel], Choice]


def solve_by_need(profile: Profile, solve: Solve) -> Choice:
    """The choice of one solver, its points measured.

    Raises:
        Unreachable: even at the bounds nothing reaches what is asked.
    """
    (found,) = by_need(profile, [solve])
    if isinstance(found, Unreachable):
        raise found
    return found


def by_need(profile: Profile, solvers: Sequence[Solve]) -> list[Choice | Unreachable]:
    """What every solver chooses, all points of the choices measured; in place of a choice, why there is none."""
    found: dict[int, Choice | Unreachable] = {}
    for attempt in range(ROUNDS + LAST):
        model = profile.latency
        given = model.hopeful() if attempt < ROUNDS and profile.open else model
        wanted = []
        for k, solve in enumerate(solvers):
            if k in found:
                continue
            try:
                choice = solve(given)
            except Unreachable as error:
                found[k] = error
                continue
            missing = [choice.widths] if profile.open and not profile.knows(choice.widths) else []
            wanted += missing
            if not missing or attempt == ROUNDS + LAST - 1:
                found[k] = replace(choice, promised_ms=model.ms(choice.widths))
        if not wanted:
            break
        profile.ask(wanted)
    return [found[k] for k in range(len(solvers))]


def walk(profile: Profile, methods: Sequence[str], shares: Sequence[float] = SHARES) -> None:
    """Measure the plans and engines of rule 5; ``shares`` of the dense milliseconds out of reach are left out."""
    sites = profile.options.sites(profile.latency, methods)
    losses = neutral_losses(restricted(profile.latency, sites))
    dense_ms = profile.latency.dense_ms()

    def plan(share: float) -> Solve:
        return lambda latency: decide(restricted(latency, sites), losses, share * dense_ms)

    solvers: list[Solve] = [lambda latency: least_ms(restricted(latency, sites)), *map(plan, shares)]
    chosen = [choice.widths for choice in by_need(profile, solvers) if not isinstance(choice, Unreachable)]
    profile.time_engines(chosen)


def neutral_losses(model: LatencyModel) -> dict[str, np.ndarray]:
    """Losses that know no task (rule 5), for every site that may move."""
    losses = {}
    for site, levels in model.levels.items():
        if len(levels) > 1:
            size = model.dense[site]
            values = np.asarray(levels, dtype=np.float64)
            moved = STRUCTURE * np.abs(values - size) if site in model.switches else (1.0 - values / size) ** 2
            losses[site] = moved if not site.endswith("|dense") else np.zeros(len(levels))
    return losses
