"""The recipe by which a network is trained and judged: one value, made from the user's arguments and handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sluice.core.errors import SluiceError
from sluice.training.train import Data, Loss, default_loss

__all__ = ["Evaluate", "Recipe"]

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Data, loss and lengths of every training of one compression.

    ``data``: re-iterable batches, None where nothing is trained or priced with them. The gates train for
    ``gate_epochs``, plans for ``rehearsal`` optimizer steps (0: no rehearsal), the slim network for ``epochs``.
    ``evaluate`` is the figure of merit of a module, for the report.

    Raises:
        SluiceError: a negative rehearsal.
    """

    data: Data | None = None
    loss: Loss = default_loss
    lr: float = 1e-3
    gate_epochs: int = 0
    epochs: int = 0
    rehearsal: int = 0
    evaluate: Evaluate | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.rehearsal < 0:
            raise SluiceError(f"rehearsal={self.rehearsal}: give the number of training steps, or 0 for no rehearsal")
