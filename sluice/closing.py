"""The closed network of a plan: the user's own architecture, computing what the cut network computes.

1. Removed channels carry nothing, dropped branches are gone, weights have the rank that they are given.
2. What a merge makes linear is linear, with the padding of every run in front, as it will be trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from sluice.passes.drop_torch import drop_torch
from sluice.passes.gating import Gated, close_gates
from sluice.passes.merge_torch import linearize_torch
from sluice.passes.options import tie_removed
from sluice.passes.resolve import tensor_masks
from sluice.passes.sites import keep_masks
from sluice.verify import Answer

__all__ = ["close"]


def close(gated: Gated, answer: Answer) -> fx.GraphModule:
    """The closed network: the choice baked into the dense architecture, merged runs linear with padding in front."""
    plan, keeps = answer.plan, keep_masks(gated.meta["analysis"], answer.kept)
    masks = tie_removed(gated.meta["analysis"], plan.merges, keeps)
    kept = {
        g.name: tuple(np.flatnonzero(m).tolist()) for g, m in zip(gated.meta["analysis"].groups, masks, strict=True)
    }
    closed = close_gates(gated, kept, ranks={f.param: (f.form, f.rank) for f in plan.factorizations})
    if plan.merges:
        _close_readers(closed, tensor_masks(gated.meta["analysis"], masks))
    if plan.drops:
        drop_torch(closed, plan.drops)
    if plan.merges:
        linearize_torch(closed, plan.merges)
    closed.recompile()
    return closed


def _close_readers(closed: fx.GraphModule, masks: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Layers that a merge removes may have carried masks; what reads a closed channel reads nothing then either."""
    state = closed.state_dict()
    for (param, axis), mask in masks.items():
        if axis == 1:
            shape = [-1 if d == axis else 1 for d in range(state[param].ndim)]
            state[param].mul_(torch.from_numpy(mask).to(state[param]).reshape(shape))
