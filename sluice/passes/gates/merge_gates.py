"""Gates over merges: which runs of convolutions become one, as a choice that can be trained.

LayerMerge chooses for every segment of a chain whether it is merged. Here every segment m on offer has a logit, and its
share of the network is a softmax over the segments that it cannot stand beside, those with a layer in common:

    p_m = exp(beta a_m) / (1 + sum over n that share a layer with m, m included, of exp(beta a_n))

1. Of a layer no more than the whole is merged: the shares of all segments that hold it add up to less than 1.
2. The decision is ``a_m > 0`` and larger than the logits of all that exclude m, for every beta. It is never of two
   segments with a layer in common.

What a merge takes away fades with its share (`sluice.passes.gates.fading`). LayerMerge solves a dynamic programme over
measured importances; the softmax is a reconstruction of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sluice.core.plan import Merge

__all__ = ["MergeGate", "exclude_each_other"]

STRENGTH = 0.5  # of a logit at the start


class MergeGate(nn.Module):
    """The share of one merge, shape ``(1,)``; its site is the switch of the merge, 1 where it is carried out."""

    logit: nn.Parameter
    beta: Tensor
    hard: Tensor
    fisher: Tensor

    def __init__(self, site: str):
        super().__init__()
        self.site = site
        self.size = 1
        self.rivals: tuple[MergeGate, ...] = ()
        self.logit = nn.Parameter(torch.full((1,), -STRENGTH))
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool))
        self.register_buffer("fisher", torch.zeros(1))  # stays zero: the losses of merges are measured

    def forward(self) -> Tensor:
        if bool(self.hard):
            return self.logit.new_tensor([float(self.width())])
        others = [self.logit.new_zeros(1), *(rival.beta * rival.logit for rival in self.rivals)]
        return torch.sigmoid(self.beta * self.logit - torch.cat(others).logsumexp(0))

    def soft_width(self) -> Tensor:
        """Value of the switch, with the gradient of the share."""
        share = self.forward().sum()
        return share + (self.width() - share).detach()

    def width(self) -> int:
        own = float(self.logit.detach())
        return int(own > max([0.0, *(float(rival.logit.detach()) for rival in self.rivals)]))

    @torch.no_grad()
    def start(self, merged: bool) -> None:
        """Lean towards the decision ``merged``; together, those that are not merged have no more than a share."""
        self.logit.fill_(STRENGTH if merged else -STRENGTH - math.log1p(len(self.rivals)))

    def sharpen(self, beta: float) -> None:
        self.beta.fill_(beta)

    def extra_repr(self) -> str:
        return f"{self.site!r}, {len(self.rivals)} rivals"


def exclude_each_other(merges: Mapping[str, Merge]) -> list[MergeGate]:
    """A gate per switch, each with those whose merges have a layer in common with its own as rivals."""
    gates = {site: MergeGate(site) for site in merges}
    for site, merge in merges.items():
        others = (o for o in merges if o != site and not set(merges[o].layers).isdisjoint(merge.layers))
        gates[site].rivals = tuple(gates[other] for other in others)
    return list(gates.values())
