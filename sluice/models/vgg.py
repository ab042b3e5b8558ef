"""VGG-16 with batch norm for small images (Simonyan & Zisserman 2015, configuration D).

Thirteen 3x3 convolutions in five stages of 2, 2, 3, 3, 3, each stage ending in a max-pool that halves the
image, rounding up: 28x28 and 32x32 both end at 1x1. The classifier is one hidden layer in place of the two of
4096 units that suit 224x224.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["VGG", "vgg16_bn"]

_CONVS_PER_STAGE = (2, 2, 3, 3, 3)


class VGG(nn.Module):
    """A plain chain, (N, in_channels, S, S) with S from 17 to 32 to (N, num_classes).

    Args:
        widths: channels of the five stages.
        hidden: units of the classifier's hidden layer.
        dropout: probability in the classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        hidden: int = 512,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = in_channels
        for convs, width in zip(_CONVS_PER_STAGE, widths, strict=True):
            for _ in range(convs):
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                previous = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(previous, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def vgg16_bn(
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    hidden: int = 512,
) -> VGG:
    """VGG-16 with batch norm, 15.0 million parameters at the default widths."""
    return VGG(num_classes, in_channels, widths, hidden)
