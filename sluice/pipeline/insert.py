"""The gates of a network, for the methods on offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx

from sluice.passes.cut.factor import singular_values
from sluice.passes.gates.gating import Gated, insert_gates
from sluice.passes.graph.capture import Inputs
from sluice.passes.search_space import SearchSpace
from sluice.profiler.view import Profile

__all__ = ["insert_all"]

ENERGY = 0.9


def insert_all(
    gm: fx.GraphModule, example_inputs: Inputs, measured: Profile, methods: Sequence[str], *, steps: int,
    space: SearchSpace, forms: Mapping[str, str] | None = None, merges: bool = False,
) -> Gated | None:  # fmt: skip
    """A copy of a captured network with gates for the methods on offer; None where no site has a gate.

    Filters, ranks and blocks are gated together, as in DF. A weight is thresholded in its form in ``forms``, else in
    that which is fastest among ranks that keep `ENERGY` of it. A block whose output no tensor can close has no gate.

    Args:
        merges: gate these as well.
    """
    options = measured.options
    ranks = {**_best_forms(measured, dict(gm.named_parameters())), **(forms or {})} if "rank" in methods else {}
    blocks: dict[str, tuple[str, ...]] = {}
    if "block" in methods:
        known = measured.latency.switches.intersection(options.drops)
        blocks = {b.name: b.closing for b in space.blocks if b.closing and f"{b.name}|drop" in known}
    filters = "filter" in methods and space.analysis.groups
    levels = measured.latency.levels
    offered = {s: m for s, m in options.merges.items() if 1 in levels[s]} if merges and "merge" in methods else {}
    kinds = [k for k, on in (("filter", filters), ("rank", ranks), ("block", blocks), ("merge", offered)) if on]
    if not kinds:
        return None
    return insert_gates(
        gm, example_inputs, steps=steps, space=space, kinds=kinds, ranks=ranks, blocks=blocks, merges=offered
    )  # fmt: skip


def _best_forms(measured: Profile, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    model = measured.latency
    best: dict[str, tuple[float, str]] = {}
    for option in measured.options.ranks:
        values = singular_values(weights[option.param].detach().cpu().numpy(), option.form)
        kept = np.cumsum(values**2) / max(float((values**2).sum()), 1e-30)
        for rank in model.levels[option.rank]:
            if kept[min(rank, len(kept)) - 1] >= ENERGY:
                ms = model.ms({**model.dense, **option.at(rank)})
                best[option.param] = min(best.get(option.param, (np.inf, "")), (ms, option.form))
    return {param: form for param, (_, form) in best.items()}
