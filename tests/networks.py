"""Small networks with odd, unequal sizes, one per way in which channels can be tied; every channel is alive.

The first layer is always cuttable, no two widths in a network are equal unless they must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice import models
from sluice.models import enliven
from sluice.models.resnet import BasicBlock
from sluice.passes.graph.groups import Analysis

__all__ = ["NETWORKS", "Mixed", "any_network", "build", "mixed", "random_kept"]


class Plain(nn.Module):
    """Batch norm, flatten of C x H x W, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5)
        self.fc1, self.fc2 = nn.Linear(5 * 6 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc2(F.gelu(self.fc1(x.flatten(1))))


class Norms(nn.Module):
    """Layer norm over channels, group norm over channels; both take statistics over a gated axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.ln = nn.Conv2d(3, 10, 3), nn.LayerNorm(10)
        self.conv2, self.gn = nn.Conv2d(10, 12, 3), nn.GroupNorm(3, 12)
        self.conv3, self.plain = nn.Conv2d(12, 8, 1), nn.GroupNorm(1, 8, affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.gelu(self.gn(self.conv2(F.relu(x))))
        return self.head(F.relu(self.plain(self.conv3(x))).mean((2, 3)))


class Offsets(nn.Module):
    """Activations with f(0) != 0 and scalars: the mask must go onto the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.conv3, self.conv4 = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 7, 3), nn.Conv2d(7, 5, 1)
        self.conv5, self.fc = nn.Conv2d(5, 8, 1), nn.Linear(8 * 4 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.bn(self.conv1(x)))
        x = F.hardtanh(self.conv2(x) + 1.0, 0.25, 2.0)
        x = (1.0 - self.conv3(x)) / 3.0
        x = torch.clamp(self.conv4(x) + 0.5, 0.25, 3.0)
        return self.fc(torch.exp(self.conv5(x) * 2.0).flatten(1))


class SqueezeExcite(nn.Module):
    """A (B, C, 1, 1) gate multiplies its own source, residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.mask = nn.Conv2d(8, 1, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y = y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        y = y * torch.sigmoid(self.mask(y))
        return self.fc(F.relu(x + y).mean((2, 3)))


class Concat(nn.Module):
    """Concatenation of two widths, of the input (fixed), and of a tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 7, 1)
        self.bn, self.c = nn.BatchNorm2d(15), nn.Conv2d(15, 6, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(x)), x, F.relu(self.b(x))], 1)
        y = self.c(F.relu(self.bn(y)))
        return self.fc(torch.cat([y, y.abs()], 1).mean((2, 3)))


class Splits(nn.Module):
    """chunk, unequal split, a slice that crosses the border of two groups, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(5, 9, 1)
        self.p, self.q, self.r = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)
        self.wide, self.fc = nn.Conv2d(4, 11, 1), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.conv1(x)).chunk(2, 1)
        p, q, r = self.conv2(a * torch.sigmoid(b)).split([2, 4, 3], 1)
        y = F.relu(self.p(p) + self.q(q) + self.r(r))
        wide = F.relu(torch.cat([self.wide(y), y], 1))
        return self.fc(wide[:, 4:13].mean((2, 3)) + wide.narrow(1, 0, 9).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet unit: channel shuffle as view, transpose, reshape, then depthwise, then the operator itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.dw = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=12)
        self.conv2, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 3)
        self.shuffle = nn.ChannelShuffle(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        x = self.shuffle(F.relu(self.dw(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(5, 6, 1), nn.Conv2d(24, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.relu(self.conv1(x)), 2)
        x = F.pixel_unshuffle(F.relu(self.conv2(x)), 2)
        return self.fc(F.relu(self.conv3(x)).mean((2, 3)))


class Crepe(nn.Module):
    """Channels last before the flatten: one channel is a set of spaced columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 6, (5, 1), (2, 1)), nn.BatchNorm2d(6), nn.Linear(6 * 4, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = x.permute(0, 2, 3, 1).reshape(-1, 6 * 4)
        return self.out(F.relu(self.fc(x)))


class Grouped(nn.Module):
    """Grouped convolution, depthwise with a channel multiplier, grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, groups=2)
        self.dw = nn.Conv2d(12, 24, 3, groups=12, padding=1)
        self.conv2, self.up = nn.Conv2d(24, 6, 1), nn.ConvTranspose2d(6, 10, 2, groups=2)
        self.dwt, self.fc = nn.ConvTranspose2d(10, 10, 3, groups=10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.conv1(x))))
        x = F.relu(self.conv2(F.relu(self.dw(x))))
        return self.fc(F.relu(self.dwt(F.relu(self.up(x)))).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up = nn.Conv2d(3, 7, 3), nn.ConvTranspose2d(7, 5, 2, 2)
        self.bn, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.up(F.relu(self.conv1(x))))))


class Sequence1d(nn.Module):
    """One spatial axis: convolutions, transposed, instance norm, upsampling, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(2, 6, 5), nn.InstanceNorm1d(6, affine=True)
        self.up, self.bn = nn.ConvTranspose1d(6, 5, 3), nn.BatchNorm1d(5)
        self.track = nn.InstanceNorm1d(5, affine=True, track_running_stats=True)
        self.conv2, self.fc = nn.Conv1d(5, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.norm(self.conv1(x))), 2)
        x = self.track(F.relu(self.bn(self.up(x))))
        x = F.interpolate(self.conv2(x), scale_factor=2, mode="nearest")
        return self.fc(F.avg_pool1d(F.relu(x), 3).amax(-1))


