"""How a network is trained after the cut: one frozen value, the optimizer and the schedule that follow from it.

With ``n`` steps, of which ``w = warmup * n`` warm up, the rate of step ``k`` is ``lr * f(k)``:

    f(k) = (k + 1) / w             for k < w, at most 1
    f(k) = g((k - w) / (n - w))    afterwards; g(t) is (1 + cos(pi t)) / 2, 1 - t, or 1

No constant rate serves every cut: a light one wants a small rate, since much may be spoilt, a deep one a rate that is
ten times as large. So the rate is by default found by trial (`sluice.training.trial`), on the grid `RATES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn

from sluice.core.errors import SluiceError

__all__ = ["AUTO", "RATES", "WEIGHT_DECAY", "MakeOptimizer", "Rate", "Recovery", "cosine"]

AUTO: Final = "auto"
WEIGHT_DECAY = 1e-2
# Factors of about three: finer steps would change a result less than the seed does.
RATES = {"adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
MOMENTUM = 0.9
_FALLING: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1.0 - t,
    "constant": lambda t: 1.0,
}
PARAMETRISATIONS = (AUTO, "plain", "dense")

# (parameters, learning rate) -> optimizer
MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
Rate = float | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """The training of the slim network: rate, optimizer, schedule, parametrisation.

    Args:
        lr: a number, which is obeyed; ``"auto"`` finds it by trial, and with it the loss, where that is the default
            one, and the parametrisation.
        optimizer: ``"adamw"``, ``"sgd"`` (momentum 0.9, Nesterov's), or a function of (parameters, lr). A function
            decays weights as it likes, and its rates are sought on the grid of AdamW.
        weight_decay: of ``"adamw"`` and ``"sgd"``.
        warmup: share of the steps in which the rate rises to ``lr``.
        schedule: ``"cosine"`` or ``"linear"``, both to zero, or ``"constant"``.
        parametrisation: ``"plain"``, ``"dense"`` (`sluice.training.dense_parametrisation`), or ``"auto"``: by trial
            where the rate is, else plain.
        compensate: refit the weights by least squares on unlabelled inputs right after the cut
            (`sluice.training.compensate`); None does so where nothing is trained afterwards.
    Raises:
        SluiceError: a value that is none of these.
    """

    lr: Rate = AUTO
    optimizer: str | MakeOptimizer = "adamw"
    weight_decay: float = WEIGHT_DECAY
    warmup: float = 0.05
    schedule: str = "cosine"
    parametrisation: str = AUTO
    compensate: bool | None = None

    def __post_init__(self) -> None:
        rate = self.lr
        if rate != AUTO and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise SluiceError(f"the learning rate lr={rate!r} is no positive number; give one, or 'auto'")
        if not callable(self.optimizer) and self.optimizer not in RATES:
            raise SluiceError(
                f"optimizer={self.optimizer!r} is unknown; give one of {list(RATES)}, or a function of (parameters, lr)"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise SluiceError(f"weight_decay={self.weight_decay!r} must not be negative; give 0 or more")
        if not 0 <= self.warmup < 1:
            raise SluiceError(f"warmup={self.warmup!r} is no share of the steps; give 0 or more, below 1")
        for name, known in (("schedule", tuple(_FALLING)), ("parametrisation", PARAMETRISATIONS)):
            if getattr(self, name) not in known:
                raise SluiceError(f"{name}={getattr(self, name)!r} is unknown; give one of {list(known)}")

    def rates(self) -> tuple[float, ...]:
        """Those that a trial compares: the grid of the optimizer, or the one that is given."""
        if self.lr != AUTO:
            return (float(self.lr),)
        return RATES[self.optimizer] if isinstance(self.optimizer, str) else RATES["adamw"]

    def middle(self) -> float:
        """The rate where there is nothing to try one with."""
        return self.rates()[len(self.rates()) // 2]

    def optimizer_of(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters, lr)
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.weight_decay)

    def factor(self, total: int | None) -> Callable[[int], float]:
        """``f`` over ``total`` steps; 1 throughout where the length is unknown."""
        if not total:
            return lambda step: 1.0
        warm, falling = self.warmup * total, _FALLING[self.schedule]
        return lambda step: (
            min(1.0, (step + 1) / warm) if step < warm else falling(min(1.0, (step - warm) / (total - warm)))
        )


def cosine(total: int | None) -> Callable[[int], float]:
    """Half a cosine from 1 to 0 over ``total`` steps; 1 throughout where the length is unknown."""
    return Recovery(warmup=0.0).factor(total)
