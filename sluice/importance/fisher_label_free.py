"""Scores of channels without labels, where the network is its own teacher.

The distillation loss of a network against itself is at its minimum: its gradient is zero, and so are first-order
scores. The loss of removing channel j is of second order. With J_j the derivative of the outputs by the mask m_j, and F
the curvature of the loss in the outputs (for a likelihood: the Fisher information of the outputs),

    s_j = mean over samples of  (m_j J_j)^T F (m_j J_j),      loss without j, less the loss  ~  s_j / 2.

1. *Projection*: if v is random with ``E[v v^T] = F``, then ``s_j = E[(m_j v^T J_j)^2]``, and ``v^T J`` is one backward
   pass that starts with v in place of the gradient of a loss. With v the gradient of ``-log p(y)`` for y drawn from
   the network's own p, this is the true Fisher information, as opposed to the empirical one of labels (Kunstner et al.
   2019; Martens 2020); the v below have the same covariance, and lighter tails than that of rare draws. Using
   them as importance of channels is a reconstruction.
2. With signs u = +-1, independent and even, and p the probabilities of an output:
   categorical, outputs are logits: ``v = sqrt(p) u - p (sqrt(p) . u)``, covariance ``diag(p) - p p^T``;
   bernoulli, outputs are probabilities: ``v = u / sqrt(p (1 - p))``;
   gaussian, outputs are values: ``v = u``, so s_j is the squared change of the outputs.
3. The v of different samples are independent, so the square of their sum over ``sqrt(samples)`` has the mean of the
   samples' squares for its expectation: no pass per sample is needed. The relative deviation of a score is about
   ``sqrt(2 / (batches * draws))``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError
from sluice.passes.gates.gating import Gated
from sluice.training.train import Data, call, on_device, split_batch

__all__ = ["Outputs", "label_free_scores"]

Outputs = Literal["categorical", "bernoulli", "gaussian"]
TINY = 1e-12  # a probability that has rounded to 0 or 1 has no gradient to multiply


def _categorical(logits: Tensor, signs: Tensor) -> Tensor:
    p = torch.softmax(logits, -1)
    root = p.sqrt()
    return root * signs - p * (root * signs).sum(-1, keepdim=True)


def _bernoulli(probabilities: Tensor, signs: Tensor) -> Tensor:
    if float(probabilities.min()) < 0 or float(probabilities.max()) > 1:
        raise SluiceError(
            f"outputs of shape {tuple(probabilities.shape)} lie outside 0 to 1, so they are no probabilities; "
            "take outputs='categorical' for logits, or 'gaussian'"
        )
    return signs / (probabilities * (1 - probabilities)).clamp(min=TINY).sqrt()


def _gaussian(values: Tensor, signs: Tensor) -> Tensor:
    return signs


_ROOTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}


def label_free_scores(
    gated: Gated, data: Data, *, batches: int = 8, outputs: Outputs = "categorical", draws: int = 16, seed: int = 0
) -> dict[str, np.ndarray]:
    """One-shot importance without labels: ``E[(m_j dL/dm_j)^2]``, float64 ``(size,)`` for every group.

    Weights, statistics, gates and the state of torch's random numbers are left as they were.

    Args:
        data: batches ``(inputs, labels)`` or inputs alone; labels are not read, and at most ``batches`` batches.
        outputs: what the network's outputs are, all axes but the last being samples: logits of a softmax over the last
            axis, independent probabilities, or plain values.
        draws: backward passes per batch.
        seed: of the random signs; the same for the same seed.
    Raises:
        SluiceError: an argument is out of range, there is no batch, or the scores are zero or not finite.
    """
    if outputs not in _ROOTS:
        raise SluiceError(f"outputs={outputs!r} is not known; choose one of {', '.join(map(repr, _ROOTS))}")
    if batches < 1 or draws < 1:
        raise SluiceError(f"batches={batches} and draws={draws}: both must be at least 1")
    state = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    training = gated.training
    generator = torch.Generator().manual_seed(seed)
    total = {site: np.zeros(gate.size) for site, gate in gated.gates.items()}
    seen = 0
    gated.eval()
    for _, gate in gated.gates.items():
        gate.train()
    try:
        for batch in itertools.islice(data, batches):
            inputs, _ = on_device(split_batch(batch), gated)
            leaves = [t for t in pytree.tree_leaves(call(gated, inputs)) if isinstance(t, Tensor) and t.requires_grad]
            if not leaves:
                raise SluiceError("no output of the model depends on its gates; give the gated network of the model")
            for left in reversed(range(draws)):
                for _, gate in gated.gates.items():
                    gate.fisher.zero_()
                starts = [_start(leaf.detach(), outputs, generator) for leaf in leaves]
                torch.autograd.backward(leaves, starts, retain_graph=left > 0)
                for site, gate in gated.gates.items():
                    total[site] += gate.fisher.double().cpu().numpy()
                gated.zero_grad()
            seen += 1
    finally:
        gated.zero_grad()
        gated.load_state_dict(state)
        gated.train(training)
    if not seen:
        raise SluiceError("data has no batches; give at least one")
    scores = {site: sums / (seen * draws) for site, sums in total.items()}
    if not 0 < sum(float(s.sum()) for s in scores.values()) < np.inf:
        raise SluiceError(
            "the importance of all channels is zero or not finite: the outputs do not move with the masks; "
            "check the weights and the data for NaN, or train with gates first"
        )
    return scores


def _start(leaf: Tensor, outputs: str, generator: torch.Generator) -> Tensor:
    """v of every sample, over the root of their number."""
    signs = 2 * torch.randint(2, leaf.shape, generator=generator).to(leaf) - 1
    samples = max(1, leaf[..., 0].numel()) if leaf.ndim else 1
    return _ROOTS[outputs](leaf, signs) / samples**0.5
