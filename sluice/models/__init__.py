"""Reference networks of the field, as plain ``nn.Module`` factories, and inputs of the right shape."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sluice.core.errors import SluiceError
from sluice.models.bert import bert, layout_bert
from sluice.models.densenet import densenet
from sluice.models.detection3d import detector3d
from sluice.models.enliven import enliven
from sluice.models.imagenet import resnet50
from sluice.models.mobilenet import mobilenet_v2, mobilenet_v2_224
from sluice.models.pretrained import resnet20_mnist
from sluice.models.recommender import attention_recommender
from sluice.models.recurrent import gru_classifier, gru_recommender, lstm_classifier
from sluice.models.resnet import resnet20, resnet56, se_resnet
from sluice.models.resnet1d import resnet1d
from sluice.models.unet import unet
from sluice.models.vgg import vgg16_bn
from sluice.models.vit import vit

__all__ = [
    "EXAMPLE_SHAPES",
    "attention_recommender",
    "bert",
    "densenet",
    "detector3d",
    "enliven",
    "example_inputs",
    "gru_classifier",
    "gru_recommender",
    "layout_bert",
    "lstm_classifier",
    "mobilenet_v2",
    "mobilenet_v2_224",
    "resnet1d",
    "resnet20",
    "resnet20_mnist",
    "resnet50",
    "resnet56",
    "se_resnet",
    "unet",
    "vgg16_bn",
    "vit",
]

# Image, or signal, of every factory that takes one, at its default arguments, without the batch.
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


# Of every other factory what it takes, by batch and generator: tokens and items below 97, boxes on a page of 64 steps.
Inputs = tuple[torch.Tensor, ...]
_OTHERS: dict[str, Callable[[int, torch.Generator], Inputs]] = {
    "attention_recommender": lambda n, g: (torch.randint(97, (n, 12), generator=g),),
    "bert": lambda n, g: (torch.randint(97, (n, 20), generator=g), (torch.arange(20) < 15).long().repeat(n, 1)),
    "detector3d": lambda n, g: (torch.randn(n, 4, 8, 16, 16, generator=g),),
    "gru_classifier": lambda n, g: (torch.randn(n, 1, 28, 28, generator=g),),
    "gru_recommender": lambda n, g: (torch.randint(97, (n, 12), generator=g),),
    "layout_bert": lambda n, g: (
        torch.randint(97, (n, 20), generator=g),
        torch.randint(64, (n, 20, 4), generator=g).sort(-1)[0],
    ),
    "lstm_classifier": lambda n, g: (torch.randint(97, (n, 20), generator=g),),
    "unet": lambda n, g: (torch.randn(n, 1, 16, 16, generator=g), 100.0 * torch.rand(n, generator=g)),
    "vit": lambda n, g: (torch.randn(n, 1, 28, 28, generator=g),),
}


def example_inputs(name: str, batch: int = 2) -> Inputs:
    """Inputs of the factory ``name`` at its default arguments, the same on every call; images are standard normal.

    Raises:
        SluiceError: there is no such factory.
    """
    generator = torch.Generator().manual_seed(0)
    if name in _OTHERS:
        return _OTHERS[name](batch, generator)
    if name not in EXAMPLE_SHAPES:
        known = sorted({*EXAMPLE_SHAPES, *_OTHERS})
        raise SluiceError(f"there is no reference network {name!r}; choose one of {', '.join(known)}")
    return (torch.randn(batch, *EXAMPLE_SHAPES[name], generator=generator),)
