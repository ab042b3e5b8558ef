"""A weight as the product of two thinner ones: matricisations, truncated SVD, factors in layer shapes.

The weight ``W`` of a convolution without groups has shape ``(n, c, *k)``, ``K = prod(k)``; that of a linear layer is
``(n, c)``, ``K = 1``. Each form reads it as a matrix ``M``; the rank-``r`` approximation ``M ~ U S V^T`` becomes two
layers, ``sqrt(S) V^T`` first, then ``U sqrt(S)``:

    form      matrix M                first layer           second layer           multiply-accumulates
    kxk-1x1   n x (c K)               k, c -> r             1, r -> n              out r (c K + n)
    1x1-kxk   (n K) x c               1, c -> r             k, r -> n              in r c + out r n K
    kx1-1xk   (n k_w) x (c k_h)       (k_h, 1), c -> r      (1, k_w), r -> n       mid r c k_h + out r n k_w

1. ``in``, ``out`` are the spatial sizes (elements) at either end, ``mid = H_out * W_in``.
2. Stride, padding and dilation of an axis go to the layer that has the kernel of that axis. The first layer has no
   bias, so it maps padding to zeros, and all three forms are exact for every stride, zero padding and dilation.
3. Both factors carry ``sqrt(S)``, so that they train at one learning rate. Signs are fixed: in every column of ``U``
   the entry of largest magnitude is positive.

Sources: the first form is TRP's "NC" (Xu et al., TRP, IJCAI 2020) and scheme 1 of Idelbayev and Carreira-Perpinan (CVPR
2020); the third is their scheme 2, the separable filters of Jaderberg et al. (BMVC 2014), vertical one first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.plan import Factorize

__all__ = [
    "Split",
    "check_form",
    "factor_macs",
    "factor_shapes",
    "factors",
    "first_name",
    "forms_of",
    "matrix",
    "max_rank",
    "per_axis",
    "random_factors",
    "second_name",
    "singular_values",
    "truncations",
    "unmatrix",
    "useful_rank",
]

Shape = tuple[int, ...]
Split = Callable[[np.ndarray, str, int], tuple[np.ndarray, np.ndarray]]
T = TypeVar("T")


def first_name(param: str) -> str:
    """Name of the factor that is applied first (of ``V``)."""
    return f"{param}_v"


def second_name(param: str) -> str:
    """Name of the factor that is applied second (of ``U``)."""
    return f"{param}_u"


def forms_of(shape: Sequence[int]) -> tuple[str, ...]:
    """The forms that differ for a weight of this shape ``(n, c, *k)``; none for a vector."""
    long = sum(size > 1 for size in shape[2:])
    if len(shape) < 2:
        return ()
    if not long:
        return ("kxk-1x1",)
    return ("kxk-1x1", "1x1-kxk", "kx1-1xk") if long == len(shape) - 2 == 2 else ("kxk-1x1", "1x1-kxk")


def check_form(edit: Factorize, shape: Sequence[int]) -> None:
    """Raise `SluiceError` where the weight has no such form."""
    if edit.form not in forms_of(shape):
        raise SluiceError(
            f"cannot factorize {edit.param!r} of shape {tuple(shape)} in the form {edit.form!r}: it has "
            f"{list(forms_of(shape))}; use one of these or leave the weight dense"
        )


def per_axis(form: str, values: Sequence[T], neutral: T) -> tuple[list[T], list[T]]:
    """One value per spatial axis (kernel, stride, padding, dilation) -> those of the first and of the second layer."""
    none = [neutral] * len(values)
    if form == "kxk-1x1":
        return list(values), none
    if form == "1x1-kxk":
        return none, list(values)
    return [values[0], neutral], [neutral, values[1]]


def matrix(weight: np.ndarray, form: str) -> np.ndarray:
    """The weight ``(n, c, *k)`` as the matrix of the form."""
    n, c = weight.shape[:2]
    if form == "kxk-1x1":
        return weight.reshape(n, -1)
    if form == "1x1-kxk":
        return np.moveaxis(weight, 1, -1).reshape(-1, c)
    height, width = weight.shape[2:]
    return weight.transpose(0, 3, 1, 2).reshape(n * width, c * height)


def unmatrix(values: np.ndarray, shape: Sequence[int], form: str) -> np.ndarray:
    """Inverse of `matrix` for a weight of shape ``(n, c, *k)``."""
    n, c, *kernel = shape
    if form == "kxk-1x1":
        return values.reshape(n, c, *kernel)
    if form == "1x1-kxk":
        return np.moveaxis(values.reshape(n, *kernel, c), -1, 1)
    height, width = kernel
    return values.reshape(n, width, c, height).transpose(0, 2, 3, 1)


def max_rank(shape: Sequence[int], form: str) -> int:
    """The smaller side of the form's matrix; factors of this rank are exact."""
    n, c = shape[:2]
    first, second = (math.prod(k) for k in per_axis(form, shape[2:], 1))
    return min(n * second, c * first)