class Volume(nn.Module):
    """Three spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6)
        self.up, self.fc = nn.ConvTranspose3d(6, 5, 2), nn.Linear(5 * 4 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn(self.conv1(x))), (2, 1, 1))
        return self.fc(F.avg_pool3d(F.relu(self.up(x)), (1, 1, 3)).flatten(1))


class Parameters(nn.Module):
    """PReLU, a layer scale (C, 1, 1), a bias (1, C, 1, 1), instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.PReLU(6), nn.Conv2d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5)
        self.norm, self.single = nn.InstanceNorm2d(6, affine=True), nn.PReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x))
        x = x + self.scale * self.conv2(x)
        return self.fc(self.single(self.norm(x + self.shift) * self.scale).amax((2, 3)))


class Spatial(nn.Module):
    """Everything that works beside the channels: pad, resize, pools, sums."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 8, 3), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 2 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.conv1(x)), (1, 0, 2, 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.max_pool2d(F.relu(self.conv2(F.pad(x, (1, 1, 1, 1), value=0.5))), 2, return_indices=False)
        x = F.interpolate(self.conv3(x), size=(6, 9), mode="nearest")
        return self.fc(F.adaptive_avg_pool2d(x, (2, 3)).reshape(x.size(0), -1)) + self.fc.bias * x.sum()


class InPlace(nn.Module):
    """relu_, +=, and one convolution, one norm and one linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.twice, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.fc1, self.fc2 = nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.twice(x))
        y += x
        y = self.relu(self.bn2(self.twice(self.relu(y))))
        z = y.mean((2, 3))
        return self.fc2(F.silu(self.fc1(F.silu(self.fc1(z)))))


