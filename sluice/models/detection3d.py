"""A stand-in for 3-D detection: voxels, convolutions in space, then a pyramid over the plane, and three outputs.

The height of the voxel grid is folded into channels, as detectors in the bird's eye view do (SECOND, Yan et al. 2018);
a head of two levels gives scores, boxes and directions at every place.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Detector3d", "detector3d"]


def _layer2d(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def _layer3d(channels: int, width: int, stride: tuple[int, int, int] | int = 1) -> nn.Sequential:
    conv = nn.Conv3d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU())


class Detector3d(nn.Module):
    """Voxels (N, features, D, H, W), D a multiple of four, H and W of eight, to three maps on H / 2 by W / 2.

    The maps are scores (N, classes, ...), boxes (N, 7, ...) and directions (N, 2, ...).
    """

    def __init__(self, classes: int, features: int, depth: int, space: int, plane: int) -> None:
        super().__init__()
        self.space = nn.Sequential(
            _layer3d(features, space), _layer3d(space, space, 2), _layer3d(space, 2 * space, (2, 1, 1))
        )
        self.first = nn.Sequential(_layer2d(2 * space * (depth // 4), plane), _layer2d(plane, plane))
        self.second = nn.Sequential(_layer2d(plane, 2 * plane, 2), _layer2d(2 * plane, 2 * plane))
        self.across1 = nn.Conv2d(plane, plane, 1)
        self.across2 = nn.ConvTranspose2d(2 * plane, plane, 2, 2)
        self.scores, self.boxes = nn.Conv2d(2 * plane, classes, 1), nn.Conv2d(2 * plane, 7, 1)
        self.directions = nn.Conv2d(2 * plane, 2, 1)

    def forward(self, voxels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = self.first(self.space(voxels).flatten(1, 2))
        both = torch.cat([F.relu(self.across1(first)), F.relu(self.across2(self.second(first)))], 1)
        return self.scores(both), self.boxes(both), self.directions(both)


def detector3d(classes: int = 3, features: int = 4, depth: int = 8, space: int = 8, plane: int = 16) -> Detector3d:
    """A small detector on voxels (N, 4, 8, 16, 16) by default."""
    return Detector3d(classes, features, depth, space, plane)
