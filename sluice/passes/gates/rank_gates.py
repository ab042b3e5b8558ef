"""Rank gates (DTL-S): one learned threshold per weight, and the thresholded weight in the weight's place.

    M -> D_tau(M) = U diag(max(s - tau, 0)) V^T (`sluice.passes.gates.svt`),  tau = s_1 exp(theta),  theta <= log 0.999
    soft rank = sum_i sigmoid(kappa log(s_i / tau)),                          kappa = the filter gates' beta

1. The threshold is relative to the largest singular value, so that one learning rate fits every layer; ``s_1`` counts
   as a constant, and the cap keeps a rank of one. ``tau`` starts at a tenth of the smallest singular value, within
   [0.001, 0.01] ``s_1``: the gated network is almost the network, and no threshold has far to go.
2. The rank is ``#(s_i > tau)``, with the gradient of the soft rank (straight through) in which ``s`` is a constant: the
   budget moves thresholds, not weights. The sigmoid is taken of ``log(s / tau)`` rather than of ``s / tau - 1``. Both
   are the same to first order, but the latter has no gradient at all while ``tau`` is far below every singular value,
   as it is at the start.
3. Singular directions are computed anew every few steps (`sluice.passes.gates.filter_gates.Gates.refresh`), at every
   change of mode, and in eval mode whenever the weight has changed; in between they are kept
   (`sluice.passes.gates.svt`, rule 3).
4. Importance of direction i is ``(f_i u_i^T G v_i)^2``, ``f_i = max(s_i - tau, 0)``: the score of a mask on its present
   contribution. It is collected in the backward pass of the weight itself.

The paper (DF) names the threshold, but its formulas were not readable: a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.passes.gates.svt import apply_basis, basis_of, matricize, unmatricize

__all__ = ["MEMORY", "RankGate", "renew"]

INITIAL_THRESHOLD = 0.1  # relative to the smallest singular value
INITIAL_RANGE = (1e-3, 1e-2)  # of it, relative to the largest
HIGHEST_THRESHOLD = 0.999
MEMORY = 0.98  # of the importance, per backward pass: steps more than fifty ago hardly count


class RankGate(nn.Module):
    """The rank threshold of the weight ``param`` in one form; ``forward(weight)`` returns the thresholded weight.

    Its site is the rank ``<param>|<form>|rank``. Singular values and importance are listed by singular direction, the
    largest first when the directions were last computed.
    """

    theta: nn.Parameter
    kappa: Tensor
    hard: Tensor
    limit: Tensor
    values: Tensor
    fisher: Tensor
    basis: Tensor

    def __init__(self, param: str, form: str, weight: Tensor):
        super().__init__()
        self.param, self.form = param, form
        self.site = f"{param}|{form}|rank"
        matrix = matricize(weight, form)
        self.size = min(matrix.shape)
        self.theta = nn.Parameter(torch.zeros((), device=weight.device))
        self.register_buffer("kappa", torch.ones((), device=weight.device))
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool, device=weight.device))
        self.register_buffer("limit", torch.tensor(self.size, device=weight.device))
        self.register_buffer("values", torch.zeros(self.size, device=weight.device))
        self.register_buffer("fisher", torch.zeros(self.size, device=weight.device))
        self.register_buffer("basis", torch.zeros(0), persistent=False)
        self.register_load_state_dict_post_hook(_forget)
        renew([self], [weight])
        least = float(self.values[-1] / self.values[0].clamp(min=1e-30))
        nn.init.constant_(self.theta, math.log(min(max(INITIAL_THRESHOLD * least, INITIAL_RANGE[0]), INITIAL_RANGE[1])))

    @torch.no_grad()
    def thresholded(self, weight: Tensor) -> Tensor:
        """The thresholded weight, in directions of its own; for hard gates the weight at the decided rank."""
        matrix = matricize(weight, self.form)
        basis, _ = basis_of(matrix)
        return unmatricize(self._applied(matrix, basis)[0], self.form, weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if fresh := self._stale:
            renew([self], [weight])
        matrix = matricize(weight, self.form)
        result, values = self._applied(matrix, self.basis)
        if not (self.training or fresh or torch.equal(values, self.values)):  # the weight has changed
            renew([self], [weight])
            result, values = self._applied(matrix, self.basis)
        self.values = values
        return unmatricize(result, self.form, weight.shape)

    def _applied(self, matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        record = self._record if self.training and torch.is_grad_enabled() else None
        result, values = apply_basis(matrix, self._share(), basis, record, relative=True)
        if bool(self.hard) and int(self.limit) < self.size:
            left = basis[:, values.topk(int(self.limit)).indices].to(matrix.dtype)
            tall = matrix.shape[0] > matrix.shape[1]
            result = result @ left @ left.mT if tall else left @ (left.mT @ result)
        return result, values

    def _share(self) -> Tensor:
        """``exp(theta)``, capped; beyond the cap the gradient still passes, so that the threshold can come back."""
        capped = self.theta.clamp(max=math.log(HIGHEST_THRESHOLD))
        return (self.theta + (capped - self.theta).detach()).exp()

    def _record(self, effect: Tensor) -> None:
        self.fisher.mul_(MEMORY).add_(effect.detach() ** 2)

    def soft_width(self) -> Tensor:
        """The rank, with the gradient of the soft rank in ``theta``."""
        values = self.values.float()
        above = (values / values.amax().clamp(min=1e-30)).clamp(min=1e-30).log() - self._share().log()
        soft = torch.sigmoid(self.kappa * above).sum()
        return soft + (self.width() - soft).detach()

    def width(self) -> int:
        """``#(s_i > tau)``, at least 1; in hard mode no more than the decided rank."""
        with torch.no_grad():
            count = int((self.values > self._share() * self.values.amax()).sum())
        return max(1, min(count, int(self.limit)) if bool(self.hard) else count)

    @torch.no_grad()
    def set_decision(self, rank: int) -> None:
        """Cut the thresholded weight to ``rank`` and make the gate hard; the threshold stays as it was trained."""
        if not 1 <= rank <= self.size:
            raise SluiceError(f"rank {rank} of {self.param!r} is not within 1 to {self.size}; give one that is")
        self.limit.fill_(rank)
        self.hard.fill_(True)

    def sharpen(self, beta: float) -> None:
        with torch.no_grad():
            self.kappa.fill_(beta)
            self.theta.clamp_(max=math.log(HIGHEST_THRESHOLD))

    def train(self, mode: bool = True) -> RankGate:
        self._stale = True
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.site!r}, size={self.size}"


def _forget(gate: nn.Module, keys: Any) -> None:
    gate._stale = True  # type: ignore[assignment]


def renew(gates: Sequence[RankGate], weights: Sequence[Tensor]) -> None:
    """New singular directions of weights of one shape and form, in one batch."""
    matrices = [matricize(w.detach(), gate.form) for gate, w in zip(gates, weights, strict=True)]
    stacked = torch.stack(matrices)
    if not bool(stacked.isfinite().all()):
        bad = next(gate.param for gate, matrix in zip(gates, matrices, strict=True) if not matrix.isfinite().all())
        raise SluiceError(f"weight {bad!r} is not finite any more; lower the learning rate")
    bases, values = basis_of(stacked)
    for gate, basis, own in zip(gates, bases, values, strict=True):
        gate.basis, gate.values, gate._stale = basis.clone(), own.clone(), False
