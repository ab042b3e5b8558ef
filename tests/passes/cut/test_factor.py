"""The algebra of factorised weights: what two layers compute, against the dense layer with the truncated weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.core.plan import FORMS, Factorize
from sluice.passes.cut import factor
from sluice.runtime.base.compare import assert_close

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SHAPES = [(5, 3), (7, 4, 1, 1), (5, 3, 3, 3), (4, 6, 5, 3), (6, 4, 1, 3), (5, 3, 4), (5, 4, 2, 3, 1), (3, 5, 2, 3, 4)]


def random_weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def compose(first: np.ndarray, second: np.ndarray, form: str) -> np.ndarray:
    """The kernel of the two layers in a row, by summation over the inner channel."""
    if form == "kxk-1x1":
        return np.einsum("nr,rc...->nc...", second.reshape(second.shape[:2]), first)
    if form == "1x1-kxk":
        return np.einsum("nr...,rc->nc...", second, first.reshape(first.shape[:2]))
    return np.einsum("nrw,rch->nchw", second[:, :, 0], first[..., 0])


def two_layers(
    x: Tensor, weight: np.ndarray, bias: Tensor, form: str, rank: int, stride: list, padding: list, dilation: list
) -> Tensor:
    conv = CONVS[weight.ndim - 2]
    first, second = (torch.from_numpy(w) for w in factor.factors(weight, form, rank))
    s, p, d = (factor.per_axis(form, v, k) for v, k in ((stride, 1), (padding, 0), (dilation, 1)))
    return conv(conv(x, first, None, s[0], p[0], d[0]), second, bias, s[1], p[1], d[1])


def test_forms_are_those_that_differ() -> None:
    assert [len(factor.forms_of(shape)) for shape in SHAPES] == [1, 1, 3, 3, 2, 2, 2, 2]
    assert factor.forms_of((5, 3, 3, 3)) == FORMS
    assert factor.forms_of((5,)) == () == factor.forms_of(())


@pytest.mark.parametrize(("shape", "form"), [(s, f) for s in SHAPES for f in factor.forms_of(s)])
def test_matrix_has_an_inverse(shape: tuple[int, ...], form: str) -> None:
    weight = random_weight(shape)
    matrix = factor.matrix(weight, form)
    np.testing.assert_array_equal(factor.unmatrix(matrix, shape, form), weight)
    assert min(matrix.shape) == factor.max_rank(shape, form) == len(factor.singular_values(weight, form))


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from(FORMS),
    st.integers(1, 40),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_factors_are_the_best_approximation(n: int, c: int, kernel: list[int], form: str, rank: int, seed: int) -> None:
    shape = (n, c, *kernel)
    if form not in factor.forms_of(shape):
        form = factor.forms_of(shape)[0]
    weight = random_weight(shape, seed)
    first, second = factor.factors(weight, form, rank)
    assert (first.shape, second.shape) == factor.factor_shapes(shape, form, rank)
    short = factor.truncations(weight, form)(rank)
    assert_close(compose(first, second, form), short, 1e-12)
    sigma = factor.singular_values(weight, form)
    if rank >= len(sigma):
        assert_close(short, weight, 1e-12)
    lost = math.sqrt(float((sigma[rank:] ** 2).sum()))  # Eckart and Young
    assert_close(np.linalg.norm(weight - short), np.array(lost), 1e-9) if lost else None
    assert np.linalg.matrix_rank(factor.matrix(short, form)) == min(rank, len(sigma))


GEOMETRY = {
    1: [([1], [0], [1]), ([2], [3], [2])],
    2: [([1, 1], [0, 0], [1, 1]), ([2, 1], [3, 1], [1, 2]), ([1, 2], [0, 4], [2, 1]), ([2, 2], [1, 1], [1, 1])],
    3: [([1, 2, 1], [2, 0, 1], [1, 1, 2])],
}


@pytest.mark.parametrize(("shape", "form"), [(s, f) for s in SHAPES[1:] for f in factor.forms_of(s)])
def test_two_layers_are_the_dense_layer(shape: tuple[int, ...], form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(shape)
    dims, full = len(shape) - 2, factor.max_rank(shape, form)
    x = torch.randn(2, shape[1], *(13, 17, 11)[:dims], generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    for geometry in GEOMETRY[dims]:
        for rank in (full, full + 5, 2, 1):
            dense = weight if rank >= full else factor.truncations(weight, form)(rank)
            reference = CONVS[dims](x, torch.from_numpy(dense), bias, *geometry)
            assert_close(two_layers(x, weight, bias, form, rank, *geometry), reference, 1e-12)


def test_faults_are_seen() -> None:
    """One direction too few, one too many, and the horizontal kernel where the vertical one belongs."""
    weight = random_weight((6, 4, 3, 3))
    bias, x = torch.zeros(6, dtype=torch.float64), torch.from_numpy(random_weight((2, 4, 9, 7), 1))
    geometry = ([2, 1], [1, 2], [1, 1])
    for form in FORMS:
        reference = F.conv2d(x, torch.from_numpy(factor.truncations(weight, form)(3)), bias, *geometry)
        assert_close(two_layers(x, weight, bias, form, 3, *geometry), reference, 1e-12)
        for rank in (2, 4):
            with pytest.raises(AssertionError, match="relative error"):
                assert_close(two_layers(x, weight, bias, form, rank, *geometry), reference, 1e-3)
    swapped = two_layers(x, weight.swapaxes(2, 3), bias, "kx1-1xk", 3, *geometry)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(swapped, reference, 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_signs_and_scales_are_fixed(form: str) -> None:
    weight = random_weight((6, 4, 5, 3))
    first, second = factor.factors(weight, form, 4)
    again = factor.factors(weight.copy(order="F"), form, 4)
    assert_close(again, (first, second), 1e-12)
    columns = np.moveaxis(second, 1, -1).reshape(-1, 4)
    assert (columns[np.abs(columns).argmax(0), range(4)] > 0).all()
    norms = (first.reshape(4, -1) ** 2).sum(1), (columns**2).sum(0)
    assert_close(norms, (factor.singular_values(weight, form)[:4],) * 2, 1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_stays(dtype: type) -> None:
    weight = random_weight((6, 4, 3, 3)).astype(dtype)
    made = factor.factors(weight, "kx1-1xk", 5)
    timing = factor.random_factors(weight, "kx1-1xk", 5)
    assert all(a.dtype == dtype for a in (*made, *timing, factor.truncations(weight, "kx1-1xk")(5)))
    assert [a.shape for a in timing] == [a.shape for a in made]
    assert all(0.1 < float(np.abs(a).max()) < 4 and np.count_nonzero(a) == a.size for a in timing)
    scale = {np.float16: 2e-3, np.float32: 1e-6, np.float64: 1e-12}[dtype]
    wide = factor.truncations(weight.astype(np.float64), "kx1-1xk")(5)
    assert_close(compose(made[0].astype(np.float64), made[1].astype(np.float64), "kx1-1xk"), wide, scale)


def test_useful_ranks_are_those_of_the_literature() -> None:
    """Break-even ranks of TRP and of Idelbayev and Carreira-Perpinan's schemes."""
    assert factor.useful_rank((64, 64, 3, 3), "kxk-1x1") == 57  # 57.6
    assert factor.useful_rank((512, 512, 3, 3), "kxk-1x1") == 460  # 460.8
    assert factor.useful_rank((256, 256, 1, 1), "kxk-1x1") == 127  # 128 costs as much
    assert factor.useful_rank((64, 3, 7, 7), "kxk-1x1") == 44  # 44.6
    assert factor.useful_rank((64, 64, 3, 3), "kx1-1xk") == 95  # 96 costs as much
    assert factor.useful_rank((64, 64, 3, 3), "1x1-kxk") == 57
    assert factor.useful_rank((64, 64, 3, 3), "1x1-kxk", out_area=49, in_area=196) == 44  # 9*64*64/(4*64 + 9*64)
    assert factor.useful_rank((2, 2), "kxk-1x1") == 1  # never pays


