"""BSR: the ranks of all layers by beam search, then training that empties the cut directions (arXiv 2111.15179).

1. The options of a layer are dense, and every (form, rank) of the latency model that no other one beats in both
   milliseconds and truncation error.
2. `beam_search` picks the state that meets the target with the least loss of the truncated, not fine-tuned network; the
   target is the one hyper-parameter. It is tightened where the savings of the layers do not quite add up.
3. Before the truncation the network trains with ``loss + strength * mean of mSR over the chosen weights`` (modified
   stable rank, `sluice.passes.gates.svt`), which drives the singular values behind the chosen rank towards zero.

Reconstruction: the paper's formulas were not readable (see `sluice.solver.beam_search`, `sluice.passes.gates.svt`). BSR
is the alternative to the rank thresholds and to the joint solver, with the same layers, costs and fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.plan import Factorize, InputSpec
from sluice.importance.loss_increase import LossIncrease
from sluice.passes.cut.factor_torch import truncations_torch
from sluice.passes.cut.resolve import make_plan
from sluice.passes.gates.svt import matricize, modified_stable_rank
from sluice.passes.graph.groups import Analysis
from sluice.pipeline.problem import Problem, Solution
from sluice.profiler.view import Profile
from sluice.solver.beam_search import Option, beam_search
from sluice.solver.decide import Choice, least_ms, restricted, tightened, unreachable
from sluice.solver.options import RankOption, chosen_edits
from sluice.training.train import Loss

__all__ = ["BeamProblem", "beam_problem", "stable_rank_loss"]

STRENGTH = 0.1
Label = tuple[RankOption, int] | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BeamProblem(Problem):
    """A problem whose solutions come from the beam search instead of the solver.

    ``steps`` are the options of every weight, ``score`` is the loss with each at one of them, by position.
    """

    steps: Mapping[str, Sequence[Option]]
    score: Callable[[Mapping[str, int]], float]

    def choose(self, latency: LatencyModel, target_ms: float, near: Mapping[str, int] | None = None) -> Choice:
        model = restricted(latency, self.sites)
        return tightened(target_ms, lambda asked: self._searched(model, asked))

    def solution(self, choice: Choice) -> Solution:
        edits = chosen_edits(self.profile.options, choice.widths)
        return Solution(choice, {}, make_plan(self.analysis, {}, self.inputs, edits))

    def _searched(self, model: LatencyModel, target_ms: float) -> Choice:
        try:
            found = beam_search(self.steps, self.score, model.dense_ms() - target_ms)
        except SluiceError:
            raise unreachable(target_ms, least_ms(model).promised_ms, model.dense_ms(), methods=["bsr"]) from None
        widths = dict(model.dense)
        for option, rank in _labels(self.steps, found.choice):
            widths |= option.at(rank)
        return Choice(widths, model.ms(widths), found.score, 1.0, 0.0, 0.0)


def beam_problem(
    profile: Profile, analysis: Analysis, sites: frozenset[str], inputs: tuple[InputSpec, ...], judge: LossIncrease
) -> BeamProblem:
    """The problem about these ranks, all of them measured. It serves several budgets, so it remembers its scores."""
    state, forms = judge.gm.state_dict(), profile.options.ranks
    latency = profile.latency
    if profile.open:
        profile.ask([{**latency.dense, **o.at(rank)} for o in forms for rank in latency.levels[o.rank]])
    model = restricted(profile.latency, sites)
    cut = {o: truncations_torch(state[o.param], o.form) for o in forms}
    steps = {
        param: _options(model, [o for o in forms if o.param == param], state[param], cut)
        for param in dict.fromkeys(o.param for o in forms)
    }
    known: dict[tuple[int, ...], float] = {}

    def score(at: Mapping[str, int]) -> float:
        key = tuple(at[param] for param in steps)
        if key not in known:
            known[key] = judge.weights({o.param: cut[o](rank) for o, rank in _labels(steps, at)})
        return known[key]

    return BeamProblem(profile, analysis, sites, {}, {}, inputs, steps=steps, score=score)


def _labels(steps: Mapping[str, Sequence[Option]], at: Mapping[str, int]) -> list[tuple[RankOption, int]]:
    """Form and rank of every weight that is not dense in the state ``at``."""
    labels: list[Label] = [steps[param][index].label for param, index in at.items()]  # type: ignore[misc]
    return [label for label in labels if label is not None]


def _options(
    model: LatencyModel, forms: list[RankOption], weight: Tensor, cut: Mapping[RankOption, Callable[[int], Tensor]]
) -> list[Option]:
    """Rule 1, by increasing milliseconds saved."""
    dense = model.dense_ms()
    found = []
    for option in forms:
        for rank in model.levels[option.rank]:
            saved = dense - model.ms({**model.dense, **option.at(rank)})
            error = float((weight - cut[option](rank)).square().sum())
            found.append((saved, error, (option, rank)))
    options: list[Option] = []
    least = float("inf")
    for saved, error, label in sorted(found, key=lambda f: (-f[0], f[1])):
        if saved > 0 and error < least:
            least = error
            if not options or saved < options[-1].saved_ms:
                options.append(Option(label, saved))
    return [Option(None, 0.0), *reversed(options)]


def stable_rank_loss(loss: Loss, module: nn.Module, ranks: tuple[Factorize, ...], strength: float = STRENGTH) -> Loss:
    """Rule 3: the loss with the regulariser of the weights to be factorised."""
    weights = dict(module.named_parameters())

    def regularised(outputs: object, taught: object, labels: object) -> Tensor:
        tails = [modified_stable_rank(matricize(weights[f.param], f.form), f.rank) for f in ranks]
        value = loss(outputs, taught, labels)
        return value + strength * torch.stack(tails).mean() if tails else value

    return regularised
