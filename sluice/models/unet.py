"""A U-Net that predicts the noise in an image at a time step (DDPM, Ho et al. 2020).

Blocks are ``conv(silu(norm(x))) + time``, ``conv(silu(norm(.)))`` and a shortcut, with group norms of groups of four
channels; the middle has attention over pixels. The time comes as sines and cosines, then two linear layers.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["UNet", "unet"]

PER_GROUP = 4


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // PER_GROUP, channels)


class TimedBlock(nn.Module):
    """(N, C, H, W) and (N, T) to (N, width, H, W)."""

    def __init__(self, channels: int, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


class PixelAttention(nn.Module):
    """One head over all pixels, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, 1, c, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(n, c, h, w))


class UNet(nn.Module):
    """Images (N, channels, H, W), H and W even, and time steps (N,) to noise of the shape of the images."""

    def __init__(self, channels: int, widths: tuple[int, int], time: int) -> None:
        super().__init__()
        low, high = widths
        self.frequencies = time // 2
        self.time1, self.time2 = nn.Linear(time, time), nn.Linear(time, time)
        self.stem, self.down1 = nn.Conv2d(channels, low, 3, padding=1), TimedBlock(low, low, time)
        self.halve, self.down2 = nn.Conv2d(low, low, 3, 2, padding=1), TimedBlock(low, high, time)
        self.middle, self.attention = TimedBlock(high, high, time), PixelAttention(high)
        self.up2, self.widen = TimedBlock(2 * high, low, time), nn.Conv2d(low, low, 3, padding=1)
        self.up1 = TimedBlock(2 * low, low, time)
        self.norm, self.out = _norm(low), nn.Conv2d(low, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        scale = -math.log(1e4) / self.frequencies
        angles = steps[:, None] * torch.exp(scale * torch.arange(self.frequencies, device=x.device))
        time = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], 1))))
        first = self.down1(self.stem(x), time)
        second = self.down2(self.halve(first), time)
        y = self.attention(self.middle(second, time))
        y = self.up2(torch.cat([y, second], 1), time)
        y = self.widen(F.interpolate(y, scale_factor=2.0))
        y = self.up1(torch.cat([y, first], 1), time)
        return self.out(F.silu(self.norm(y)))


def unet(channels: int = 1, widths: tuple[int, int] = (16, 32), time: int = 32) -> UNet:
    """A small U-Net for images of 16 x 16 by default; widths are multiples of four."""
    return UNet(channels, widths, time)