@given(st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 5), max_size=3), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_useful_rank_is_the_last_below_dense(n: int, c: int, kernel: list[int], stride: int) -> None:
    shape = (n, c, *kernel)
    area = {"out_area": 36, "in_area": 36 * stride**2, "mid_area": 36 * stride}
    for form in factor.forms_of(shape):
        macs = {r: factor.factor_macs(shape, form, r, **area) for r in range(1, factor.max_rank(shape, form) + 1)}
        cheaper = [r for r, cost in macs.items() if cost < 36 * math.prod(shape)]
        assert factor.useful_rank(shape, form, **area) == max(cheaper, default=1)
        del area["mid_area"]  # both axes shrink alike, so the default is the same
        assert factor.factor_macs(shape, form, 1, **area) == macs[1]
        area["mid_area"] = 36 * stride


def test_what_cannot_be_factorised() -> None:
    with pytest.raises(SluiceError, match=r"'a.weight' of shape \(5, 3, 1, 1\).*'kxk-1x1'"):
        factor.check_form(Factorize("a.weight", "1x1-kxk", 2), (5, 3, 1, 1))
    with pytest.raises(SluiceError, match="kx1-1xk"):
        factor.check_form(Factorize("a.weight", "kx1-1xk", 2), (5, 3, 3, 1))
    broken = random_weight((5, 3))
    broken[2, 1] = np.nan
    with pytest.raises(SluiceError, match=r"\(5, 3\)"):
        factor.factors(broken, "kxk-1x1", 2)
    with pytest.raises(SluiceError, match=r"\(5, 3\)"):
        factor.truncations(broken, "kxk-1x1")


def test_names_keep_the_module_path() -> None:
    assert factor.first_name("block.0.conv1.weight").rpartition(".")[0] == "block.0.conv1"
    assert factor.first_name("w") != factor.second_name("w")