class Tokens(nn.Module):
    """A transformer block: attention stays whole, the hidden units and the stem's norm do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(3, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 13), nn.Linear(13, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class ClassToken(nn.Module):
    """A vision transformer: patches, a class token for every image, attention that stays whole, and its first row."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 10, 3, 3), nn.Parameter(torch.rand(1, 1, 10) + 0.5)
        self.position = nn.Parameter(torch.rand(1, 7, 10) + 0.5)
        self.norm1, self.attention = nn.LayerNorm(10), nn.MultiheadAttention(10, 5, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 13), nn.Linear(13, 10)
        self.norm3, self.head = nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class _Norm2d(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _NextBlock(nn.Module):
    """Depthwise 7 x 7, then a perceptron in the last axis, scaled per channel before or behind the permute."""

    def __init__(self, width: int, hidden: int, first: bool):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma, self.first = nn.Parameter(torch.rand(width) + 0.5), first

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        if self.first:
            return x + (y * self.gamma).permute(0, 3, 1, 2)
        return x + y.permute(0, 3, 1, 2) * self.gamma.reshape(1, -1, 1, 1)


class ConvNext(nn.Module):
    """Residual blocks in the last axis, which leave channels last in memory, and a pool to one position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.block1 = nn.Conv2d(3, 6, 2, 2), _Norm2d(6), _NextBlock(6, 11, first=False)
        self.norm2, self.down, self.block2 = _Norm2d(6), nn.Conv2d(6, 9, 2, 2), _NextBlock(9, 14, first=True)
        self.norm3, self.head = _Norm2d(9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.norm1(self.stem(x)))
        x = self.block2(self.down(self.norm2(x)))
        return self.head(self.norm3(F.adaptive_avg_pool2d(x, 1)).flatten(1))


class Mixed(nn.Module):
    """Residual blocks with and without projection, then plain layers: something for every method."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.block1, self.block2, self.block3 = BasicBlock(13, 13), BasicBlock(13, 19, 2), BasicBlock(19, 19)
        self.tail1, self.tail2 = nn.Conv2d(19, 11, 3, padding=1), nn.Conv2d(11, 23, 3, padding=1)
        self.fc = nn.Linear(23, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(F.relu(self.bn(self.stem(x))))))
        return self.fc(F.relu(self.tail2(F.relu(self.tail1(x)))).mean((2, 3)))


class Tied(nn.Module):
    """One weight under two names, a parameter nobody reads, dropout, dictionary in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 7), nn.Linear(5, 7)
        self.decode.weight = self.encode.weight
        self.unused, self.drop = nn.Parameter(torch.rand(4)), nn.Dropout(0.4)
        self.mix, self.head = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.drop(F.relu(self.mix(F.relu(self.encode(x)) * F.relu(self.decode(y)))))
        return {"score": self.head(z), "sum": self.head(z).sum(1)}


Example = tuple[Any, ...] | dict[str, Tensor]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "plain": (Plain, ((3, 8, 6),)),
    "norms": (Norms, ((3, 9, 7),)),
    "offsets": (Offsets, ((3, 8, 6),)),
    "squeeze_excite": (SqueezeExcite, ((3, 7, 5),)),
    "concat": (Concat, ((3, 7, 5),)),
    "splits": (Splits, ((3, 7, 5),)),
    "shuffle": (Shuffle, ((3, 8, 6),)),
    "pixels": (Pixels, ((3, 6, 4),)),
    "crepe": (Crepe, ((1, 11, 1),)),
    "grouped": (Grouped, ((3, 7, 6),)),
    "transposed": (Transposed, ((3, 7, 5),)),
    "sequence1d": (Sequence1d, ((2, 19),)),
    "volume": (Volume, ((2, 7, 5, 4),)),
    "parameters": (Parameters, ((3, 7, 5),)),
    "spatial": (Spatial, ((3, 9, 7),)),
    "in_place": (InPlace, ((3, 7, 5),)),
    "tokens": (Tokens, ((5, 3),)),
    "class_token": (ClassToken, ((3, 9, 6),)),
    "conv_next": (ConvNext, ((3, 12, 8),)),
    "tied": (Tied, ((5,), (5,))),
}


def build(name: str, batch: int = 3) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network in eval mode with every channel alive, and positional inputs."""
    factory, shapes = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = factory()
        inputs = tuple(torch.randn(batch, *shape) for shape in shapes)
    return enliven(model, 0, inputs), inputs


def mixed(batch: int = 2) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """`Mixed` with every channel alive, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, x = Mixed(), torch.randn(batch, 3, 9, 7)
    return enliven(model, 0, (x,)), (x,)


def any_network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A small network of this module, or a reference network of ``sluice.models`` with every channel alive."""
    if name in NETWORKS:
        return build(name)
    inputs = models.example_inputs(name, 2)
    return enliven(getattr(models, name)(), 0, inputs), inputs


def random_kept(analysis: Analysis, seed: int) -> dict[str, list[int]]:
    """Random channels to keep in every group, at least one; seed 0 removes exactly one channel per group."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in analysis.groups:
        count = group.size - 1 if seed == 0 else int(rng.integers(1, group.size + 1))
        kept[group.name] = sorted(rng.choice(group.size, count, replace=False).tolist())
    return kept
