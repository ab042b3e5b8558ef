"""Singular value thresholding of weights, with a gradient that is finite everywhere.

    D_tau(M) = U diag(max(s_i - tau, 0)) V^T,                M = U diag(s) V^T        (rank thresholds, DTL-S)

1. With ``n <= m`` (else transposed) ``D_tau(M) = U diag(h) U^T M``, ``h_i = max(1 - tau / s_i, 0)``: the shorter side's
   basis ``U`` is all that is needed. It is an eigenbasis of the Gram matrix ``M M^T``, computed in double precision,
   which leaves singular values an error of 1e-8 of the largest. ``s_i = |u_i^T M|`` and ``v_i = M^T u_i / s_i``.
2. The gradient is that of the operator as a whole. With ``G = dL/dD``, ``f_i = max(s_i - tau, 0)``, ``P = U^T G V`` and
   its symmetric and antisymmetric parts ``Sy``, ``An`` (0/0 = 0):

       dL/dM   = U [ (Ks o Sy + Ka o An) V^T + diag(f/s) (U^T G - P V^T) ]
       Ks_ij   = (f_i - f_j) / (s_i - s_j), of equal pairs the mean of 1[s > tau]        in [0, 1]
       Ka_ij   = (f_i + f_j) / (s_i + s_j)                                               in [0, 1)
       dL/dtau = - sum of P_ii over s_i > tau

   Both kernels are bounded because the operator is 1-Lipschitz. An SVD's own gradient divides by ``s_i^2 - s_j^2`` and
   explodes at close, repeated or zero singular values, of which a network near low rank has many. Where ``s_i = 0`` any
   ``v_i`` would do; ``v_i = 0`` puts its share into the last term.
3. The basis may be older than the weight. ``U diag(h) U^T M`` with ``s_i = |u_i^T M|`` then still has no more ranks
   than there are ``s_i > tau``, but it thresholds the rows of ``U^T M`` instead of the singular directions, and the
   gradient takes those rows for orthogonal. Both errors are of first order in the change of the weight since; with a
   basis of this weight everything is exact. (TRP, Xu et al., IJCAI 2020, truncates at such a period.)

Sources: singular value thresholding, Cai, Candes and Shen 2010, eq. 2.2. The use as a rank gate is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sluice.core.errors import SluiceError
from sluice.core.plan import FORMS

__all__ = ["apply_basis", "basis_of", "matricize", "modified_stable_rank", "svt", "unmatricize"]

TINY = 1e-7  # singular values below this share of the largest have no direction of their own


def matricize(weight: Tensor, form: str) -> Tensor:
    """The weight ``(n, c, *k)`` as the matrix whose low rank makes it two layers of the form
    (`sluice.core.plan.FORMS`)."""
    if form not in FORMS or weight.ndim < 2 or (form == FORMS[2] and weight.ndim != 4):
        raise SluiceError(
            f"a weight of shape {tuple(weight.shape)} has no form {form!r}; forms are {list(FORMS)}, the last one for "
            "two-dimensional convolutions only"
        )
    if form == FORMS[0]:
        return weight.flatten(1)
    if form == FORMS[1]:
        return weight.movedim(1, -1).flatten(0, -2)
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def unmatricize(matrix: Tensor, form: str, shape: Sequence[int]) -> Tensor:
    """Inverse of `matricize` for a weight of this shape."""
    n, c, *kernel = shape
    if form == FORMS[0]:
        return matrix.reshape(n, c, *kernel)
    if form == FORMS[1]:
        return matrix.reshape(n, *kernel, c).movedim(-1, 1)
    height, width = kernel
    return matrix.reshape(n, width, c, height).permute(0, 2, 3, 1)


@torch.no_grad()
def basis_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular directions of the shorter side, and singular values.

    Args:
        matrix: ``(..., n, m)``, finite.
    Returns:
        ``(..., q, q)``, one direction per column, and ``(..., q)``, decreasing; ``q = min(n, m)``.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        short = _wide(matrix.detach()).to(torch.float64)
        squares, basis = torch.linalg.eigh(short @ short.mT)
        dtype = _working(matrix)
        return basis.flip(-1).to(dtype).contiguous(), squares.flip(-1).clamp(min=0.0).sqrt().to(dtype)


def svt(matrix: Tensor, tau: Tensor | float) -> Tensor:
    """``D_tau`` of every matrix ``(..., n, m)``, differentiable in ``matrix`` and in ``tau`` of shape ``(...)``."""
    tau = torch.as_tensor(tau, dtype=_working(matrix), device=matrix.device).expand(matrix.shape[:-2])
    return apply_basis(matrix, tau, basis_of(matrix)[0])[0]


def apply_basis(
    matrix: Tensor,
    tau: Tensor,
    basis: Tensor,
    record: Callable[[Tensor], None] | None = None,
    *,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """``D_tau`` in a given basis of the shorter side.

    Half precision is thresholded in single precision, also under autocast.

    Args:
        matrix: ``(..., n, m)``.
        tau: ``(...)``, positive.
        basis: ``(..., q, q)``, what `basis_of` gave for this or, approximately (rule 3), for an earlier matrix.
        record: called in the backward pass with ``f_i u_i^T G v_i``, shape ``(..., q)``: to first order the change of
            the loss were direction i missing, up to its sign.
        relative: ``tau`` is a share of the largest singular value, which counts as a constant.
    Returns:
        The thresholded matrix and its singular values before, ``(..., q)``, detached.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        dtype = _working(matrix)
        result, values = _Threshold.apply(_wide(matrix).to(dtype), tau.to(dtype), basis.to(dtype), record, relative)
        return _like(result.to(matrix.dtype), matrix), values


