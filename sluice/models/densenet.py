"""A small DenseNet-BC (Huang et al. 2017, section 3): a layer reads the outputs of all layers before it in its block.

A layer is BN-ReLU-Conv1x1 to ``4 growth`` channels, then BN-ReLU-Conv3x3 to ``growth``, concatenated to its
input. A transition between blocks is BN-ReLU-Conv1x1 to half the channels and an average pool of stride 2.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DenseLayer", "DenseNet", "densenet"]

_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """(N, C, H, W) to (N, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, _BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(_BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(self.relu(self.norm1(x)))
        new = self.conv2(self.relu(self.norm2(new)))
        return torch.cat((x, new), dim=1)


class DenseNet(nn.Module):
    """(N, in_channels, H, W) with H and W of 4 or more to (N, num_classes).

    Args:
        growth: channels that every layer adds; the stem has twice as many.
        blocks: layers of each dense block.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        growth: int = 12,
        blocks: tuple[int, ...] = (4, 4, 4),
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for i, layers in enumerate(blocks):
            if i > 0:
                stages.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels),
                        nn.ReLU(),
                        nn.Conv2d(channels, channels // 2, 1, bias=False),
                        nn.AvgPool2d(2),
                    )
                )
                channels //= 2
            stages.append(nn.Sequential(*(DenseLayer(channels + j * growth, growth) for j in range(layers))))
            channels += layers * growth
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stages(self.stem(x))))
        return self.fc(self.pool(x).flatten(1))


def densenet(num_classes: int = 10, in_channels: int = 1, growth: int = 12) -> DenseNet:
    """DenseNet-BC of three blocks of four layers."""
    return DenseNet(num_classes, in_channels, growth)
