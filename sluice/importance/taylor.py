"""Scores of channels, in the unit of the squared loss.

1. *Taylor*: ``s_j = sum over batches of (m_j * d loss / d m_j)^2`` at the mask m of the channel: to first order the
   squared change of the loss when the channel goes (Molchanov et al. 2019, eq. 8). Gates collect it while they train;
   `fisher_scores` collects it on a few batches without training (one-shot mode, every mask 1).
2. After training with gates a channel whose gate has closed contributes little, and its score is small: the learned
   logits enter through m.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError
from sluice.passes.gates.filter_gates import Gate, Gates
from sluice.passes.gates.gating import Gated
from sluice.training.train import Data, Given, Loss, call, default_loss, on_device, split_batch

__all__ = ["fisher_scores", "learned_scores"]

# The gradient of a network compared with itself is rounding error, not exactly zero. It is told from a real gradient by
# that of a teacher whose outputs are off by this share: squared, the errors are a hundred-millionth of it.
ASIDE = 1e-3
LEAST = 1e-6


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

    def collect(inputs: Given, taught: Any, labels: Any) -> None:
        gated.zero_grad()
        outputs = call(gated, inputs)
        value = _cross_entropy(outputs, labels) if teacher is None else loss(outputs, taught, labels)
        value.backward()

    aside = 0.0
    try:
        for index, batch in enumerate(itertools.islice(data, batches)):
            inputs, labels = on_device(split_batch(batch), gated)
            with torch.no_grad():
                taught = call(teacher, inputs) if teacher is not None else None
            if teacher is not None and index == 0:
                collect(inputs, pytree.tree_map_only(Tensor, lambda x: x * (1 + ASIDE), taught), labels)
                aside = sum(float(gate.fisher.sum()) for _, gate in gated.gates.items())
                for _, gate in gated.gates.items():
                    gate.fisher.zero_()
            collect(inputs, taught, labels)
            if teacher is not None and index == 0:
                _check(_collected(gated.gates), LEAST * aside)
        scores = _collected(gated.gates)
    finally:
        gated.zero_grad()
        gated.load_state_dict(state)
        gated.train(training)
    _check(scores)
    return scores


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits ``(..., classes)`` with labels ``(...)``, as in `sluice.training.distill`."""
    if labels.shape == outputs.shape[:-1]:
        outputs, labels = outputs.flatten(0, -2), labels.reshape(-1)
    return nn.functional.cross_entropy(outputs, labels)


def learned_scores(gates: Gates) -> dict[str, np.ndarray]:
    """Importance after training with gates.

    Raises:
        SluiceError: the gates collected nothing.
    """
    scores = _collected(gates)
    if not any(s.any() for s in scores.values()):
        raise SluiceError("the gates collected no importance; call gated.train() before the training loop")
    _check(scores)
    return scores


def _collected(gates: Gates) -> dict[str, np.ndarray]:
    """Scores of axis groups; the losses of ranks and blocks are measured (`sluice.importance.sensitivity`)."""
    found = {site: gate.fisher for site, gate in gates.items() if isinstance(gate, Gate)}
    return {site: fisher.detach().double().cpu().numpy().copy() for site, fisher in found.items()}


def _check(scores: dict[str, np.ndarray], least: float = 0.0) -> None:
    total = sum(float(s.sum()) for s in scores.values())
    if not np.isfinite(total) or total <= least:
        raise SluiceError(
            f"the importance of all channels sums to {total:.3g}: the loss has no gradient at the masks (a network "
            "compared with itself has none); give labels, or train with gates first"
        )
