"""The networks of `benchmarks.kernels`: those of the project, and stand-ins of three families of other packages.

The stand-ins have the layers and sizes of their families, and random weights: ConvNeXt atto (widths 40 to 320, at 64
pixels), a vision transformer of the size "tiny" (width 192, three heads, 12 layers, 4 pixels a patch), a BERT of two
layers (width 128, two heads, 64 words).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.fidelity_runs import NETWORKS

__all__ = ["CASES", "Case"]

HIDDEN = 4  # times the width, of a block


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and its input for a batch."""

    make: Callable[[], nn.Module]
    example: Callable[[int], Tensor]


class ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.reduce = nn.Linear(width, HIDDEN * width), nn.Linear(HIDDEN * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.reduce(nn.functional.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext_atto() -> nn.Module:
    widths, depths = (40, 80, 160, 320), (2, 2, 6, 2)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])]
    for k, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if k:
            layers += [ChannelNorm(widths[k - 1]), nn.Conv2d(widths[k - 1], width, 2, stride=2)]
        layers += [ConvNextBlock(width) for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1]), nn.Linear(320, 10))


class Encoder(nn.Module):
    """A layer of a transformer; its norms come first (vision) or last (BERT)."""

    def __init__(self, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, HIDDEN * width), nn.Linear(HIDDEN * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x + self.attended(self.norm1(x))
            return x + self.widened(self.norm2(x))
        x = self.norm1(x + self.attended(x))
        return self.norm2(x + self.widened(x))

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def widened(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class VitTiny(nn.Module):
    def __init__(self, width: int = 192, heads: int = 3, depth: int = 12, tokens: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.Sequential(*[Encoder(width, heads, True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(x)).mean(1))


class Bert(nn.Module):
    def __init__(self, words: int = 1000, width: int = 128, heads: int = 2, depth: int = 2, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(1, length, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*[Encoder(width, heads, False) for _ in range(depth)])
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers(self.norm(self.words(ids) + self.places))
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def _own(name: str) -> Case:
    network = NETWORKS[name]
    return Case(network.make, lambda batch: torch.randn(batch, *network.shape))


CASES: Mapping[str, Case] = {
    **{name: _own(name) for name in NETWORKS},
    "convnext_atto": Case(convnext_atto, lambda batch: torch.randn(batch, 3, 64, 64)),
    "vit_tiny": Case(VitTiny, lambda batch: torch.randn(batch, 3, 32, 32)),
    "bert_two_layers": Case(Bert, lambda batch: torch.randint(0, 1000, (batch, 64))),
}
