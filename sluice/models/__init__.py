"""Reference networks of the field, as plain ``nn.Module`` factories, and inputs of the right shape."""

from __future__ import annotations

import torch

from sluice.core.errors import SluiceError
from sluice.models.densenet import densenet
from sluice.models.enliven import enliven
from sluice.models.imagenet import resnet50
from sluice.models.mobilenet import mobilenet_v2, mobilenet_v2_224
from sluice.models.pretrained import resnet20_mnist
from sluice.models.resnet import resnet20, resnet56, se_resnet
from sluice.models.resnet1d import resnet1d
from sluice.models.vgg import vgg16_bn

__all__ = [
    "EXAMPLE_SHAPES",
    "densenet",
    "enliven",
    "example_inputs",
    "mobilenet_v2",
    "mobilenet_v2_224",
    "resnet1d",
    "resnet20",
    "resnet20_mnist",
    "resnet50",
    "resnet56",
    "se_resnet",
    "vgg16_bn",
]

# Input of every factory at its default arguments, without the batch.
EXAMPLE_SHAPES: dict[str, tuple[int, ...]] = {
    "densenet": (1, 28, 28),
    "mobilenet_v2": (1, 28, 28),
    "mobilenet_v2_224": (3, 224, 224),
    "resnet1d": (2, 256),
    "resnet20": (1, 28, 28),
    "resnet20_mnist": (1, 28, 28),
    "resnet50": (3, 224, 224),
    "resnet56": (1, 28, 28),
    "se_resnet": (1, 28, 28),
    "vgg16_bn": (1, 28, 28),
}


def example_inputs(name: str, batch: int = 2) -> tuple[torch.Tensor]:
    """Standard normal input (batch, *EXAMPLE_SHAPES[name]) of the factory ``name``, the same on every call.

    Raises:
        SluiceError: there is no such factory.
    """
    if name not in EXAMPLE_SHAPES:
        raise SluiceError(f"there is no reference network {name!r}; choose one of {', '.join(EXAMPLE_SHAPES)}")
    return (torch.randn(batch, *EXAMPLE_SHAPES[name], generator=torch.Generator().manual_seed(0)),)
