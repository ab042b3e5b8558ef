"""The measured loss of every level of every site, in one unit: the increase of the training loss.

    loss(site, value) = max(0, L(network with this one change) - L(network))

1. ``L`` is the training loss on a few batches, the dense network being the teacher (`sluice.importance.loss_increase`).
2. Scores (`sluice.importance.taylor`) decide which channels go. The loss of their going is measured, so that widths,
   ranks, blocks and merged runs compare: scores are squared gradients and say nothing about large changes.
3. Not all values of a site are measured, and where noise hides a loss there is a floor (`sluice.importance.curves`).

The solver adds up losses of single changes. That is an assumption, which LayerMerge and every knapsack over layers
makes as well; the plans that follow from it are compared by a short training (`sluice.training.rehearse`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from sluice.core.latency import LatencyModel
from sluice.importance.curves import curve, floored
from sluice.importance.loss_increase import SAMPLES, LossIncrease
from sluice.passes.cut.drop_torch import drop_torch
from sluice.passes.cut.factor_torch import truncations_torch
from sluice.passes.cut.merge_torch import linearize_torch
from sluice.passes.cut.resolve import tensor_masks
from sluice.passes.gates.gating import bake
from sluice.passes.gates.insertion import along
from sluice.passes.graph.groups import Analysis, keep_masks
from sluice.passes.graph.placement_torch import Placement, normed_axes
from sluice.solver.options import EditSpace, RankOption
from sluice.training.train import Data, Loss

__all__ = ["measured_losses"]


def measured_losses(
    gm: fx.GraphModule,
    analysis: Analysis,
    placement: Placement,
    model: LatencyModel,
    options: EditSpace,
    scores: Mapping[str, np.ndarray],
    data: Data,
    *,
    loss: Loss,
    samples: int = SAMPLES,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Loss of every value of every site, shape ``(len(model.levels[site]),)``; zero at the dense value.

    Args:
        gm: captured network without gates; not changed.
        scores: per group, which channels go last (shape ``(size,)``).
        samples: examples of ``data`` to measure on.
    Raises:
        SluiceError: the loss is not finite.
    """
    judge = LossIncrease(gm, data, loss, samples)
    changes: list[_Change] = []
    for group in analysis.groups:
        if len(model.levels.get(group.name, ())) > 1:
            changes.append(_width(judge, analysis, placement, group.name, scores[group.name]))
    for option in options.ranks:
        if len(model.levels.get(option.switch, ())) > 1:
            changes.append(_rank(judge, option))
    for name, drop in options.drops.items():
        if len(model.levels.get(name, ())) > 1:
            changes.append(_restructuring(judge, name, drop.params, partial(drop_torch, drops=[drop])))
    for name, merge in options.merges.items():
        if len(model.levels.get(name, ())) > 1:
            changes.append(_restructuring(judge, name, merge.layers, partial(linearize_torch, merges=[merge])))
    found: dict[str, np.ndarray] = {}
    ranks = {option.rank: option.switch for option in options.ranks}
    changes.sort(key=lambda change: judge.place(change.tensors))  # the order that costs least
    for done, (site, _, increase) in enumerate(changes, 1):
        levels = model.levels[site]
        if site in model.switches:
            found[site] = np.array([0.0, increase(1)])
        elif site in ranks:
            # Even the largest rank is a truncation; its loss is that of the switch.
            losses = curve(levels, increase, dense=None)
            found[ranks[site]] = np.array([0.0, losses[-1]])
            found[site] = losses - losses[-1]
        else:
            found[site] = curve(levels, increase, dense=levels[-1])
        advance(done, len(changes))
    return floored(found, model)


class _Change(NamedTuple):
    """A change at a site, the tensors it begins at, and the increase of the loss at a value."""

    site: str
    tensors: Collection[str]
    increase: Callable[[int], float]


def _width(judge: LossIncrease, analysis: Analysis, placement: Placement, group: str, scores: np.ndarray) -> _Change:
    order = np.argsort(-scores, kind="stable")
    index = next(i for i, g in enumerate(analysis.groups) if g.name == group)
    normed = any(index in axis.groups for norm in placement.norms for axis in normed_axes(analysis, norm))
    state = judge.gm.state_dict()

    def masks(width: int) -> dict[tuple[str, int], np.ndarray]:
        found = tensor_masks(analysis, keep_masks(analysis, {group: order[:width].tolist()}))
        return {at: found[at] for at in sorted(placement.refs & found.keys())}

    def increase(width: int) -> float:
        if normed:  # statistics over the kept channels need another graph
            keeps = keep_masks(analysis, {group: order[:width].tolist()})
            return judge.restructured(lambda g: bake(g, analysis, placement, keeps))
        changed: dict[str, Tensor] = {}
        for (param, axis), mask in masks(width).items():
            value = changed.get(param, state[param])
            changed[param] = value * along(torch.from_numpy(mask).to(value), value.ndim, axis)
        return judge.weights(changed)

    return _Change(group, () if normed else {param for param, _ in masks(1)}, increase)


def _rank(judge: LossIncrease, option: RankOption) -> _Change:
    @cache
    def truncated() -> Callable[[int], Tensor]:  # decomposed when its turn comes
        return truncations_torch(judge.gm.state_dict()[option.param], option.form)

    return _Change(option.rank, [option.param], lambda rank: judge.weights({option.param: truncated()(rank)}))


def _restructuring(
    judge: LossIncrease, site: str, tensors: Sequence[str], change: Callable[[fx.GraphModule], object]
) -> _Change:
    return _Change(site, tensors, lambda _: judge.restructured(change, near=tensors))
