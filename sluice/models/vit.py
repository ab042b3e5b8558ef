"""A small vision transformer for digits: patches as tokens, pre-norm blocks, the mean over tokens (Dosovitskiy 2021).

``x = patches(x) + positions``; every block is ``x += attention(norm(x))``, ``x += mlp(norm(x))`` with GELU between the
two layers of the MLP; then a norm, the mean over tokens, and a linear layer.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["SelfAttention", "TransformerBlock", "VisionTransformer", "vit"]


class SelfAttention(nn.Module):
    """(N, T, E) to (N, T, E) by ``heads`` heads of ``dims`` dimensions, ``E / heads`` by default."""

    def __init__(self, width: int, heads: int, dims: int | None = None) -> None:
        super().__init__()
        self.heads, self.dims = heads, dims or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.dims)
        self.proj = nn.Linear(heads * self.dims, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, self.dims).permute(2, 0, 3, 1, 4).unbind(0)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.proj(context.transpose(1, 2).reshape(n, tokens, self.heads * self.dims))


class TransformerBlock(nn.Module):
    """Attention and an MLP of ``hidden`` units, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dims: int | None = None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, dims)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """(N, 1, size, size) to (N, num_classes)."""

    def __init__(
        self, num_classes: int, size: int, patch: int, width: int, heads: int, hidden: int, depth: int, dims: int | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden, dims) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit(
    num_classes: int = 10,
    size: int = 28,
    patch: int = 4,
    width: int = 64,
    heads: int = 4,
    hidden: int = 128,
    depth: int = 4,
    dims: int | None = None,
) -> VisionTransformer:
    """A small vision transformer, (N, 1, 28, 28) by default: 49 tokens of 64, four blocks, four heads of 16."""
    return VisionTransformer(num_classes, size, patch, width, heads, hidden, depth, dims)
