"""Residual networks for images of 224 x 224 (He et al. 2016, table 1), as they are deployed.

A 7x7 stem of stride 2, a 3x3 maximum of stride 2, and four stages of widths 64, 128, 256, 512. A bottleneck computes
``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`` with kernels 1, 3, 1 and four times the width
at its end; the stride of a stage lies on the 3x3 convolution, the form that is usual today. Parameters are named as in
torchvision, so that its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["Bottleneck", "ImageNetResNet", "resnet50"]


class Bottleneck(nn.Module):
    """(N, in_channels, H, W) to (N, 4 width, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu(branch + (x if self.downsample is None else self.downsample(x)))


class ImageNetResNet(nn.Module):
    """(N, in_channels, H, W) to (N, num_classes), H and W of 32 or more; ``blocks`` and ``widths`` per stage."""

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        previous = widths[0]
        self.conv1 = nn.Conv2d(in_channels, previous, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(previous)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = len(blocks)
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(count):
                stage.append(Bottleneck(previous, width, 2 if i > 0 and j == 0 else 1))
                previous = Bottleneck.expansion * width
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(previous, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet50(
    num_classes: int = 1000, in_channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512)
) -> ImageNetResNet:
    """ResNet-50, 25.6 million parameters at the default widths."""
    return ImageNetResNet((3, 4, 6, 3), widths, num_classes, in_channels)
