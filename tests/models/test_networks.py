"""Every reference network runs at its example shape, in both modes, and has the size its paper's rule gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import sluice.models as models
from sluice.core.errors import SluiceError
from sluice.models import EXAMPLE_SHAPES, example_inputs

FRESH = sorted(set(EXAMPLE_SHAPES) - {"resnet20_mnist"})


@pytest.mark.parametrize("name", FRESH)
def test_runs_at_its_example_shape_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=7)
    inputs = example_inputs(name, batch=3)
    assert inputs[0].shape == (3, *EXAMPLE_SHAPES[name])
    before = {k: v.clone() for k, v in model.named_buffers() if k.endswith("running_mean")}
    out = model.train()(*inputs)
    assert out.shape == (3, 7)
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert all(not torch.equal(before[k], v) for k, v in model.named_buffers() if k in before)
    with torch.no_grad():
        first, second = model.eval()(*inputs), model(*inputs)
    assert first.shape == (3, 7)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("attention_recommender", [(3, 12, 97)]),
        ("bert", [(3, 48)]),
        ("detector3d", [(3, 3, 8, 8), (3, 7, 8, 8), (3, 2, 8, 8)]),
        ("gru_classifier", [(3, 10)]),
        ("gru_recommender", [(3, 97)]),
        ("layout_bert", [(3, 20, 7)]),
        ("lstm_classifier", [(3, 4)]),
        ("unet", [(3, 1, 16, 16)]),
        ("vit", [(3, 10)]),
    ],
)
def test_others_run_at_their_example_inputs_in_both_modes(name: str, shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model, inputs = getattr(models, name)(), example_inputs(name, batch=3)
    for mode in (True, False):
        outputs = model.train(mode)(*inputs)
        found = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        assert [tuple(out.shape) for out in found] == shapes
    sum(out.square().mean() for out in found).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("name", [n for n in FRESH if n != "resnet1d"])
def test_accepts_colour_images_of_32_pixels(name: str) -> None:
    model = getattr(models, name)(num_classes=5, in_channels=3).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(("blocks", "factory"), [(3, models.resnet20), (9, models.resnet56)])
def test_resnet_has_the_parameters_of_the_cifar_form(blocks: int, factory: Callable[..., nn.Module]) -> None:
    def conv_bn(kernel: int, fan_in: int, width: int) -> int:
        return kernel * kernel * fan_in * width + 2 * width

    expected = conv_bn(3, 3, 16)
    previous = 16
    for width in (16, 32, 64):
        expected += conv_bn(3, previous, width) + (2 * blocks - 1) * conv_bn(3, width, width)
        expected += conv_bn(1, previous, width) if previous != width else 0
        previous = width
    expected += 64 * 10 + 10
    assert sum(p.numel() for p in factory(10, 3, (16, 32, 64)).parameters()) == expected


def test_vgg_is_thirteen_convolutions_and_two_linear_layers() -> None:
    model = models.vgg16_bn(num_classes=3, widths=(5, 7, 9, 11, 13), hidden=17)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 13
    assert kinds.count(nn.MaxPool2d) == 5
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [(13, 17), (17, 3)]


def test_networks_for_224_pixels_have_the_published_sizes() -> None:
    """Their papers' and torchvision's counts: 25,557,032 and 3,504,872 parameters; 7x7 are left of 224x224."""
    assert sum(p.numel() for p in models.resnet50().parameters()) == 25_557_032
    assert sum(p.numel() for p in models.mobilenet_v2_224().parameters()) == 3_504_872
    for model, last in ((models.resnet50(3, widths=(5, 7, 9, 11)), "layer4"), (models.mobilenet_v2_224(3), "head")):
        sizes: list[torch.Size] = []
        model.get_submodule(last).register_forward_hook(lambda *a, sizes=sizes: sizes.append(a[2].shape[2:]))
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 224, 224))
        assert sizes == [(7, 7)]


def test_mobilenet_depthwise_layers_and_width() -> None:
    model = models.mobilenet_v2(width=0.25)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert sum(getattr(block, "residual", False) for block in models.mobilenet_v2().blocks) == 10
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_densenet_concatenates() -> None:
    model = models.densenet(growth=5)
    # 2 * 5, four layers of 5, halved; again; and a last block.
    assert model.fc.in_features == ((10 + 20) // 2 + 20) // 2 + 20


def test_squeeze_excite_is_in_every_block_and_matters() -> None:
    torch.manual_seed(0)
    model = models.se_resnet(widths=(5, 7, 9)).eval()
    blocks = [m for m in model.modules() if isinstance(m, models.resnet.SqueezeExcite)]
    assert len(blocks) == 9
    x = example_inputs("se_resnet")
    with torch.no_grad():
        before = model(*x)
        for block in blocks:
            block.get_parameter("expand.bias").fill_(-30.0)
        assert not torch.allclose(model(*x), before)


def test_example_inputs_are_seeded_and_names_are_checked() -> None:
    assert torch.equal(example_inputs("resnet1d", 3)[0], example_inputs("resnet1d", 3)[0])
    with pytest.raises(SluiceError, match=r"'resnet21'.*resnet20"):
        example_inputs("resnet21")
