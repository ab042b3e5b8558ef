"""Singular value thresholding against its definition, its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sluice.core.errors import SluiceError
from sluice.core.plan import FORMS
from sluice.passes.gates.svt import apply_basis, basis_of, matricize, modified_stable_rank, svt, unmatricize
from sluice.runtime.base.compare import assert_close, relative_error

SHAPES = {"square": (5, 5), "tall": (7, 3), "wide": (3, 8), "batch": (2, 4, 6), "batch of tall": (3, 5, 2)}


def definition(matrix: Tensor, tau: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ ((values - tau[..., None]).clamp(min=0)[..., None] * right)


def with_values(shape: tuple[int, ...], values: list[float], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return left @ (torch.tensor(values, dtype=torch.float64)[:, None] * right)


def numeric(function, at: Tensor, direction: Tensor, step: float = 1e-5) -> float:  # type: ignore[no-untyped-def]
    return float((function(at + step * direction) - function(at - step * direction)) / (2 * step))


def check_gradient(matrix: Tensor, tau: Tensor, tolerance: float = 2e-7) -> None:
    """Along random directions and along those of single entries, of a generic linear function of the result."""
    torch.manual_seed(1)
    weights = torch.randn_like(matrix)

    def value(m: Tensor, t: Tensor) -> Tensor:
        return (weights * definition(m, t)).sum()

    m, t = matrix.clone().requires_grad_(), tau.clone().requires_grad_()
    by_matrix, by_tau = torch.autograd.grad((weights * svt(m, t)).sum(), (m, t))
    numbers, found = [], []
    for _ in range(6):
        direction = torch.randn_like(matrix)
        numbers.append(numeric(lambda x: value(x, tau), matrix, direction))
        found.append(float((by_matrix * direction).sum()))
    assert_close(torch.tensor(found), torch.tensor(numbers), tolerance)
    shift = torch.rand_like(tau) + 0.5
    assert_close((by_tau * shift).sum(), torch.tensor(numeric(lambda x: value(matrix, x), tau, shift)), tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient(name: str) -> None:
    torch.manual_seed(3)
    matrix = torch.randn(SHAPES[name], dtype=torch.float64)
    tau = 0.55 * torch.linalg.svdvals(matrix)[..., 0]
    assert_close(svt(matrix, tau), definition(matrix, tau), 1e-9)
    ranks = (torch.linalg.svdvals(matrix) > tau[..., None]).sum(-1)
    assert torch.equal(torch.linalg.matrix_rank(svt(matrix, tau)), ranks) and ranks.min() < min(matrix.shape[-2:])
    check_gradient(matrix, tau)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((4, 4), [2.0, 2.0, 0.5, 0.5]),
        ((6, 4), [3.0, 2.0, 2.0, 2.0]),
        ((3, 5), [0.4, 0.4, 0.3]),
        ((4, 4), [2.0, 1.5, 0.0, 0.0]),
        ((7, 4), [2.0, 1.5, 0.3, 0.0]),
        ((4, 9), [2.0, 0.6, 0.0, 0.0]),
        ((3, 5), [1.5, 1.5, 0.0]),
        ((3, 3), [0.0, 0.0, 0.0]),
    ],
)
def test_gradient_at_repeated_and_zero_singular_values(shape: tuple[int, int], values: list[float]) -> None:
    check_gradient(with_values(shape, values), torch.tensor(1.0, dtype=torch.float64))


def test_gradcheck() -> None:
    """Every entry of the Jacobian, with active and inactive directions."""
    matrix = with_values((4, 6), [2.0, 1.3, 0.8, 0.1]).requires_grad_()
    tau = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(svt, (matrix, tau), atol=1e-7)


def test_finite_where_the_svd_is_not() -> None:
    matrix = torch.eye(4).requires_grad_()
    weights = torch.arange(16.0).reshape(4, 4)
    naive = torch.autograd.grad((weights * definition(matrix, torch.tensor(0.5))).sum(), matrix)[0]
    assert not naive.isfinite().all()
    for m in (torch.eye(4), torch.zeros(4, 4), torch.ones(4, 6), 1e-30 * torch.ones(6, 4)):
        m.requires_grad_()
        w = torch.arange(float(m.numel())).reshape(m.shape)
        gradient = torch.autograd.grad((w * svt(m, 0.5)).sum(), m)[0]
        assert gradient.isfinite().all()
        assert gradient.norm() <= w.norm() * (1 + 1e-5)  # the operator is 1-Lipschitz


def test_gradient_is_bounded_at_near_ties() -> None:
    """In single precision, pairs on either side of the threshold."""
    torch.manual_seed(0)
    for gap in (0.0, 1e-7, 1e-6, 1e-3):
        matrix = with_values((5, 8), [2.0, 1.0 + gap, 1.0, 1.0 - gap, 0.2]).float().requires_grad_()
        g = torch.randn(5, 8)
        (found,) = torch.autograd.grad((g * svt(matrix, 1.0)).sum(), matrix)
        assert found.norm() <= g.norm() * (1 + 1e-4)


def test_old_basis() -> None:
    """Rule 3: low rank whatever the basis, exact in a basis of this matrix, off by the first order of the move."""
    torch.manual_seed(2)
    matrix, move = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    basis, values = basis_of(matrix)
    assert_close(values, torch.linalg.svdvals(matrix), 1e-7)
    tau = 0.45 * values[0]
    g = torch.randn_like(matrix)
    errors = []
    for step in (0.0, 1e-3, 2e-3, 4e-3):
        moved = (matrix + step * move).requires_grad_()
        old, seen = apply_basis(moved, tau, basis)
        new = svt(moved, tau)
        assert int(torch.linalg.matrix_rank(old.detach())) == int((seen > tau).sum()) < 5
        pairs = [torch.autograd.grad((g * out).sum(), moved)[0] for out in (old, new)]
        errors.append((relative_error(old.detach(), new.detach()), relative_error(*pairs)))
    assert max(errors[0]) < 1e-9
    for k in (0, 1):
        assert errors[3][k] < 0.05
        assert 1.5 < errors[2][k] / errors[1][k] < 2.5 and 1.5 < errors[3][k] / errors[2][k] < 2.5


def test_half_precision_and_autocast() -> None:
    matrix = with_values((6, 9), [2.0, 1.5, 0.9, 0.5, 0.3, 0.1])
    exact = svt(matrix, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = matrix.float().requires_grad_()
        result = svt(m, 0.4)
        result.sum().backward()
        assert result.dtype == torch.float32
        assert_close(result, exact.float(), 1e-5)
        assert m.grad is not None
        reference = matrix.clone().requires_grad_()
        (expected,) = torch.autograd.grad(svt(reference, 0.4).sum(), reference)
        assert_close(m.grad, expected.float(), 1e-4)
    half = svt(matrix.to(torch.bfloat16), 0.4)
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), exact, 2e-2)


def test_record_is_the_effect_of_every_direction() -> None:
    matrix = with_values((4, 7), [2.0, 1.5, 0.9, 0.2])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    seen: list[Tensor] = []
    g = torch.randn(4, 7, dtype=torch.float64)
    m = matrix.clone().requires_grad_()
    out, _ = apply_basis(m, torch.tensor(0.5, dtype=torch.float64), basis_of(matrix)[0], seen.append)
    (g * out).sum().backward()
    kept = (values - 0.5).clamp(min=0)
    expected = torch.stack([f * (u @ g @ w) for f, u, w in zip(kept, left.T, right, strict=True)])
    assert_close(seen[0], expected, 1e-9)
    assert seen[0][3] == 0


@pytest.mark.parametrize("form", FORMS)
def test_matricisation(form: str) -> None:
    """Low rank of the matrix is two convolutions of the form in a row, the first kernel first."""
    torch.manual_seed(0)
    n, c, height, width, r = 5, 4, 3, 2, 2
    first, second = {
        "kxk-1x1": ((r, c, height, width), (n, r, 1, 1)),
        "1x1-kxk": ((r, c, 1, 1), (n, r, height, width)),
        "kx1-1xk": ((r, c, height, 1), (n, r, 1, width)),
    }[form]
    a, b = torch.randn(first, dtype=torch.float64), torch.randn(second, dtype=torch.float64)
    x = torch.randn(2, c, 7, 6, dtype=torch.float64)
    both = torch.conv2d(torch.conv2d(x, a), b)
    weight = torch.einsum("nrhw,rcHW->nc" + {"kxk-1x1": "HW", "1x1-kxk": "hw", "kx1-1xk": "Hw"}[form], b, a)
    assert_close(torch.conv2d(x, weight), both, 1e-12)
    matrix = matricize(weight, form)
    assert int(torch.linalg.matrix_rank(matrix)) == r < min(matrix.shape)
    assert torch.equal(unmatricize(matrix, form, weight.shape), weight)


def test_matricisation_of_other_weights() -> None:
    for shape, form in [((5, 3), FORMS[0]), ((5, 3), FORMS[1]), ((5, 3, 4), FORMS[0]), ((5, 3, 4), FORMS[1])]:
        weight = torch.randn(shape)
        assert torch.equal(unmatricize(matricize(weight, form), form, shape), weight)
    with pytest.raises(SluiceError, match=r"shape \(5, 3, 4\) has no form 'kx1-1xk'"):
        matricize(torch.zeros(5, 3, 4), FORMS[2])
    with pytest.raises(SluiceError, match="has no form 'tucker'"):
        matricize(torch.zeros(5, 3, 4, 2), "tucker")


def test_modified_stable_rank() -> None:
    matrix = with_values((6, 4), [4.0, 2.0, 1.0, 0.5])
    assert float(modified_stable_rank(matrix, 2)) == pytest.approx(1.5 / 6)
    assert float(modified_stable_rank(3 * matrix, 2)) == pytest.approx(1.5 / 6)
    assert float(modified_stable_rank(matrix, 4)) == 0.0
    batch = torch.stack([matrix, with_values((6, 4), [2.0, 2.0, 0.0, 0.0])])
    assert float(modified_stable_rank(batch, 2)) == pytest.approx(0.5 * 1.5 / 6)
    with pytest.raises(SluiceError, match="rank=0"):
        modified_stable_rank(matrix, 0)

    def by_svd(m: Tensor) -> Tensor:
        values = torch.linalg.svdvals(m)
        return values[2:].sum() / values[:2].sum()

    for values in ([4.0, 2.0, 1.0, 0.5], [3.0, 3.0, 1.0, 1.0]):
        m = with_values((6, 4), values).requires_grad_()
        (found,) = torch.autograd.grad(modified_stable_rank(m, 2), m)
        torch.manual_seed(5)
        for _ in range(4):
            direction = torch.randn_like(m)
            assert_close((found * direction).sum(), torch.tensor(numeric(by_svd, m.detach(), direction)), 1e-6)
    zero = torch.zeros(4, 3, requires_grad=True)
    modified_stable_rank(zero, 1).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_modified_stable_rank_empties_the_tail() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 9).requires_grad_()
    optimizer = torch.optim.Adam([weight], 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        modified_stable_rank(weight, 2).backward()
        optimizer.step()
    values = torch.linalg.svdvals(weight.detach())
    assert values[2:].sum() < 0.1 * values[:2].sum()
