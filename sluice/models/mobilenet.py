"""MobileNetV2 (Sandler et al. 2018, table 2), for small images and for those of 224 x 224.

An inverted residual widens by a factor with a 1x1 convolution, filters each channel by itself with a 3x3
depthwise one, and narrows with a linear 1x1; it adds its input where stride is 1 and channels are equal.
For small images the strides of the stem and of the second stage are 1 in place of 2, so that 28x28 and 32x32 leave
4x4 for the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["IMAGENET", "SMALL", "InvertedResidual", "MobileNetV2", "mobilenet_v2", "mobilenet_v2_224"]

# expansion, channels, blocks
_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
# Strides of the stem and of the first block of every stage.
IMAGENET = (2, 1, 2, 2, 2, 1, 2, 1)
SMALL = (1, 1, 1, 2, 2, 1, 2, 1)


class InvertedResidual(nn.Module):
    """(N, in_channels, H, W) to (N, channels, H / stride, W / stride), rounded up."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += _conv_bn(in_channels, hidden, kernel=1)
        layers += _conv_bn(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """(N, in_channels, H, W) to (N, num_classes); ``width`` multiplies the channels, to multiples of 8.

    ``strides`` are those of the stem and of the first block of each of the seven stages.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        width: float = 1.0,
        dropout: float = 0.2,
        strides: Sequence[int] = SMALL,
    ) -> None:
        super().__init__()
        previous = _scaled(32, width)
        blocks: list[nn.Module] = []
        stem = _conv_bn(in_channels, previous, kernel=3, stride=strides[0])
        for (expansion, channels, count), first_stride in zip(_STAGES, strides[1:], strict=True):
            for i in range(count):
                stride = first_stride if i == 0 else 1
                blocks.append(InvertedResidual(previous, _scaled(channels, width), stride, expansion))
                previous = _scaled(channels, width)
        # The paper narrows every layer but this one, which only ever widens.
        last = _scaled(1280, max(1.0, width))
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_conv_bn(previous, last, kernel=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.pool(x).flatten(1))


def mobilenet_v2(
    num_classes: int = 10, in_channels: int = 1, width: float = 1.0, strides: Sequence[int] = SMALL
) -> MobileNetV2:
    """MobileNetV2 for small images, 2.2 million parameters at ``width`` 1."""
    return MobileNetV2(num_classes, in_channels, width, strides=strides)


def mobilenet_v2_224(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2 for images of 224 x 224, 3.5 million parameters at ``width`` 1."""
    return MobileNetV2(num_classes, in_channels, width, strides=IMAGENET)


def _conv_bn(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6()]


def _scaled(channels: int, width: float) -> int:
    """The nearest multiple of 8, but never below 90% of the product."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded
