"""Gates over filters (DML-S) and blocks, and the schedule that they share with rank gates.

A filter gate has one learned logit per channel of an axis group:

    mask_j = sigmoid(beta * a_j) / sigmoid(beta * a_0),      beta = beta_max ** s
    s = 0 in the first half of the steps, then rising linearly to 1

1. At the start every ``a_j = a_0``: the masks are exactly 1 and the gated network computes what the dense one computes.
   As beta grows the normalising factor tends to 1 (Continuous Sparsification's start as identity, with a growing
   beta). Masks may rise a little above 1: a gate that drifts up behind a clamp would have no gradient for ever.
2. The decision is ``a_j > 0`` for every beta; at least one channel, the best, always stays.
3. A sharp sigmoid has no gradient. So beta stays 1 while the budget comes down (its warm-up is shorter than half of the
   steps), and rises only when the number of channels is found and the choice between them is left.
4. Logits take no weight decay; ``gate_parameters`` gives an optimizer its own group for them.
5. While gates train they collect, at no extra pass, ``(m_j * d loss / d m_j)^2`` of the task loss: to first order the
   squared change of the loss were the channel removed (Taylor, or empirical Fisher, importance), in the unit of the
   loss and comparable between groups.
6. A block gate is a filter gate of one channel, the whole residual branch, and may close.

Rank gates, which put a thresholded weight in the weight's place, are in `sluice.passes.gates.rank_gates`, gates over
merges in `sluice.passes.gates.merge_gates`.

The paper (DF) names the mask and the schedule, but its formulas were not readable: a reconstruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.passes.gates.merge_gates import MergeGate
from sluice.passes.gates.rank_gates import MEMORY, RankGate, renew

__all__ = ["MEMORY", "REFRESH", "BlockGate", "Gate", "Gates", "RankGate", "gate_parameters", "other_parameters"]

INITIAL_LOGIT = 2.0
BETA_MAX = 5.0
REFRESH = 8  # steps for which singular directions are kept


class Gate(nn.Module):
    """The learnable mask of one axis group; ``forward()`` returns it, shape ``(size,)``.

    ``least`` is the number of channels that always stay, 0 or 1.
    """

    logit: nn.Parameter
    beta: Tensor
    hard: Tensor
    fisher: Tensor

    def __init__(self, site: str, size: int, least: int = 1):
        super().__init__()
        self.site = site
        self.size = size
        self.least = least
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

        If soft masks were counted, many half-open gates could meet the budget, and the network would collapse when they
        sharpen. So decisions are counted: the network that will be cut meets the budget.
        """
        soft = self._soft().sum()
        return soft + (self.width() - soft).detach()

    def decision(self) -> Tensor:
        """Boolean mask ``a_j > 0``, never of fewer than ``least``."""
        with torch.no_grad():
            mask = self.logit > 0
            if self.least:
                mask[self.logit.argmax()] = True
        return mask

    def width(self) -> int:
        return int(self.decision().sum())

    @torch.no_grad()
    def open_all(self) -> None:
        """Every mask 1, as at the start."""
        self.logit.fill_(INITIAL_LOGIT)
        self.hard.fill_(False)

    @torch.no_grad()
    def set_decision(self, mask: Tensor) -> None:
        """Move the logits so that the decision is ``mask`` and make the gate hard."""
        magnitude = self.logit.abs().clamp(min=1e-3)
        self.logit.copy_(torch.where(mask, magnitude, -magnitude))
        self.hard.fill_(True)

    def sharpen(self, beta: float) -> None:
        self.beta.fill_(beta)

    def extra_repr(self) -> str:
        return f"{self.site!r}, size={self.size}"


