"""What a channel is worth, in the currency of the loss.

1. *Fisher*: ``I_j = sum over batches of (d loss / d m_j)^2`` at the mask m of the channel (first-order Taylor of the
   change when the channel goes, squared so that batches add up: Molchanov et al. 2019, eq. 8). Gates collect it while
   they train; `fisher_scores` collects it on a few batches without training (one-shot mode).
2. *Learned*: after training, a channel whose gate closed is worth little whatever its gradient now says. The score is
   the Fisher sum damped by the soft mask that training left, ``I_j * sigmoid(a_j)^2``.
3. Scores of one group are shares of what the group contributes; sums over channels are what the solver maximises.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from sluice.errors import SluiceError
from sluice.gates import Gates
from sluice.passes.gating import Gated
from sluice.train import Data, Loss, default_loss, split_batch

__all__ = ["fisher_scores", "learned_scores"]


def fisher_scores(
    gated: Gated, data: Data, *, teacher: nn.Module | None = None, loss: Loss = default_loss, batches: int = 8
) -> dict[str, np.ndarray]:
    """One-shot importance on up to ``batches`` batches; weights, statistics and gates are left as they were.

    Raises:
        SluiceError: the scores are zero or not finite, as they are for a loss that compares a network with itself.
    """
    state = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    training = gated.training
    gated.eval()
    for _, gate in gated.gates.items():
        gate.train()
        gate.fisher.zero_()
    for batch in itertools.islice(data, batches):
        inputs, labels = split_batch(batch)
        with torch.no_grad():
            taught = teacher(*inputs) if teacher is not None else None
        gated.zero_grad()
        outputs = gated(*inputs)
        value = nn.functional.cross_entropy(outputs, labels) if taught is None else loss(outputs, taught, labels)
        value.backward()
    scores = {site: gate.fisher.detach().double().cpu().numpy().copy() for site, gate in gated.gates.items()}
    gated.zero_grad()
    gated.load_state_dict(state)
    gated.train(training)
    _check(scores)
    return scores


def learned_scores(gates: Gates) -> dict[str, np.ndarray]:
    """Importance after training with gates."""
    scores = {}
    for site, gate in gates.items():
        soft = torch.sigmoid(gate.logit.detach().double())
        scores[site] = (gate.fisher.detach().double() * soft**2).cpu().numpy()
    _check(scores)
    return scores


def _check(scores: dict[str, np.ndarray]) -> None:
    total = sum(float(s.sum()) for s in scores.values())
    if not np.isfinite(total) or total <= 0:
        raise SluiceError(
            f"the importance of all channels sums to {total}: the loss has no gradient at the masks (a network compared "
            "with itself has none); give labels, or train with gates first"
        )
