"""The problem that the solver is given, the same for all budgets, and its solution: a choice and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import Unreachable
from sluice.core.latency import LatencyModel
from sluice.core.plan import InputSpec, Plan
from sluice.passes.cut.resolve import make_plan
from sluice.passes.graph.groups import Analysis
from sluice.profiler.need import by_need, solve_by_need
from sluice.profiler.view import Profile
from sluice.solver.decide import Choice, decide, least_ms, restricted
from sluice.solver.descent import steps_from
from sluice.solver.options import chosen_edits

__all__ = ["Problem", "Solution"]

SURE = 0.8  # of a target: a least latency below this by estimates is not measured to know that the target is reached


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """The problem of one network: which configuration of least loss promises no more than a target.

    Attributes:
        profile: which measures what the solver asks for.
        analysis: of the captured module, whose tensors plans name.
        sites: those that may move; all others stay dense.
        losses: by site, the increase of the loss at each of its levels, shape ``(len(model.levels[site]),)``. The unit
            is the same for all sites: that of the training loss where the losses were measured; for filters alone, the
            share of the loss that removing all channels costs.
        scores: by axis group, the squared change of the loss for each channel, shape ``(size of the group,)``; the
            channels with the lowest scores go first.
    """

    profile: Profile
    analysis: Analysis
    sites: frozenset[str]
    losses: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    inputs: tuple[InputSpec, ...] = ()

    @property
    def model(self) -> LatencyModel:
        """The latency model as it is known now, in which sites that may not move have one level."""
        return restricted(self.profile.latency, self.sites)

    def choose(self, latency: LatencyModel, target_ms: float, near: Mapping[str, int] | None = None) -> Choice:
        """The configuration of least loss that ``latency`` promises within ``target_ms``, or the best ``near`` one."""
        model = restricted(latency, self.sites)
        return decide(model, self._open(model), target_ms, near=near)

    def solution(self, choice: Choice) -> Solution:
        """The choice with its plan."""
        edits, kept = chosen_edits(self.profile.options, choice.widths), choice.kept(self.scores)
        return Solution(choice, kept, make_plan(self.analysis, kept, self.inputs, edits))

    def solve(self, target_ms: float) -> Solution:
        """The plan of least loss within ``target_ms``; what it needs to know is measured."""
        choice = solve_by_need(self.profile, lambda latency, near: self.choose(latency, target_ms, near), self._steps)
        return self.solution(choice)

    def estimated(self, target_ms: float) -> Choice | Unreachable:
        """The choice of least loss where estimates count from the start (`sluice.profiler.need`, 4), or why none."""
        (choice,) = by_need(self.profile, [lambda latency, near: self.choose(latency, target_ms, near)], rounds=0)
        return choice

    def _steps(self, latency: LatencyModel, widths: Mapping[str, int]) -> list[dict[str, int]]:
        """Near configurations that the solver might have preferred, the most likely first."""
        model = restricted(latency, self.sites)
        return steps_from(model, self._open(model), widths)

    def _open(self, model: LatencyModel) -> dict[str, np.ndarray]:
        """The losses of the sites that may move."""
        return {site: values for site, values in self.losses.items() if len(model.levels[site]) > 1}

    def least_from(self, target_ms: float) -> float:
        """The least milliseconds that are reached; where they are far below ``target_ms``, an estimate of them."""
        guess = least_ms(self.model).promised_ms
        if guess <= SURE * target_ms:
            return guess
        return solve_by_need(self.profile, lambda latency, near: least_ms(restricted(latency, self.sites))).promised_ms


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A choice, the channels it keeps by group, and the plan that carries it out."""

    choice: Choice
    kept: Mapping[str, tuple[int, ...]]
    plan: Plan