class BlockGate(nn.Module):
    """The mask of a residual branch, shape ``(1,)``; its site is the switch ``<block>|drop``, 1 where it is gone."""

    def __init__(self, block: str):
        super().__init__()
        self.site = f"{block}|drop"
        self.size = 1
        self.open = Gate(self.site, 1, least=0)

    def forward(self) -> Tensor:
        mask: Tensor = self.open()
        return mask

    @property
    def fisher(self) -> Tensor:
        return self.open.fisher

    def soft_width(self) -> Tensor:
        """Value of the switch, with the gradient of the mask."""
        return 1.0 - self.open.soft_width()

    def width(self) -> int:
        return 1 - self.open.width()

    def set_decision(self, dropped: bool) -> None:
        self.open.set_decision(torch.tensor([not dropped], device=self.open.logit.device))

    def sharpen(self, beta: float) -> None:
        self.open.sharpen(beta)


AnyGate = Gate | RankGate | BlockGate | MergeGate


class Gates(nn.Module):
    """All gates of a network and their common schedule; everything survives ``state_dict``.

    Args:
        sizes: channels by axis group.
        steps: optimizer steps over which the gates harden.
        ranks: rank gates.
        blocks: names of residual branches.
        merges: gates over merges.
        refresh: steps between two computations of singular directions; 1 is exact.
    """

    progress: Tensor

    def __init__(
        self,
        sizes: Mapping[str, int],
        steps: int,
        ranks: Iterable[RankGate] = (),
        blocks: Iterable[str] = (),
        merges: Iterable[MergeGate] = (),
        refresh: int = REFRESH,
    ):
        super().__init__()
        if steps < 1:
            raise SluiceError(
                f"steps={steps}: the gate schedule needs at least one optimizer step; pass the number you train"
            )
        if refresh < 1:
            raise SluiceError(f"refresh={refresh}: singular directions last at least one step; pass a positive number")
        self.steps, self.refresh_every = steps, refresh
        self.register_buffer("progress", torch.zeros((), dtype=torch.long))
        self._listener: tuple[Callable[[], None], Callable[[], None]] | None = None
        gates: list[AnyGate] = [Gate(site, size) for site, size in sizes.items()]
        gates += [*ranks, *[BlockGate(block) for block in blocks], *merges]
        self._keys = {
            gate.site: f"g{index}_{re.sub(r'[^A-Za-z0-9_-]', '_', gate.site)}" for index, gate in enumerate(gates)
        }
        for gate in gates:
            self.add_module(self._keys[gate.site], gate)

    def key(self, site: str) -> str:
        """Name of the submodule that gates ``site``."""
        return self._keys[site]

    def __getitem__(self, site: str) -> AnyGate:
        gate = self._modules[self._keys[site]]
        assert isinstance(gate, AnyGate)
        return gate

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def items(self) -> Iterator[tuple[str, AnyGate]]:
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
                gate.sharpen(BETA_MAX ** max(0.0, 2.0 * fraction - 1.0))
        if self._listener is not None:
            self._listener[0]()

    def refresh(self, weight: Callable[[str], Tensor]) -> None:
        """Compute the singular directions of the weights anew if they are due, equal shapes in one batch."""
        if int(self.progress) % self.refresh_every:
            return
        batches: dict[Any, list[tuple[RankGate, Tensor]]] = {}
        for _, gate in self.items():
            if isinstance(gate, RankGate):
                tensor = weight(gate.param)
                batches.setdefault((gate.form, tensor.shape, tensor.dtype), []).append((gate, tensor))
        for members in batches.values():
            renew(*zip(*members, strict=True))

    def widths(self) -> dict[str, int]:
        """The decided value of every site."""
        return {site: gate.width() for site, gate in self.items()}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Logits and thresholds of every gate in ``model``: they need their own learning rate and no weight decay."""
    own = [m for m in model.modules() if isinstance(m, Gate | MergeGate | RankGate)]
    return [m.theta if isinstance(m, RankGate) else m.logit for m in own]


def other_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of ``model`` that are not a gate's."""
    gates = {id(p) for p in gate_parameters(model)}
    return [p for p in model.parameters() if id(p) not in gates]
