"""The recipe by which a network is trained and judged: one value, made from the user's arguments and handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from sluice.core.errors import SluiceError
from sluice.training.recovery import AUTO, Rate, Recovery
from sluice.training.stages import NOTHING, Stages
from sluice.training.train import Data, Loss, count_batches, default_loss

__all__ = ["REHEARSAL", "Evaluate", "Recipe", "recovery_of"]

REHEARSAL = 0.25  # of the epochs of the fine-tune: where the sum is given, epochs are worth more than a better plan
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Data, loss and lengths of every training of one compression.

    ``data``: re-iterable batches, None where nothing is trained or priced with them. The gates train for
    ``gate_epochs`` at the rate of ``recovery`` (1e-3 where that is found by trial), the candidate plans, all together,
    for a share ``rehearsal`` of the epochs (0: no rehearsal), the slim network for ``epochs``, all but the gates as
    ``recovery`` says. ``evaluate`` is the figure of merit of a module, for the report. With ``gates`` there is one
    more candidate, that gates make of the best one (`sluice.pipeline.gate_candidate`); with ``progressive`` one more
    for a deep budget, of a network that comes down in stops (`sluice.pipeline.progressive`). With ``rotate`` the basis
    of attention heads is changed before anything is priced, and their dimensions are widths. What is done is kept in
    ``stages`` (`sluice.training.stages`).

    Raises:
        SluiceError: a rehearsal that is no such share, or epochs that are no whole numbers.
    """

    data: Data | None = None
    loss: Loss = default_loss
    recovery: Recovery = field(default_factory=Recovery)
    gate_epochs: int = 0
    epochs: int = 0
    rehearsal: float = 0.0
    evaluate: Evaluate | None = None
    progress: bool = True
    gates: bool = False
    progressive: bool = False
    rotate: bool = False
    stages: Stages = NOTHING

    def __post_init__(self) -> None:
        for name in ("gate_epochs", "epochs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SluiceError(f"{name}={value!r} is no number of epochs; give a whole number of 0 or more")
        if not isinstance(self.rehearsal, (int, float)) or not 0 <= self.rehearsal <= 10:
            raise SluiceError(
                f"rehearsal={self.rehearsal!r} is no share of the epochs of the fine-tune; give 0.25 for a quarter "
                "as many on top, or 0 for no rehearsal"
            )

    def steps(self) -> int:
        """Of the fine-tune (`count_batches`)."""
        return 0 if self.data is None else self.epochs * count_batches(self.data)

    @property
    def lr(self) -> Rate:
        """The rate of the weights while gates are trained; ``"auto"`` stands for 1e-3 there."""
        return self.recovery.lr


def recovery_of(lr: Rate, recovery: Recovery | None) -> Recovery:
    """What the arguments ``lr=`` and ``recovery=`` say together.

    Raises:
        SluiceError: both say something, or it is no recovery.
    """
    if recovery is None:
        return Recovery(lr)
    if not isinstance(recovery, Recovery):
        raise SluiceError(f"recovery={recovery!r} is no sluice.Recovery; give recovery=Recovery(lr=..., optimizer=...)")
    if lr != AUTO:
        raise SluiceError(
            f"lr={lr!r} and recovery= both say how to train; give the rate as recovery=Recovery(lr={lr!r})"
        )
    return recovery
