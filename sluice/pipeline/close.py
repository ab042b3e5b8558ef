"""The closed network of a plan: the user's own architecture, computing what the slim network computes.

1. Removed channels carry nothing, dropped branches end in zero, weights have the rank of the plan.
2. Merged runs are linear, with the padding of every run in front, in the form in which they are trained.
3. The closed network is compared with those of the rewriters, so it shares as little code with them as possible. A
   branch is cut out only where no tensor of its own makes it zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx

from sluice.core.plan import Drop
from sluice.passes.cut.drop_torch import close_block, drop_torch
from sluice.passes.cut.merge_ties import tie_removed
from sluice.passes.cut.merge_torch import linearize_torch
from sluice.passes.cut.resolve import tensor_masks
from sluice.passes.gates.gating import Gated, close_gates
from sluice.passes.gates.insertion import along
from sluice.passes.graph.blocks import match_drops
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.view_torch import view_torch
from sluice.pipeline.problem import Solution

__all__ = ["close"]


def close(gated: Gated, solution: Solution) -> fx.GraphModule:
    """The closed network: the choice baked into the dense architecture, merged runs linear with padding in front."""
    plan, analysis = solution.plan, gated.meta["space"].analysis
    keeps = keep_masks(analysis, solution.kept)
    masks = tie_removed(analysis, plan.merges, keeps)
    kept = {g.name: tuple(np.flatnonzero(m).tolist()) for g, m in zip(analysis.groups, masks, strict=True)}
    closed = close_gates(gated, kept, ranks={f.param: (f.form, f.rank) for f in plan.factorizations})
    if plan.merges:
        _close_readers(closed, tensor_masks(analysis, masks))
    if plan.drops:
        _close_branches(closed, plan.drops)
    if plan.merges:
        linearize_torch(closed, plan.merges)
    closed.recompile()
    return closed


def _close_branches(closed: fx.GraphModule, drops: Sequence[Drop]) -> None:
    open_ended = []
    for drop, block in zip(drops, match_drops(view_torch(closed), drops), strict=True):
        if block.closing is None:
            open_ended.append(drop)
        else:
            close_block(closed, block)
    if open_ended:
        drop_torch(closed, open_ended)


def _close_readers(closed: fx.GraphModule, masks: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Mask the input axes of weights: the layers that carried these masks may be removed by a merge."""
    state = closed.state_dict()
    for (param, axis), mask in masks.items():
        if axis == 1:
            state[param].mul_(along(torch.from_numpy(mask).to(state[param]), state[param].ndim, axis))
