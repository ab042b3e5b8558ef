"""What every choice costs, measured, in one currency: the increase of the loss.

    loss(site, value) = max(0, L(network with this one change) - L(network))

1. ``L`` is the training loss on a few batches, the dense network being the teacher, with batch norm statistics taken
   from those batches: a network with a part removed is judged after what one pass of re-estimation would mend.
2. Which channels go is a matter of their scores (`sluice.passes.importance`); what their going costs is measured, so
   widths, ranks, blocks and merged runs compare. Scores are squared gradients and say nothing about large changes.
3. At most `LEVELS` values of a site are measured, the rest interpolated; losses do not grow with the value.
4. Where noise hides a loss, a `FLOOR` in proportion to what is removed keeps the solver from removing it for nothing.

That single changes add up is an assumption, the same that LayerMerge and every knapsack over layers makes; the choices
it leads to are compared by a short training (`sluice.rehearse`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sluice.errors import SluiceError
from sluice.latency import LatencyModel
from sluice.passes.capture import BatchNorm, clone
from sluice.passes.drop_torch import drop_torch
from sluice.passes.factor_torch import truncations_torch
from sluice.passes.gating import bake
from sluice.passes.insertion import along
from sluice.passes.merge_torch import linearize_torch
from sluice.passes.options import Options, RankOption
from sluice.passes.placement import Placement
from sluice.passes.resolve import tensor_masks
from sluice.passes.sites import Analysis, keep_masks
from sluice.train import Data, Loss, on_device, split_batch

__all__ = ["Judge", "measured_losses"]

LEVELS = 4
SAMPLES = 128
BROKEN = 100.0  # times the network's own loss: what a change costs that makes the loss infinite
FLOOR = 1e-3  # of the median loss of a whole site
Batch = tuple[tuple[Any, ...], Any, Any]  # inputs, what the teacher says, labels


def measured_losses(
    gm: fx.GraphModule,
    analysis: Analysis,
    placement: Placement,
    model: LatencyModel,
    options: Options,
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
    judge = Judge(gm, data, loss, samples)
    changes: dict[str, Callable[[int], float]] = {}
    for group in analysis.groups:
        if len(model.levels.get(group.name, ())) > 1:
            changes[group.name] = _width(judge, analysis, placement, group.name, scores[group.name])
    for option in options.ranks:
        if len(model.levels.get(option.switch, ())) > 1:
            changes[option.rank] = _rank(judge, option)
    for name, drop in options.drops.items():
        if len(model.levels.get(name, ())) > 1:
            changes[name] = lambda _, drop=drop: judge.restructured(lambda g: drop_torch(g, [drop]))  # type: ignore[misc]
    for name, merge in options.merges.items():
        if len(model.levels.get(name, ())) > 1:
            changes[name] = lambda _, m=merge: judge.restructured(lambda g: linearize_torch(g, [m]))  # type: ignore[misc]
    found: dict[str, np.ndarray] = {}
    ranks = {option.rank: option.switch for option in options.ranks}
    for done, (site, change) in enumerate(changes.items(), 1):
        levels = model.levels[site]
        if site in model.switches:
            found[site] = np.array([0.0, change(1)])
        elif site in ranks:
            # Even the largest rank is a truncation; what it costs is the price of the switch.
            curve = _curve(levels, change, dense=None)
            found[ranks[site]] = np.array([0.0, curve[-1]])
            found[site] = curve - curve[-1]
        else:
            found[site] = _curve(levels, change, dense=levels[-1])
        advance(done, len(changes))
    return _floored(found, model)


class Judge:
    """The dense network on fixed batches, and the loss of changed copies of it."""

    def __init__(self, gm: fx.GraphModule, data: Data, loss: Loss, samples: int = SAMPLES):
        self.gm, self.loss = clone(gm), loss
        self.batches: list[Batch] = []
        teacher, seen = clone(gm).eval(), 0
        with torch.no_grad():
            for batch in data:
                inputs, labels = on_device(_at_most(split_batch(batch), samples - seen), gm)
                self.batches.append((inputs, teacher(*inputs), labels))
                seen += len(inputs[0])
                if seen >= samples:
                    break
        _batch_statistics(self.gm)
        self.base = self._loss(self.gm)
        if not np.isfinite(self.base):
            raise SluiceError(f"the loss is {self.base} on the first batches; give data the network was made for")

    def weights(self, changed: Mapping[str, Tensor]) -> float:
        """With other values of some tensors."""
        with _swapped(self.gm, changed):
            return self._increase(self.gm)

    def restructured(self, change: Callable[[fx.GraphModule], object]) -> float:
        """With another graph."""
        copy = clone(self.gm)
        result = change(copy)
        changed = result if isinstance(result, nn.Module) else copy
        _batch_statistics(changed)
        return self._increase(changed)

    def _increase(self, changed: nn.Module) -> float:
        value = self._loss(changed)
        return max(0.0, value - self.base) if np.isfinite(value) else BROKEN * (1.0 + abs(self.base))

    def _loss(self, module: nn.Module) -> float:
        with torch.no_grad():
            values = [float(self.loss(module(*inputs), taught, labels)) for inputs, taught, labels in self.batches]
        return float(np.mean(values))


def _width(
    judge: Judge, analysis: Analysis, placement: Placement, group: str, scores: np.ndarray
) -> Callable[[int], float]:
    order = np.argsort(-scores, kind="stable")
    index = next(i for i, g in enumerate(analysis.groups) if g.name == group)
    normed = any((analysis.values[name].groups == index).any() for name in placement.norms)

    def change(width: int) -> float:
        keeps = keep_masks(analysis, {group: order[:width].tolist()})
        if normed:  # statistics over the kept channels need another graph
            return judge.restructured(lambda g: bake(g, analysis, placement, keeps))
        state = judge.gm.state_dict()
        changed: dict[str, Tensor] = {}
        masks = tensor_masks(analysis, keeps)
        for param, axis in sorted(placement.refs & masks.keys()):
            value = changed.get(param, state[param])
            changed[param] = value * along(torch.from_numpy(masks[(param, axis)]).to(value), value.ndim, axis)
        return judge.weights(changed)

    return change


def _rank(judge: Judge, option: RankOption) -> Callable[[int], float]:
    truncated = truncations_torch(judge.gm.state_dict()[option.param], option.form)
    return lambda rank: judge.weights({option.param: truncated(rank)})


def _curve(levels: Sequence[int], change: Callable[[int], float], dense: int | None) -> np.ndarray:
    """Losses at all levels from `LEVELS` measured ones, not growing with the level."""
    open_levels = [level for level in levels if level != dense]
    count = min(LEVELS, len(open_levels))
    picked = sorted({open_levels[round(float(k))] for k in np.linspace(0, len(open_levels) - 1, count)})
    values = [change(level) for level in picked]
    if dense is not None:
        picked, values = [*picked, dense], [*values, 0.0]
    falling = np.maximum.accumulate(np.array(values)[::-1])[::-1]
    return np.asarray(np.interp(levels, picked, falling))


def _floored(losses: dict[str, np.ndarray], model: LatencyModel) -> dict[str, np.ndarray]:
    tops = [float(values.max()) for values in losses.values() if values.max() > 0]
    floor = FLOOR * float(np.median(tops)) if tops else 1.0
    found = {}
    for site, values in losses.items():
        levels = np.asarray(model.levels[site], float)
        removed = levels if site in model.switches else 1.0 - levels / levels[-1]
        found[site] = values + floor * removed
    return found


def _batch_statistics(module: nn.Module) -> None:
    module.eval()
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.train()
            part.momentum = 0.0


def _at_most(batch: tuple[tuple[Any, ...], Any], count: int) -> tuple[tuple[Any, ...], Any]:
    """The first examples of a batch, where all its tensors have as many."""
    sizes = {len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim}
    if len(sizes) != 1 or max(sizes) <= count:
        return batch
    cut: tuple[tuple[Any, ...], Any] = pytree.tree_map_only(Tensor, lambda t: t[:count] if t.ndim else t, batch)
    return cut


@contextmanager
def _swapped(module: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    state = module.state_dict(keep_vars=True)
    old = {name: state[name].data for name in changed}
    try:
        for name, value in changed.items():
            state[name].data = value
        yield
    finally:
        for name, value in old.items():
            state[name].data = value
