"""Filter gates (DML-S): one learned logit per channel of an axis group, sharpened on a schedule.

    mask_j = sigmoid(beta * a_j) / sigmoid(beta * a_0),      beta = beta_max ** s
    s = 0 in the first half of the steps, then rising linearly to 1

1. At the start every ``a_j = a_0``: the masks are exactly 1 and the gated network is the network. As beta grows the
   normalising factor tends to 1 (Continuous Sparsification's start as identity, with a growing beta). Masks may rise
   a little above 1; clamping them would leave a gate that drifts up without a gradient for ever.
2. The decision is ``a_j > 0`` for every beta; at least one channel, the best, always stays.
3. A sharp sigmoid has no gradient, so beta stays 1 while the budget comes down (its warm-up is shorter than half of
   the steps) and rises only when the choice is between channels, no longer about their number.
4. Logits take no weight decay; ``gate_parameters`` gives an optimizer its own group for them.
5. While gates train they collect, at no extra pass, ``(m_j * d loss / d m_j)^2`` of the task loss: to first order the
   squared change of the loss were the channel removed (Taylor, or empirical Fisher, importance), in the currency of
   the loss and comparable between groups.

DF names the mask and the schedule but its formulas were not readable: this is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sluice.errors import SluiceError

__all__ = ["Gate", "Gates", "gate_parameters", "other_parameters"]

INITIAL_LOGIT = 2.0
BETA_MAX = 5.0
MEMORY = 0.98  # of the importance, per backward pass: what the network was fifty steps ago no longer counts


class Gate(nn.Module):
    """The learnable mask of one axis group; ``forward()`` returns it, shape ``(size,)``."""

    logit: nn.Parameter
    beta: Tensor
    hard: Tensor
    fisher: Tensor

    def __init__(self, site: str, size: int):
        super().__init__()
        self.site = site
        self.size = size
        self.logit = nn.Parameter(torch.full((size,), INITIAL_LOGIT))
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool))
        self.register_buffer("fisher", torch.zeros(size))

    def forward(self) -> Tensor:
        if bool(self.hard):
            return self.decision().to(self.logit.dtype)
        mask = self._soft()
        if mask.requires_grad and self.training:
            value = mask.detach()
            mask.register_hook(lambda grad: self._record(grad.detach() * value))
        return mask

    def _soft(self) -> Tensor:
        return torch.sigmoid(self.beta * self.logit) / torch.sigmoid(self.beta * INITIAL_LOGIT)

    def _record(self, effect: Tensor) -> None:
        self.fisher.mul_(MEMORY).add_(effect**2)

    def soft_width(self) -> Tensor:
        """Number of open gates, with the gradient of the sum of masks (straight through).

        Counting soft masks would let the budget be met by many half-open gates, and the network collapse when they
        sharpen; counting decisions holds the network that will be cut to the budget.
        """
        soft = self._soft().sum()
        return soft + (self.width() - soft).detach()

    def decision(self) -> Tensor:
        """Boolean mask ``a_j > 0``, never empty."""
        with torch.no_grad():
            mask = self.logit > 0
            mask[self.logit.argmax()] = True
        return mask

    def width(self) -> int:
        return int(self.decision().sum())

    @torch.no_grad()
    def set_decision(self, mask: Tensor) -> None:
        """Move the logits so that the decision is ``mask`` and make the gate hard."""
        magnitude = self.logit.abs().clamp(min=1e-3)
        self.logit.copy_(torch.where(mask, magnitude, -magnitude))
        self.hard.fill_(True)

    def extra_repr(self) -> str:
        return f"{self.site!r}, size={self.size}"


class Gates(nn.Module):
    """All gates of a network and their common schedule; everything survives ``state_dict``."""

    progress: Tensor

    def __init__(self, sizes: Mapping[str, int], steps: int):
        super().__init__()
        if steps < 1:
            raise SluiceError(
                f"steps={steps}: the gate schedule needs at least one optimizer step; pass the number you train"
            )
        self.steps = steps
        self.register_buffer("progress", torch.zeros((), dtype=torch.long))
        self._listener: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._keys = {site: f"g{index}_{site.replace('.', '_').replace('#', '_')}" for index, site in enumerate(sizes)}
        for site, size in sizes.items():
            self.add_module(self._keys[site], Gate(site, size))

    def key(self, site: str) -> str:
        """Name of the submodule that gates ``site``."""
        return self._keys[site]

    def __getitem__(self, site: str) -> Gate:
        gate = self._modules[self._keys[site]]
        assert isinstance(gate, Gate)
        return gate

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def items(self) -> Iterator[tuple[str, Gate]]:
        return ((site, self[site]) for site in self)

    def listen(self, callback: Callable[[], None], release: Callable[[], None]) -> None:
        """Call ``callback`` at every `step`: a budget keeps its schedule so. A new budget takes the old one's place,
        whose ``release`` is called.
        """
        if self._listener is not None:
            self._listener[1]()
        self._listener = (callback, release)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listener": None}  # a copy of the gates has no budget

    def step(self) -> None:
        """Advance the schedule by one optimizer step."""
        with torch.no_grad():
            self.progress += 1
            fraction = min(1.0, float(self.progress) / self.steps)
            for _, gate in self.items():
                gate.beta.fill_(BETA_MAX ** max(0.0, 2.0 * fraction - 1.0))
        if self._listener is not None:
            self._listener[0]()

    def widths(self) -> dict[str, int]:
        return {site: gate.width() for site, gate in self.items()}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Logits of every gate in ``model``: train them with their own learning rate and no weight decay."""
    return [m.logit for m in model.modules() if isinstance(m, Gate)]


def other_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of ``model`` that are not gate logits."""
    logits = {id(p) for p in gate_parameters(model)}
    return [p for p in model.parameters() if id(p) not in logits]
