"""Residual networks for small images (He et al. 2016, section 4.2): three stages of widths 16, 32, 64.

A basic block computes ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``. The shortcut is

1. the identity where shape is kept, and
2. a 1x1 convolution with batch norm where the stage changes width or stride (their option B).

Depth is ``6 n + 2`` for ``n`` blocks per stage: 20 for n = 3, 56 for n = 9. The squeeze-and-excitation form
(Hu et al. 2018) scales the branch, channel by channel, by ``sigmoid(expand(relu(squeeze(mean(x)))))``
before the addition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["BasicBlock", "ResNet", "SqueezeExcite", "resnet20", "resnet56", "se_resnet"]


class SqueezeExcite(nn.Module):
    """Channel attention, (N, C, H, W) to the same shape; the hidden width is ``C // reduction``."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.relu(self.squeeze(self.pool(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, (N, C, H, W) to (N, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int = 1, squeeze_excite: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width) if squeeze_excite else nn.Identity()
        if stride == 1 and in_channels == width:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.se(self.bn2(self.conv2(branch)))
        return self.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, one stage of ``blocks`` basic blocks per width (stride 2 from the second on), mean, classifier.

    Args:
        blocks: basic blocks per stage.
        num_classes: size of the output, (N, num_classes).
        in_channels: channels of the input, (N, in_channels, H, W); H and W of 4 or more.
        widths: channels of the stages; the stem has ``widths[0]``.
        squeeze_excite: put a :class:`SqueezeExcite` at the end of every branch.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        squeeze_excite: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages = []
        previous = widths[0]
        for i, width in enumerate(widths):
            stage = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(BasicBlock(previous, width, stride, squeeze_excite))
                previous = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def resnet20(num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    """ResNet-20, 0.27 million parameters at the default widths."""
    return ResNet(3, num_classes, in_channels, widths)


def resnet56(num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    """ResNet-56, 0.86 million parameters at the default widths."""
    return ResNet(9, num_classes, in_channels, widths)


def se_resnet(num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    """ResNet-20 with squeeze-and-excitation in every block."""
    return ResNet(3, num_classes, in_channels, widths, squeeze_excite=True)
