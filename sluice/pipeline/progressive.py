"""One more candidate for a deep cut: the network comes down to its budget in stops, priced anew at each.

    1  ->  s^(1/n)  ->  s^(2/n)  ->  ...  ->  s,    n = round(log2(1 / s)),   s the budget's share of the dense time

1. At a stop the network loses widths alone, to the stop's share of the dense latency, and trains for an equal part of
   the steps. A budget for which n is 1 has no stop.
2. What was trained is written back into the dense architecture: removed channels carry nothing, so the network computes
   what the slim one computes. Channels are scored and choices priced there anew, so prices are those of the trained
   network. A channel that is gone has no score, and costs nothing to remove.
3. So the plan for the budget is a plan for the dense network as any other, with all methods on offer. It is trained for
   a while beside the leading plan, each from its own weights (`sluice.pipeline.choose`).
4. Groups whose channels a layer or group norm takes its statistics over stay whole at a stop: no weight can hold
   their mask. A stop that the others cannot reach ends the way there.

Removal in steps with training between them is that of Han et al. (NeurIPS 2015); the stops by latency, and prices of
several kinds of change at each, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from sluice.core.errors import Unreachable
from sluice.core.plan import Plan
from sluice.core.progress import stage
from sluice.passes.gates.gating import Gated, close_gates, insert_gates, strip_gates
from sluice.passes.graph.placement_torch import normed_groups
from sluice.pipeline.figures import captured_inputs
from sluice.pipeline.kept_stages import loaded_once
from sluice.pipeline.prepare import Prepared, trainable
from sluice.pipeline.price import one_shot_scores, price_problem
from sluice.pipeline.problem import Problem, Solution
from sluice.pipeline.recipe import Recipe
from sluice.training.recovery import AUTO
from sluice.training.rehearse import HELD, Trainee, batches_behind, train_together
from sluice.training.trial import quick_rate

__all__ = ["Descent", "descend", "stops"]

TRIED = 10  # the steps of a stop, by those of a run that finds its rate
RATES = 3  # such runs
LEAST = 8  # steps of one


@dataclass(frozen=True, slots=True, eq=False)
class Descent:
    """The network behind its last stop, as `Prepared` has the dense one, and without its gates."""

    ready: Prepared
    captured: fx.GraphModule

    def build(self, solution: Solution) -> fx.GraphModule:
        """The trainable slim network of a plan."""
        return trainable(self.captured, solution.plan)


def stops(share: float) -> list[float]:
    """The shares of rule 1, without the budget's own."""
    count = round(math.log2(1.0 / share))
    return [share ** (k / count) for k in range(1, count)]


def descend(ready: Prepared, target_ms: float, recipe: Recipe, steps: int) -> Descent | None:
    """Come down to the last stop before ``target_ms`` in ``steps`` steps; None where there is no stop to reach.

    The weights are kept among the stages of the recipe, and found there again.
    """
    assert recipe.data is not None
    shares = stops(target_ms / ready.measured.latency.dense_ms())
    if type(ready.problem) is not Problem or not shares or steps // len(shares) < LEAST * TRIED:
        return None
    captured = ready.captured()
    found = loaded_once(recipe.stages, "stops", captured, lambda: _through(ready, captured, shares, recipe, steps))
    if found is None:
        return None
    gated, scores = _scored(ready, found, recipe)
    with stage("price every choice again", recipe.progress) as advance:
        problem = price_problem(
            gated, ready.measured, ready.methods, scores, data=recipe.data, loss=recipe.loss, advance=advance
        )
    return Descent(replace(ready, gated=gated, problem=problem), strip_gates(gated).eval())


def _through(
    ready: Prepared, captured: fx.GraphModule, shares: Sequence[float], recipe: Recipe, steps: int
) -> fx.GraphModule | None:
    """The network behind the stops that can be reached; None where that is none of them, or training fails."""
    gated, problem, reached = ready.gated, _about_widths(ready.problem, ready.gated), None
    for share in shares:
        choice = problem.estimated(share * ready.measured.latency.dense_ms())  # no promise rests on a stop
        if isinstance(choice, Unreachable):
            break
        solution = problem.solution(choice)
        slim = trainable(captured, solution.plan)
        if not _trained(slim, ready.teacher, recipe, steps // len(shares), f"stop at {share:.0%}"):
            return None
        captured = reached = dense_again(gated, solution, slim)
        if share != shares[-1]:
            gated, scores = _scored(ready, captured, recipe)
            priced = price_problem(gated, ready.measured, ("filter",), scores, loss=recipe.loss)
            problem = _about_widths(priced, gated)
    return reached


def _scored(ready: Prepared, captured: fx.GraphModule, recipe: Recipe) -> tuple[Gated, dict[str, np.ndarray]]:
    """The network with gates, and the scores of its channels."""
    assert recipe.data is not None
    space = ready.gated.meta["space"]
    kinds = ("filter",) if space.analysis.groups and "filter" in ready.methods else ()
    gated = insert_gates(captured, captured_inputs(captured), space=space, kinds=kinds)
    return gated, one_shot_scores(gated, recipe.data, recipe.loss) if kinds else {}


def _about_widths(problem: Problem, gated: Gated) -> Problem:
    """The problem about the widths of rule 4 alone."""
    analysis, profile = problem.analysis, problem.profile
    whole = {analysis.groups[index].name for index in normed_groups(analysis, gated.meta["placement"])}
    widths = profile.options.sites(profile.latency, ["filter"]) & problem.sites
    losses = {site: values for site, values in problem.losses.items() if site in widths}
    return replace(problem, sites=frozenset(widths - whole), losses=losses)


def _trained(slim: fx.GraphModule, teacher: nn.Module, recipe: Recipe, steps: int, name: str) -> bool:
    """Train in place, at a rate that is found first; False where a loss was not finite."""
    assert recipe.data is not None
    probe = steps // TRIED
    rate = quick_rate(
        slim, recipe.data, teacher=teacher, loss=recipe.loss, recovery=recipe.recovery, steps=probe,
        progress=recipe.progress,
    )  # fmt: skip
    left = steps - (RATES * probe if recipe.recovery.lr == AUTO else 0)
    trainee = Trainee(slim, recipe.loss, recipe.recovery, rate, left)
    stream = batches_behind(recipe.data, HELD)
    train_together([trainee], stream, left, teacher=teacher, name=name, progress=recipe.progress)
    return trainee.finite


def dense_again(gated: Gated, solution: Solution, slim: fx.GraphModule) -> fx.GraphModule:
    """The dense architecture with the weights of a slim network that lost widths alone (rule 2)."""
    made, trained = strip_gates(gated, thresholded=True).eval(), slim.state_dict()
    made.load_state_dict(close_gates(gated, solution.kept).state_dict())
    weights = {name for name, tensor in made.named_parameters() if tensor.ndim > 1}
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name in weights:
                tensor.zero_()  # columns of channels that are gone would count among the singular values
            tensor[_places(solution.plan, name, tensor.shape)] = trained[name].to(tensor.device)
    return made


def _places(plan: Plan, name: str, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Where in the dense tensor the slim one lies, as indices that broadcast."""
    kept = {cut.axis: cut.keep for cut in plan.slices if cut.param == name}
    axes = [torch.tensor(kept.get(axis, range(size))) for axis, size in enumerate(shape)]
    return torch.meshgrid(*axes, indexing="ij") if axes else ()