def factor_shapes(shape: Sequence[int], form: str, rank: int) -> tuple[Shape, Shape]:
    """Shapes ``(r, c, *k1)`` and ``(n, r, *k2)`` of the factors, ``r`` the rank or the largest there is."""
    n, c = shape[:2]
    first, second = per_axis(form, shape[2:], 1)
    r = min(rank, max_rank(shape, form))
    return (r, c, *first), (n, r, *second)


def factor_macs(
    shape: Sequence[int],
    form: str,
    rank: int,
    *,
    out_area: int,
    in_area: int | None = None,
    mid_area: int | None = None,
) -> int:
    """Multiply-accumulates of both layers for one example.

    Args:
        out_area: output positions: ``H_out * W_out`` of a convolution, rows that a linear layer is applied to.
        in_area: input positions, which the form 1x1-kxk pays for; ``out_area`` if not given.
        mid_area: ``H_out * W_in``, which the form kx1-1xk pays for; ``sqrt(in * out)`` if not given, which is right
            where both axes shrink alike.
    """
    in_area = out_area if in_area is None else in_area
    mid_area = math.isqrt(in_area * out_area) if mid_area is None else mid_area
    first, second = factor_shapes(shape, form, rank)
    area = {"kxk-1x1": out_area, "1x1-kxk": in_area, "kx1-1xk": mid_area}[form]
    return area * math.prod(first) + out_area * math.prod(second)


def useful_rank(
    shape: Sequence[int], form: str, *, out_area: int = 1, in_area: int | None = None, mid_area: int | None = None
) -> int:
    """The largest rank with fewer multiply-accumulates than the dense layer, at least 1; areas as in `factor_macs`."""
    dense = out_area * math.prod(shape)
    one = factor_macs(shape, form, 1, out_area=out_area, in_area=in_area, mid_area=mid_area)
    return max(1, min((dense - 1) // one, max_rank(shape, form)))


def factors(weight: np.ndarray, form: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the best approximation of at most this rank (Eckart-Young), in the dtype of the weight.

    Args:
        weight: ``(n, c, *k)``.
    Returns:
        Arrays of the shapes of `factor_shapes`. The SVD is computed in float64.
    Raises:
        SluiceError: the weight is not finite.
    """
    u, s, vt = _svd(weight, form)
    (r, *first), (n, _, *second) = factor_shapes(weight.shape, form, rank)
    u, s, vt = u[:, :r], np.sqrt(s[:r]), vt[:r]
    left, right = u * s, s[:, None] * vt
    return (
        np.ascontiguousarray(right.reshape(r, *first), dtype=weight.dtype),
        np.ascontiguousarray(np.moveaxis(left.reshape(n, *second, r), -1, 1), dtype=weight.dtype),
    )


def truncations(weight: np.ndarray, form: str) -> Callable[[int], np.ndarray]:
    """By rank the weight of the one layer that equals the two of `factors`, in the shape and dtype of ``weight``.

    All ranks come from one SVD; a rank that cuts nothing leaves the weight as it is.
    """
    u, s, vt = _svd(weight, form)

    def at(rank: int) -> np.ndarray:
        if rank >= len(s):
            return weight
        product = (u[:, :rank] * s[:rank]) @ vt[:rank]
        return np.ascontiguousarray(unmatrix(product, weight.shape, form), dtype=weight.dtype)

    return at


def singular_values(weight: np.ndarray, form: str) -> np.ndarray:
    """Singular values of the form's matrix, float64, decreasing."""
    return np.linalg.svd(_finite(weight, form), compute_uv=False)


def random_factors(weight: np.ndarray, form: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal values in the shapes of `factors`, for timing: layers that keep the scale of their inputs, without SVD."""
    rng = np.random.default_rng(0)
    first, second = (
        (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))).astype(weight.dtype)
        for shape in factor_shapes(weight.shape, form, rank)
    )
    return first, second


def _finite(weight: np.ndarray, form: str) -> np.ndarray:
    values = matrix(weight, form).astype(np.float64)
    if not np.isfinite(values).all():
        raise SluiceError(
            f"cannot factorize a weight of shape {weight.shape}: it holds NaN or infinity; train the model again"
        )
    return values


def _svd(weight: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(_finite(weight, form), full_matrices=False)
    largest = np.abs(u).argmax(axis=0)
    sign = np.where(u[largest, np.arange(len(s))] < 0, -1.0, 1.0)
    return u * sign, s, sign[:, None] * vt
