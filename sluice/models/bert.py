"""BERT: words and positions, post-norm blocks with q, k, v apart (Devlin et al. 2019), positions in the plane at wish.

``x = norm(word + position)``; every block is ``x = norm(x + attention(x))``, ``x = norm(x + mlp(x))``. Names are those
of the checkpoints of the ``transformers`` package. With ``plane`` sizes the positions are those of boxes on a page
(LayoutLM, BROS): a table each for the left, upper, right and lower edge, and for width and height.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Bert", "BertLayer", "BertSizes", "LayoutBert", "bert", "layout_bert"]


@dataclass(frozen=True, slots=True)
class BertSizes:
    """Sizes of a BERT; ``dims`` are those of a head."""

    words: int = 97
    width: int = 48
    heads: int = 4
    dims: int = 12
    hidden: int = 96
    depth: int = 2
    positions: int = 32
    plane: int = 0


class SelfAttention(nn.Module):
    """(N, T, E) to the context (N, T, heads * dims); ``mask`` (N, 1, 1, T) is added to the scores."""

    def __init__(self, s: BertSizes) -> None:
        super().__init__()
        self.heads, self.dims = s.heads, s.dims
        self.query, self.key, self.value = (nn.Linear(s.width, s.heads * s.dims) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(n, tokens, self.heads, self.dims).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return context.transpose(1, 2).reshape(n, tokens, self.heads * self.dims)


class SelfOutput(nn.Module):
    """A linear layer back to the width, the sum with the shortcut, a norm."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(y) + x)


class BertLayer(nn.Module):
    """Attention and MLP with GELU, each followed by its sum and norm."""

    def __init__(self, s: BertSizes) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(s), "output": SelfOutput(s.heads * s.dims, s.width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(s.width, s.hidden)})
        self.output = SelfOutput(s.hidden, s.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Embeddings(nn.Module):
    """Tokens (N, T) to (N, T, E)."""

    def __init__(self, s: BertSizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(s.words, s.width)
        self.position_embeddings = nn.Embedding(s.positions, s.width)
        self.token_type_embeddings = nn.Embedding(2, s.width)
        self.LayerNorm = nn.LayerNorm(s.width, eps=1e-12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kind = self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(places) + kind)


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self, s: BertSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(s) for _ in range(s.depth))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """Tokens (N, T), and 1 where one counts (N, T), to embeddings of sentences (N, E): the mean over tokens."""

    def __init__(self, s: BertSizes) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(s), Encoder(s)

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        share = counts.to(self.embeddings.LayerNorm.weight.dtype)
        mask = (1.0 - share)[:, None, None, :] * -1e4
        x = self.encoder(self.embeddings(tokens), mask)
        share = share.unsqueeze(-1)
        return (x * share).sum(1) / share.sum(1).clamp(min=1.0)


class LayoutBert(nn.Module):
    """Tokens (N, T) and their boxes (N, T, 4) on a page of ``plane`` steps to scores of ``num_classes`` per token."""

    def __init__(self, s: BertSizes, num_classes: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(s), Encoder(s)
        self.x, self.y = nn.Embedding(s.plane, s.width), nn.Embedding(s.plane, s.width)
        self.h, self.w = nn.Embedding(s.plane, s.width), nn.Embedding(s.plane, s.width)
        self.classifier = nn.Linear(s.width, num_classes)

    def forward(self, tokens: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        left, upper, right, lower = boxes.unbind(-1)
        edges = self.x(left) + self.y(upper) + self.x(right) + self.y(lower)
        x = self.embeddings(tokens) + edges + self.h(lower - upper) + self.w(right - left)
        return self.classifier(self.encoder(x))


def bert(sizes: BertSizes | None = None) -> Bert:
    """A small BERT that makes embeddings of sentences."""
    return Bert(sizes or BertSizes())


def layout_bert(num_classes: int = 7, sizes: BertSizes | None = None) -> LayoutBert:
    """A small BERT with positions in the plane that labels tokens."""
    return LayoutBert(sizes or BertSizes(plane=64), num_classes)
