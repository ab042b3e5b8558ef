"""Composition of convolutions against running them one after the other, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.passes.cut.compose import Conv, add_shortcut, compose, fold_norm, identity
from sluice.runtime.base.compare import assert_close, relative_error

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(conv: Conv, x: torch.Tensor, pad: tuple[int, ...] | None = None) -> torch.Tensor:
    weight, bias = torch.from_numpy(conv.weight), torch.from_numpy(conv.bias)
    pad = conv.pad if pad is None else pad
    return CONVS[len(conv.stride)](x, weight, bias, conv.stride, pad, groups=conv.groups)


def random_conv(
    rng: np.random.Generator, channels: int, out: int | None, kernel: tuple[int, ...], stride: tuple[int, ...] = ()
) -> Conv:
    """``out`` None: depthwise; padding that keeps the size."""
    shape = (channels, 1, *kernel) if out is None else (out, channels, *kernel)
    stride = stride or (1,) * len(kernel)
    pad = tuple(k // 2 for k in kernel)
    return Conv(rng.standard_normal(shape), rng.standard_normal(shape[0]), stride, pad, channels if out is None else 1)


def one_by_one(convs: list[Conv], x: torch.Tensor) -> torch.Tensor:
    """All padding at the first."""
    total, stride = [0] * len(convs[0].pad), [1] * len(convs[0].pad)
    for conv in convs:
        for axis in range(len(total)):
            total[axis] += stride[axis] * conv.pad[axis]
            stride[axis] *= conv.stride[axis]
    for index, conv in enumerate(convs):
        x = run(conv, x, (0,) * len(total) if index else tuple(total))
    return x


@st.composite
def rows(draw: st.DrawFn) -> list[Conv]:
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    axes = draw(st.integers(1, 3))
    channels, convs = draw(st.integers(2, 4)), []
    for _ in range(draw(st.integers(2, 3))):
        out = draw(st.sampled_from([None, 2, 3, 5]))
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
        stride = tuple(draw(st.integers(1, 2)) for _ in range(axes))
        convs.append(random_conv(rng, channels, out, kernel, stride))
        channels = out or channels
    return convs


@settings(max_examples=60, deadline=None)
@given(rows())
def test_composition_is_exact(convs: list[Conv]) -> None:
    whole = convs[0]
    for conv in convs[1:]:
        whole = compose(whole, conv)
    sizes = [13, 11, 9][: len(whole.stride)]
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, convs[0].inputs, *sizes)))
    assert_close(run(whole, x), one_by_one(convs, x), tol=1e-12)
    assert whole.depthwise == all(c.depthwise for c in convs)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_wrong_tap_shows(stride: int) -> None:
    rng = np.random.default_rng(0)
    convs = [random_conv(rng, 3, 4, (3, 3), (stride, stride)), random_conv(rng, 4, 2, (3, 3))]
    x = torch.from_numpy(rng.standard_normal((1, 3, 9, 8)))
    whole = compose(*convs)
    weight = whole.weight.copy()
    weight[:, :, 0] = weight[:, :, 1]
    wrong = Conv(weight, whole.bias, whole.stride, whole.pad)
    assert relative_error(run(wrong, x), one_by_one(convs, x)) > 1e-2
    ignored = compose(Conv(convs[0].weight, convs[0].bias, (1, 1), (1, 1)), convs[1])  # strides left out
    assert (ignored.kernel == whole.kernel) == (stride == 1)


def test_fold_norm() -> None:
    rng = np.random.default_rng(1)
    conv = random_conv(rng, 3, 5, (3, 1), (2, 1))
    gamma, beta, mean, var = rng.standard_normal((4, 5))
    var = var**2
    x = torch.from_numpy(rng.standard_normal((2, 3, 7, 5)))
    t = [torch.from_numpy(v) for v in (mean, var, gamma, beta)]
    assert_close(run(fold_norm(conv, gamma, beta, mean, var, 1e-2), x), F.batch_norm(run(conv, x), *t, eps=1e-2), 1e-12)
    plain = F.batch_norm(run(conv, x), *t[:2], eps=1e-3)
    assert_close(run(fold_norm(conv, None, None, mean, var, 1e-3), x), plain, 1e-12)


@pytest.mark.parametrize("depthwise", [False, True])
def test_shortcuts(depthwise: bool) -> None:
    rng = np.random.default_rng(2)
    branch = random_conv(rng, 4, None if depthwise else 4, (3, 5))
    x = torch.from_numpy(rng.standard_normal((2, 4, 7, 6)))
    folded = add_shortcut(branch, None)
    assert_close(run(folded, x), run(branch, x) + x, 1e-12)
    assert folded.depthwise is depthwise
    side = random_conv(rng, 4, 4, (1, 1))
    assert_close(run(add_shortcut(branch, side), x), run(branch, x) + run(side, x), 1e-12)
    assert relative_error(run(folded, x), run(branch, x)) > 1e-2


def test_strided_projection() -> None:
    rng = np.random.default_rng(3)
    branch = compose(random_conv(rng, 3, 5, (3, 3), (2, 1)), random_conv(rng, 5, 6, (3, 3)))
    side = random_conv(rng, 3, 6, (1, 1), (2, 1))
    for size in ((9, 8), (10, 7)):
        x = torch.from_numpy(rng.standard_normal((2, 3, *size)))
        assert_close(run(add_shortcut(branch, side), x), run(branch, x) + run(side, x), 1e-12)


def test_shortcut_within_a_run() -> None:
    """Without padding of its own the branch is smaller; the shortcut loses the same border."""
    rng = np.random.default_rng(4)
    branch = random_conv(rng, 3, 3, (3, 3))
    bare = Conv(branch.weight, branch.bias, (1, 1), (0, 0))
    x = torch.from_numpy(rng.standard_normal((2, 3, 7, 6)))
    assert_close(run(add_shortcut(bare, None, (-1, -1)), x), run(bare, x) + x[:, :, 1:-1, 1:-1], 1e-12)


def test_identity_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    for conv in (random_conv(rng, 3, 5, (3, 2), (2, 1)), random_conv(rng, 3, None, (3, 2))):
        for whole in (compose(identity(3), conv), compose(conv, identity(len(conv.bias)))):
            np.testing.assert_array_equal(whole.weight, conv.weight)
            np.testing.assert_array_equal(whole.bias, conv.bias)
            assert (whole.stride, whole.pad, whole.groups) == (conv.stride, conv.pad, conv.groups)


def test_refusals() -> None:
    rng = np.random.default_rng(6)
    with pytest.raises(SluiceError, match=r"weight \(4, 2, 3, 3\) and groups=2: only groups=1 and depthwise"):
        Conv(rng.standard_normal((4, 2, 3, 3)), np.zeros(4), (1, 1), (1, 1), 2)
    with pytest.raises(SluiceError, match="one stride and one padding per spatial axis"):
        Conv(rng.standard_normal((4, 2, 3, 3)), np.zeros(4), (1,), (1, 1))
    with pytest.raises(SluiceError, match="the second reads 4 channels, the first gives 5"):
        compose(random_conv(rng, 3, 5, (3,)), random_conv(rng, 4, 5, (3,)))
    square = random_conv(rng, 4, 4, (3, 3))
    with pytest.raises(SluiceError, match="is even and has no centre"):
        add_shortcut(random_conv(rng, 4, 4, (2, 3)), None)
    with pytest.raises(SluiceError, match="strides of branch and shortcut differ"):
        add_shortcut(random_conv(rng, 4, 4, (3, 3), (2, 1)), None)
    with pytest.raises(SluiceError, match="it maps 4 to 5 channels, its shortcut 5 to 5"):
        add_shortcut(random_conv(rng, 4, 5, (3, 3)), None)
    with pytest.raises(SluiceError, match="only the identity and 1x1 projections"):
        add_shortcut(square, square)
    with pytest.raises(SluiceError, match=r"padding \(0, 0\) is not half of its kernel"):
        add_shortcut(Conv(square.weight, square.bias, (1, 1), (0, 0)), None)
