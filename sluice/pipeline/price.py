"""From methods and data to the problem that the solver is given.

1. Filters alone are priced by the scores of their channels (`amplitude_losses`), without measuring a loss.
2. As soon as ranks or depth compete, every site is priced in one unit, the measured increase of the loss
   (`sluice.importance.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sluice.core.errors import SluiceError
from sluice.importance.fisher_label_free import label_free_scores
from sluice.importance.loss_increase import LossIncrease
from sluice.importance.sensitivity import measured_losses
from sluice.importance.taylor import fisher_scores
from sluice.passes.gates.gating import Gated, strip_gates
from sluice.passes.graph.capture import input_specs
from sluice.pipeline.bsr import beam_problem
from sluice.pipeline.layermerge import DepthProblem
from sluice.pipeline.problem import Problem
from sluice.profiler.view import Profile
from sluice.solver.amplitude_losses import amplitude_losses
from sluice.solver.decide import restricted
from sluice.solver.options import BSR
from sluice.training.train import Data, Loss, default_loss, split_batch

__all__ = ["one_shot_scores", "price_problem"]


def one_shot_scores(gated: Gated, data: Data, loss: Loss = default_loss) -> dict[str, np.ndarray]:
    """Scores of channels without training, by group.

    They come from labels where the data has labels and the loss is the default one. Else they come from the network's
    own outputs, since a network that is its own teacher has no gradient.
    """
    _, labels = split_batch(next(iter(data)))
    if labels is not None and loss is default_loss:
        return fisher_scores(gated, data)
    return label_free_scores(gated, data, outputs="categorical" if loss is default_loss else "gaussian")


def price_problem(
    gated: Gated,
    measured: Profile,
    methods: Sequence[str],
    scores: Mapping[str, np.ndarray],
    *,
    data: Data | None = None,
    loss: Loss,
    losses: Mapping[str, np.ndarray] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Problem:
    """The problem for these methods (rules 1 and 2); ``losses`` that were measured before are taken as they are."""
    options, analysis = measured.options, gated.meta["space"].analysis
    sites = options.sites(measured.latency, methods)
    model = restricted(measured.latency, sites)
    stripped = strip_gates(gated, thresholded=True).eval()
    groups = {g.name: model.levels[g.name] for g in analysis.groups if g.name in model.levels}
    if tuple(methods) == ("filter",):
        losses = amplitude_losses(groups, scores)
    elif data is None:
        raise SluiceError(f"methods {list(methods)} are priced by measuring the loss; give data")
    elif tuple(methods) == (BSR,):
        return beam_problem(measured, analysis, sites, input_specs(stripped), LossIncrease(stripped, data, loss))
    elif losses is None or {name: len(model.levels.get(name, ())) for name in losses} != _lengths(losses):
        losses = measured_losses(
            stripped, analysis, gated.meta["placement"], model, options, scores, data, loss=loss, advance=advance
        )
    if tuple(methods) == ("merge",):
        return DepthProblem(measured, analysis, sites, losses, scores, input_specs(stripped))
    return Problem(measured, analysis, sites, losses, scores, input_specs(stripped))


def _lengths(losses: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: len(values) for name, values in losses.items()}
