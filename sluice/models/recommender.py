"""A recommender by self-attention over the items that were seen (SASRec, Kang and McAuley 2018).

Causal pre-norm blocks, whose MLP has ReLU and the width of the stream; the table of items scores the next one as well.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["AttentionRecommender", "attention_recommender"]


class CausalBlock(nn.Module):
    """(N, T, E) to the same; no position sees a later one."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.dims = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, heads * self.dims) for _ in range(3))
        self.out = nn.Linear(heads * self.dims, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, steps, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(of).view(n, steps, self.heads, self.dims).transpose(1, 2)
            for layer, of in ((self.query, y), (self.key, x), (self.value, x))  # as published: keys are not normalised
        )
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(context.transpose(1, 2).reshape(n, steps, self.heads * self.dims))
        return x + self.down(self.up(self.norm2(x)).relu())


class AttentionRecommender(nn.Module):
    """Items (N, T) to scores of the next item at every step, (N, T, items)."""

    def __init__(self, items: int, steps: int, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(items, width), nn.Embedding(steps, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        x = self.items(history) + self.places(torch.arange(history.shape[1], device=history.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.items.weight)


def attention_recommender(
    items: int = 97, steps: int = 12, width: int = 24, heads: int = 3, hidden: int = 24, depth: int = 2
) -> AttentionRecommender:
    """A small recommender over 12 items by default."""
    return AttentionRecommender(items, steps, width, heads, hidden, depth)
