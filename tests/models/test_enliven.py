"""After ``enliven`` every channel of every network is alive, and the values are those of the seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sluice.models as models
from sluice.models import EXAMPLE_SHAPES, enliven, example_inputs

FRESH = sorted(set(EXAMPLE_SHAPES) - {"resnet20_mnist"})


def dead_channels(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Channels that are zero everywhere after some ReLU."""
    dead = 0

    def count(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal dead
        dead += int((output.transpose(0, 1).flatten(1).amax(1) <= 0).sum())

    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(*inputs)
    return dead


@pytest.mark.parametrize("name", FRESH)
def test_every_channel_is_alive(name: str) -> None:
    torch.manual_seed(1)
    inputs = example_inputs(name)
    model = enliven(getattr(models, name)(), 3, inputs)
    assert not model.training
    with torch.no_grad():
        out = model(*inputs)
    assert torch.isfinite(out).all()
    assert (out[0] - out[1]).abs().max() > 0.1 * out.abs().max()
    assert dead_channels(model, inputs) == 0


def test_the_count_sees_a_dead_channel() -> None:
    torch.manual_seed(1)
    inputs = example_inputs("resnet20")
    model = enliven(models.resnet20(), 3, inputs)
    with torch.no_grad():
        model.bn1.bias[5] = -100.0
    assert dead_channels(model, inputs) == 1


@pytest.mark.parametrize("with_inputs", [True, False])
def test_channels_differ_and_the_seed_decides(with_inputs: bool) -> None:
    def norms(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(7)
        inputs = example_inputs("densenet") if with_inputs else None
        model = enliven(models.densenet(growth=5), seed, inputs)
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return [t for layer in layers for t in layer.state_dict().values() if t.dim() == 1]

    first, again, other = norms(1), norms(1), norms(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(len(t.unique()) == len(t) for t in first)


def test_weights_stay() -> None:
    model = models.vgg16_bn(widths=(5, 7, 9, 11, 13), hidden=17)
    before = {n: p.clone() for n, p in model.named_parameters()}
    enliven(model, 0, example_inputs("vgg16_bn"))
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, parameter in model.named_parameters():
        layer, kind = name.rsplit(".", 1)
        assert torch.equal(parameter, before[name]) == (kind == "weight" and layer not in norms), name
