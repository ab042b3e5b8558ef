"""Normal equations that are streamed find the weights of least squares, for every kind of layer."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice.runtime.base.compare import assert_close, relative_error
from sluice.training.least_squares import Geometry, NormalEquations, patches

LAYERS = {
    "1-D, strided": (nn.Conv1d(3, 5, 4, stride=2, padding=1), (3, 17)),
    "2-D": (nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), (4, 7, 5)),
    "2-D, dilated": (nn.Conv2d(3, 5, 3, dilation=2, padding=(2, 1)), (3, 9, 8)),
    "3-D": (nn.Conv3d(2, 5, (2, 3, 1), padding=(0, 1, 0)), (2, 4, 5, 3)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (6, 6, 7)),
    "depthwise": (nn.Conv2d(5, 5, 3, padding=1, groups=5), (5, 6, 7)),
    "depthwise, two each": (nn.Conv1d(5, 10, 3, groups=5), (5, 11)),
    "linear": (nn.Linear(7, 5), (3, 7)),
}


def geometry_of(layer: nn.Module) -> Geometry:
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return Geometry()
    pads = tuple((int(p), int(p)) for p in layer.padding)
    return Geometry(layer.kernel_size, layer.stride, pads, layer.dilation, layer.groups)


def batches(shape: tuple[int, ...], count: int = 6, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, *shape, generator=generator) + 0.5 for _ in range(count)]


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_weight_are_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    (x, *_), geometry = batches(shape), geometry_of(layer)
    a = torch.from_numpy(patches(x.numpy(), geometry))
    weight = layer.weight.reshape(geometry.groups, layer.weight.shape[0] // geometry.groups, -1)
    rows = a @ weight.transpose(1, 2)
    expected = layer(x) if isinstance(layer, nn.Linear) else layer(x).flatten(2).transpose(1, 2)
    made = rows.permute(1, 0, 2).reshape(-1, len(layer.bias)) + layer.bias
    assert_close(made.detach(), expected.reshape(-1, len(layer.bias)).detach())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_found_again_from_its_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(3)  # what the ridge keeps depends on how far off the start is drawn
    layer.reset_parameters()
    equations = NormalEquations(geometry_of(layer), centred=True)
    for x in batches(shape):
        equations.add(x.numpy(), layer(x).detach().numpy())
    start = layer.weight.detach() + 0.2 * torch.randn_like(layer.weight)
    assert relative_error(start, layer.weight.detach()) > 0.2
    weight, bias = equations.solve(start.numpy())
    assert_close(weight, layer.weight.detach(), 0.01)  # the ridge keeps a little of the start
    assert_close(bias, layer.bias.detach(), 0.01)


def test_no_weight_has_a_smaller_residual_and_the_bias_takes_the_mean() -> None:
    """The target is not in reach: two of three features are missing."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 3, generator=generator) @ torch.randn(3, 3, generator=generator) + 1.0
    y = torch.tanh(x @ torch.randn(3, 4, generator=generator)) + 2.0
    equations = NormalEquations(Geometry(), centred=True)
    for part in (slice(0, 120), slice(120, 200)):
        equations.add(x[part, :2].numpy(), y[part].numpy())
    weight, bias = map(torch.from_numpy, equations.solve(np.zeros((4, 2), np.float32)))
    design = torch.cat([x[:, :2], torch.ones(200, 1)], dim=1)
    best = torch.linalg.lstsq(design, y).solution
    missed = (x[:, :2] @ weight.T + bias - y).square().mean()
    least = (design @ best - y).square().mean()
    assert missed <= 1.001 * least
    assert_close((x[:, :2] @ weight.T + bias).mean(0), y.mean(0))


def test_what_the_inputs_do_not_show_stays() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    x[:, 1] = 0.0
    before = torch.tensor([[1.0, -7.0, 2.0]])
    equations = NormalEquations(Geometry(), centred=False)
    equations.add(x.numpy(), (x @ torch.tensor([[3.0], [0.0], [-1.0]])).numpy())
    weight, bias = equations.solve(before.numpy())
    assert_close(weight, torch.tensor([[3.0, -7.0, -1.0]]), 1e-2)
    assert float(weight[0, 1]) == -7.0 and float(np.abs(bias).max()) == 0.0


@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_the_same_however_few_rows_are_gathered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LAYERS[name]
    found = []
    for fewest in (10**6, 1):  # all at once, and as many rows and columns as a part of the sums has
        monkeypatch.setattr("sluice.training.least_squares.FEWEST", fewest)
        equations = NormalEquations(geometry_of(layer), centred=True)
        for x in batches(shape, 2):
            equations.add(x.numpy(), layer(x).detach().numpy())
        found.append(equations)
    for field in ("gram", "cross", "inputs", "outputs"):
        assert_close(getattr(found[1], field), getattr(found[0], field))


def test_sums_without_finite_numbers_give_a_weight_that_is_not_finite() -> None:
    equations = NormalEquations(Geometry(), centred=True)
    with np.errstate(invalid="ignore"):
        equations.add(np.full((4, 2), np.nan, np.float32), np.ones((4, 3), np.float32))
        weight, _ = equations.solve(np.ones((3, 2), np.float32))
    assert not np.isfinite(weight).any()


def test_sums_are_solved_where_they_lie() -> None:
    """What is taken at once beside ``A^T A`` is less than another one of it."""
    rng, columns = np.random.default_rng(0), 1200
    equations = NormalEquations(Geometry(), centred=True)
    x, weight = rng.standard_normal((300, columns)).astype(np.float32), np.zeros((4, columns), np.float32)
    tracemalloc.start()
    equations.add(x, x[:, :4])
    equations.solve(weight)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.9 * 8 * columns**2
