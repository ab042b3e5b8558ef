"""A residual network over time, for audio and sensor windows (N, channels, length).

After Wang et al. 2017, with two convolutions per block, of kernel 7 and 5:
``relu(bn2(conv5(relu(bn1(conv7(x))))) + shortcut(x))``. A block that halves the length or changes the width has a
1x1 convolution with batch norm as its shortcut; in all others the shortcut is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["Block1d", "ResNet1d", "resnet1d"]


class Block1d(nn.Module):
    """(N, C, L) to (N, width, L / stride), rounded up."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, width, 7, stride, padding=3, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv1d(width, width, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        if stride == 1 and in_channels == width:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv1d(in_channels, width, 1, stride, bias=False),
                nn.BatchNorm1d(width),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))


class ResNet1d(nn.Module):
    """(N, in_channels, L) to (N, num_classes); two blocks per width, the first of them with stride 2."""

    def __init__(self, num_classes: int = 10, in_channels: int = 2, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv1d(in_channels, widths[0], 7, padding=3, bias=False)
        self.bn = nn.BatchNorm1d(widths[0])
        self.relu = nn.ReLU()
        blocks = []
        previous = widths[0]
        for width in widths:
            blocks += [Block1d(previous, width, stride=2), Block1d(width, width, stride=1)]
            previous = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.fc(self.pool(x).flatten(1))


def resnet1d(num_classes: int = 10, in_channels: int = 2, widths: Sequence[int] = (16, 32, 64)) -> ResNet1d:
    """A small 1-D residual network, (N, 2, 256) by default."""
    return ResNet1d(num_classes, in_channels, widths)
