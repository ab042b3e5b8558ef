"""The problem that the solver is given, the same for all budgets, and its solution: a choice and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sluice.core.latency import LatencyModel
from sluice.core.plan import InputSpec, Plan
from sluice.passes.cut.resolve import make_plan
from sluice.passes.graph.groups import Analysis
from sluice.profiler.profile import Profile
from sluice.solver.decide import Choice, decide
from sluice.solver.options import chosen_edits

__all__ = ["Problem", "Solution"]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """The problem of one network: which configuration of least loss promises no more than a target.

    Attributes:
        analysis: of the captured module, whose tensors plans name.
        model: the profile's latency model, in which sites that may not move have one level.
        losses: by site, the increase of the loss at each of its levels, shape ``(len(model.levels[site]),)``. The unit
            is the same for all sites: that of the training loss where the losses were measured; for filters alone, the
            share of the loss that removing all channels costs.
        scores: by axis group, the squared change of the loss for each channel, shape ``(size of the group,)``; the
            channels with the lowest scores go first.
    """

    profile: Profile
    analysis: Analysis
    model: LatencyModel
    losses: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    inputs: tuple[InputSpec, ...] = ()

    def solve(self, target_ms: float) -> Solution:
        """The plan of least loss within ``target_ms``."""
        free = {site for site, levels in self.model.levels.items() if len(levels) > 1}
        choice = decide(self.model, {site: v for site, v in self.losses.items() if site in free}, target_ms)
        edits = chosen_edits(self.profile.options, choice.widths)
        kept = choice.kept(self.scores)
        return Solution(choice, kept, make_plan(self.analysis, kept, self.inputs, edits))


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A choice, the channels it keeps by group, and the plan that carries it out."""

    choice: Choice
    kept: Mapping[str, tuple[int, ...]]
    plan: Plan