class _Threshold(torch.autograd.Function):
    """Rule 2 for matrices at most as high as wide."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, tau: Tensor, basis: Tensor, record: Callable[[Tensor], None] | None, relative: bool
    ) -> tuple[Tensor, Tensor]:
        rows = basis.mT @ matrix
        values = torch.linalg.vector_norm(rows, dim=-1)
        unit = values.amax(-1) if relative else torch.ones_like(tau)
        tau = unit * tau
        kept = (values - tau[..., None]).clamp(min=0.0)
        share = torch.where(kept > 0, kept / values, 0.0)
        ctx.save_for_backward(rows, values, tau, unit, basis)
        ctx.record = record
        ctx.mark_non_differentiable(values)
        return basis @ (share[..., None] * rows), values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, values, tau, unit, basis = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            known = values > TINY * values.amax(-1, keepdim=True)
            right = torch.where(known[..., None], rows / values[..., None], 0.0)
            kept = (values - tau[..., None]).clamp(min=0.0)
            active = kept > 0
            share = torch.where(active, kept / values, 0.0)
            arriving = basis.mT @ gradients[0]
            inner = arriving @ right.mT
            effect = inner.diagonal(dim1=-2, dim2=-1)
            if ctx.record is not None:
                ctx.record(kept * effect)
            symmetric, antisymmetric = _kernels(values, kept)
            mixed = 0.5 * ((symmetric + antisymmetric) * inner + (symmetric - antisymmetric) * inner.mT)
            along = (mixed - share[..., None] * inner) @ right + share[..., None] * arriving
            return basis @ along, -unit * (effect * active).sum(-1), None, None, None


def _kernels(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``Ks`` and ``Ka`` of rule 2, without a quotient of two small differences.

    The larger ``f`` over the gap is ``Ks`` where one of the two is above tau, at least 1 where both are, else 0.
    """
    tiny = torch.finfo(values.dtype).tiny
    row, column = values[..., :, None], values[..., None, :]
    above, beside = kept[..., :, None], kept[..., None, :]
    symmetric = torch.maximum(above, beside).div_((row - column).abs_().clamp_(min=tiny)).clamp_(max=1.0)
    return symmetric, (above + beside).div_((row + column).clamp_(min=tiny))


def modified_stable_rank(weight: Tensor, rank: int) -> Tensor:
    """Tail over head of the singular values, ``sum_{i>rank} s_i / sum_{i<=rank} s_i``, a differentiable scalar.

    Added to the loss it empties the directions that a truncation to ``rank`` would cut; it does not depend on the
    weight's scale. Zero for matrices of no more than ``rank`` rows or columns. The gradient
    ``U_t V_t^T / head - tail / head^2 U_h V_h^T`` (t: tail, h: head) divides by no gap. Of a batch ``(..., n, m)`` the
    mean.

    Source: BSR (Eo et al. 2023) names this regulariser; its formula was not readable: a reconstruction.
    """
    if rank < 1:
        raise SluiceError(f"rank={rank}: the modified stable rank needs a target of at least 1")
    with torch.autocast(weight.device.type, enabled=False):
        matrix = weight.to(_working(weight))
        left, _, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
        values = ((left.mT @ matrix) * right).sum(-1)
        head, tail = values[..., :rank].sum(-1), values[..., rank:].sum(-1)
        return torch.where(head > 0, tail / head.clamp(min=torch.finfo(head.dtype).tiny), 0.0).mean()


def _working(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def _like(result: Tensor, matrix: Tensor) -> Tensor:
    return result.mT if matrix.shape[-2] > matrix.shape[-1] else result
