"""What merges take away from a graph, fading with the shares of their gates (`sluice.passes.gates.merge_gates`).

With ``q`` the sum of the shares of the merges that take a value away, it becomes ``(1 - q) value + q before``:

1. An activation inside a merged segment becomes its input, a convolution that a merge removes, with its norm, the value
   that it reads, and the sum of a block that a merge empties its shortcut.
2. All these merges hold one layer, so ``q < 1``.
3. Padding stays where it is. A merged run pads in front, and what its border loses is left to the training after the
   cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from sluice.core.plan import Merge
from sluice.passes.cut.merge_region import find_region
from sluice.passes.gates.insertion import TAG
from sluice.passes.gates.merge_gates import MergeGate
from sluice.passes.graph.chains_torch import activation_source, chains_torch

__all__ = ["FadingValue", "MergeShares", "fade", "fading_values"]

FadingValue = tuple[str, str]  # names of a value and of the one that it becomes


class MergeShares(nn.Module):
    """``q`` of every fading value, shape ``(values,)``."""

    inside: Tensor

    def __init__(self, gates: Sequence[MergeGate], inside: Tensor):
        super().__init__()
        self.gates = tuple(gates)
        self.register_buffer("inside", inside, persistent=False)

    def forward(self) -> Tensor:
        return self.inside @ torch.cat([gate() for gate in self.gates])


def fading_values(gm: fx.GraphModule, merges: Mapping[str, Merge]) -> dict[FadingValue, list[str]]:
    """By value that fades, of a graph without gates, the switches of the merges that it fades with.

    Raises:
        SluiceError: a merge does not fit the graph.
    """
    chains = chains_torch(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    found: dict[FadingValue, list[str]] = {}
    for site, merge in merges.items():
        region = find_region(chains, merge)
        fading = [(act, activation_source(nodes[act]).name) for act in region.acts]
        fading += [(v.out, v.source) for v in region.layers if v.weight not in region.kept]
        fading += [(span.add, span.source) for span in region.emptied]
        for pair in fading:
            found.setdefault(pair, []).append(site)
    return found


def fade(
    gm: fx.GraphModule, gates: nn.Module, merged: Sequence[MergeGate], values: Mapping[FadingValue, list[str]]
) -> None:
    """Let values of ``gm``, which has ``gates`` under this name, fade by rule 1."""
    sites = [gate.site for gate in merged]
    inside = torch.tensor([[float(site in own) for site in sites] for own in values.values()])
    gates.add_module("merged", MergeShares(merged, inside.to(merged[0].logit)))
    nodes = {node.name: node for node in gm.graph.nodes}
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
        shares = gm.graph.call_module("gates.merged")
    shares.meta = {TAG: "mask"}
    for index, (name, source) in enumerate(values):
        value, before = nodes[name], _kept_whole(gm, nodes[name], nodes[source])
        with gm.graph.inserting_after(value):
            share = gm.graph.call_function(torch.ops.aten.select.int, (shares, 0, index))
        with gm.graph.inserting_after(share):
            faded = gm.graph.call_function(torch.ops.aten.lerp.Tensor, (value, before, share))
        share.meta, faded.meta = {TAG: "mask"}, {**value.meta, TAG: "fade"}
        value.replace_all_uses_with(faded, delete_user_cb=lambda user, own=faded: user is not own)
        nodes[name] = faded


def _kept_whole(gm: fx.GraphModule, value: fx.Node, source: fx.Node) -> fx.Node:
    """The value to fade to: a copy of ``source``, made behind it, where an operator on the way overwrites it."""
    changes = any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable for user in source.users
    )
    if not changes:
        return source
    with gm.graph.inserting_after(source):
        copy = gm.graph.call_function(torch.ops.aten.clone.default, (source,))
    copy.meta = {**source.meta, TAG: "mask"}
    return copy
