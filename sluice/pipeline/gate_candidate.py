"""One more candidate of a portfolio: what gates make of its leading plan.

1. Filters, ranks, blocks and merges are gated together, and start at the leading plan (`sluice.passes.gates.start`). So
   the network within the budget is there from the first step, the target need not come down, and the published schedule
   serves in its second part alone, where gates sharpen.
2. Gates and weights train under the budget (`sluice.training.learn_gates`) at the rate that the rehearsal found.
3. The plan is the configuration nearest to the gates' decisions that meets the target on the levels of the table, the
   distance being counted in logits:

       D(w of n)  =  sum of a_j+ over the channels that go  +  sum of a_j- over those that stay
       D(rank r)  =  sum of |log(s_i / tau)| over the singular values between r and the decided rank
       D(switch)  =  CHANNELS times |a| where it differs from the decision

   These take the place of measured losses, and logits that of scores, so the same solver serves, and again where the
   engine misses the budget. That is the strict budget of DF, which a threshold over all logits would find less well: a
   site has few levels.
4. Only the plan is used. The network is cut from the weights that all candidates are cut from, so that their short
   trainings compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import Unreachable
from sluice.passes.gates.filter_gates import BlockGate, Gate
from sluice.passes.gates.gating import Gated
from sluice.passes.gates.merge_gates import MergeGate
from sluice.passes.gates.rank_gates import RankGate
from sluice.passes.gates.start import start_at
from sluice.passes.search_space import SearchSpace
from sluice.pipeline.figures import captured_inputs
from sluice.pipeline.insert import insert_all
from sluice.pipeline.problem import Problem, Solution
from sluice.training.budget import Budget, movable
from sluice.training.learn_gates import learn_gates
from sluice.training.recovery import Recovery
from sluice.training.train import Loss

__all__ = ["GateCandidate", "nearest_to"]

CHANNELS = 32.0  # that a change of structure counts for


@dataclass(frozen=True, slots=True, eq=False)
class GateCandidate:
    """Makes the candidate; ``captured`` and ``space`` are those of the network that all plans are cut from."""

    captured: fx.GraphModule
    space: SearchSpace
    methods: tuple[str, ...]
    teacher: nn.Module
    loss: Loss
    recovery: Recovery
    progress: bool = True

    def learn(
        self, problem: Problem, leader: Solution, target_ms: float, stream: Iterator[Any], steps: int, lr: float
    ) -> Problem | None:
        """The problem whose solution is the candidate; None where no gate can be put in, or training fails.

        Args:
            leader: the plan to start at.
            stream: batches to train on, ``steps`` of them, the weights at rate ``lr``.
        """
        widths = leader.choice.widths
        forms = {o.param: o.form for o in problem.profile.options.ranks if widths.get(o.switch)}
        gated = insert_all(
            self.captured, captured_inputs(self.captured), problem.profile, self.methods, steps=steps,
            space=self.space, forms=forms, merges=True,
        )  # fmt: skip
        if gated is None:
            return None
        start_at(gated.gates, widths, problem.scores)
        try:
            budget = Budget(
                gated, problem.profile, BudgetSpec.parse({"latency_ms": target_ms}), warmup_fraction=0.0
            )  # fmt: skip
        except Unreachable:
            return None
        trained = learn_gates(
            gated, budget, stream, steps, teacher=self.teacher, loss=self.loss, recovery=self.recovery, lr=lr,
            progress=self.progress,
        )  # fmt: skip
        return nearest_to(problem, gated) if trained else None


def nearest_to(problem: Problem, gated: Gated) -> Problem:
    """The problem of rule 3, about the sites that have gates."""
    latency = problem.profile.latency
    losses: dict[str, np.ndarray] = {}
    scores: dict[str, np.ndarray] = {}
    for site, gate in gated.gates.items():
        if site not in latency.levels:
            continue
        levels = np.asarray(latency.levels[site])
        if isinstance(gate, RankGate):
            losses[site] = _of_rank(gate, levels)
        elif isinstance(gate, Gate):
            losses[site] = _of_width(gate, levels)
            scores[site] = np.exp(_logits(gate.logit))
        else:
            losses[site] = _of_switch(gate, levels)
    sites = problem.sites & movable(latency, frozenset(losses))
    return replace(problem, sites=sites, losses=losses, scores={**problem.scores, **scores})


def _logits(logit: torch.Tensor) -> np.ndarray:
    found: np.ndarray = logit.detach().double().cpu().numpy().reshape(-1)
    return found


def _of_width(gate: Gate, levels: np.ndarray) -> np.ndarray:
    ordered = -np.sort(-_logits(gate.logit))
    gone = np.concatenate([[0.0], np.cumsum(np.maximum(ordered, 0.0))])
    stay = np.concatenate([[0.0], np.cumsum(np.maximum(-ordered, 0.0))])
    found: np.ndarray = (gone[-1] - gone[levels]) + stay[levels]
    return found


def _of_rank(gate: RankGate, levels: np.ndarray) -> np.ndarray:
    """Zero at the highest level where the decided rank lies above: the site costs nothing while the layer is dense."""
    values = np.sort(gate.values.detach().double().cpu().numpy())[::-1]
    share = float(gate.theta.detach().exp().clamp(max=1.0))
    apart = np.abs(np.log(np.maximum(values / values[0], 1e-12)) - np.log(share))
    along, decided = np.concatenate([[0.0], np.cumsum(apart)]), min(gate.width(), int(levels[-1]))
    found: np.ndarray = np.abs(along[np.minimum(levels, len(values))] - along[decided])
    return found


def _of_switch(gate: BlockGate | MergeGate, levels: np.ndarray) -> np.ndarray:
    logit = _logits(gate.open.logit if isinstance(gate, BlockGate) else gate.logit)[0]
    found: np.ndarray = CHANNELS * abs(logit) * np.abs(levels - gate.width())
    return found
