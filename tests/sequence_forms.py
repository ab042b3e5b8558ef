"""Further small networks with odd, unequal sizes: forms of attention, norms by hand, computed weights, stacked layers.

They follow what published networks are made of: Llama, T5, ALBERT, GPT-2, XCiT, Swin, MobileViT, BiT, a TCN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sequences import SEQUENCES, Attention, Block, Inputs, Network, rows, words

__all__ = ["ALL", "FORMS"]


class Rms(nn.Module):
    """Root mean square norm, written by hand."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Rotary(nn.Module):
    """Tables of cosines and sines, computed without gradients from a buffer that is not saved."""

    inverse: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", 1.0 / 100 ** torch.tensor([0.0, 0.5]), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        angles = (self.inverse[None, :, None].expand(1, -1, 1) @ place[:, None, :].to(self.inverse)).transpose(1, 2)
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * table[0] + torch.cat([-right, left], -1) * table[1]


class Llama(nn.Module):
    """Rotary positions, 6 heads of q that share 2 of k and v, a gated MLP."""

    def __init__(self, norm: Callable[[int], nn.Module], expanded: bool):
        super().__init__()
        self.word, self.rotary, self.expanded = nn.Embedding(17, 10), Rotary(), expanded
        self.norm1, self.norm2, self.norm3 = norm(10), norm(10), norm(10)
        self.q, self.k, self.v = nn.Linear(10, 24, False), nn.Linear(10, 8, False), nn.Linear(10, 8, False)
        self.out, self.gate, self.up = nn.Linear(24, 10, False), nn.Linear(10, 13, False), nn.Linear(10, 13, False)
        self.down, self.head = nn.Linear(13, 10, False), nn.Linear(10, 17, False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word(ids)
        b, n, _ = x.shape
        table, y = self.rotary(x), self.norm1(x)
        q, k, v = (f(y).view(b, n, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, table), rotated(k, table)
        if self.expanded:
            k, v = (t[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.expanded)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return self.head(self.norm3(x + self.down(F.silu(self.gate(y)) * self.up(y))))


class Interleaved(nn.Module):
    """Rotary positions of even and odd dimensions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 36), nn.Linear(12, width)
        angles = torch.outer(torch.arange(7.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turned(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Glu(nn.Module):
    """One layer for the gate and what it lets through, and a norm of its own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.wide = nn.Linear(5, 10), nn.RMSNorm(10), nn.Linear(10, 26)
        self.down, self.head = nn.Linear(13, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.wide(self.norm(x)).chunk(2, -1)
        return self.head((x + self.down(F.silu(gate) * value)).mean(1))


class T5(nn.Module):
    """Two layers without biases share a table of relative positions, which is added to their scores."""

    def __init__(self, by_hand: bool):
        super().__init__()
        self.word, self.table, self.by_hand = nn.Embedding(17, 10), nn.Embedding(5, 3), by_hand
        self.layers, self.norm, self.head = nn.ModuleList(self.layer() for _ in range(2)), Rms(10), nn.Linear(10, 3)

    def layer(self) -> nn.ModuleDict:
        sizes = {"q": (10, 12), "k": (10, 12), "v": (10, 12), "o": (12, 10), "up": (10, 13), "down": (13, 10)}
        linear = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
        return nn.ModuleDict({**linear, "norm1": Rms(10), "norm2": Rms(10)})

    def forward(self, ids: Tensor) -> Tensor:
        x, place = self.word(ids), torch.arange(ids.shape[1])
        bias = self.table((place[None] - place[:, None]).clamp(-2, 2) + 2).permute(2, 0, 1).unsqueeze(0)
        b, n, _ = x.shape
        for part in self.layers:
            y = part["norm1"](x)
            q, k, v = (part[name](y).view(b, n, 3, 4).transpose(1, 2) for name in "qkv")
            if self.by_hand:
                y = torch.matmul((torch.matmul(q, k.transpose(3, 2)) + bias).softmax(-1), v)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            x = x + part["o"](y.transpose(1, 2).contiguous().view(b, n, 12))
            x = x + part["down"](F.relu(part["up"](part["norm2"](x))))
        return self.head(self.norm(x).mean(1))


class Seen(nn.Module):
    """A boolean mask, made of an input of ones and zeros; a row of it that sees nothing is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.norm, self.head = nn.Embedding(17, 10), nn.LayerNorm(10), nn.Linear(10, 3)
        self.q, self.k, self.v, self.out = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        x = self.word(ids)
        b, n, _ = x.shape
        mask = seen[:, None, None, :].to(torch.bool)
        q, k, v = (f(x).view(b, n, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous().view(b, n, 12)
        return self.head(self.norm(x + self.out(y)))


class Windows(nn.Module):
    """Windows as an axis of their own, so that attention has five, and a table added to the scores."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(width, 36), nn.Linear(12, width), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, 2, 4, 3, 3, 4).permute(3, 0, 1, 4, 2, 5).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table)
        return self.out(y.permute(0, 1, 3, 2, 4).reshape(b, n, 12))


class Folded(nn.Module):
    """Heads in one axis with the batch, beside a size that follows from the others (SAM)."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 36), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, -1).permute(2, 0, 3, 1, 4).reshape(3, b * 3, n, -1).unbind(0)
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.out(y.view(b, 3, n, -1).permute(0, 2, 1, 3).reshape(b, n, -1))


class Covariance(nn.Module):
    """Attention between dimensions, of q and k that are normed by hand (XCiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out, self.scale = nn.Linear(width, 36), nn.Linear(12, width), nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale
        return self.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, 12))


class Shared(nn.Module):
    """One layer three times (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.norm0, self.map = nn.Embedding(17, 6), nn.LayerNorm(6), nn.Linear(6, 10)
        self.attention, self.norm1 = Attention(10, F.scaled_dot_product_attention), nn.LayerNorm(10)
        self.up, self.down, self.norm2, self.head = nn.Linear(10, 13), nn.Linear(13, 10), nn.LayerNorm(10), nn.Linear(10, 3)  # noqa: E501 # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self.map(self.norm0(self.word(ids)))
        for _ in range(3):
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.down(F.gelu(self.up(x), approximate="tanh")))
        return self.head(torch.tanh(x[:, 0]))


class Columns(nn.Module):
    """A linear layer whose weight has the outputs as columns, on rows of tokens (GPT-2)."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out) * 0.3), nn.Parameter(torch.rand(out) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.bias.shape[0])


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(17, 12), nn.Embedding(9, 12)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj, self.up, self.down = Columns(12, 36), Columns(12, 12), Columns(12, 14), Columns(14, 12)
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.word.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word(ids) + self.place(torch.arange(ids.shape[1]).unsqueeze(0))
        parts = self.qkv(self.norm1(x)).split(12, dim=2)
        q, k, v = (t.view(*t.shape[:-1], -1, 4).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(y.reshape(*y.shape[:-2], -1).contiguous())
        h = self.up(self.norm2(x))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return self.head(self.norm3(x + self.down(h)))


class Pooled(nn.Module):
    """A class token repeated over the batch, and a query that pools the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(5, 10), nn.Parameter(torch.randn(1, 1, 10))
        self.query, self.pool = nn.Parameter(torch.randn(1, 1, 10)), nn.MultiheadAttention(10, 5, batch_first=True)
        self.attention = Attention(10, F.scaled_dot_product_attention)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.repeat(x.shape[0], 1, 1), self.embed(x)], 1)
        x = self.norm(x + self.attention(x))
        y = self.pool(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return self.head(y[:, 0] + x.mean(1))


class Causal(nn.Module):
    """1-D convolutions with normed weights, each cut off in front (a TCN)."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.a, self.b = norm(nn.Conv1d(5, 7, 3, padding=2)), norm(nn.Conv1d(7, 9, 3, padding=4, dilation=2))
        self.c, self.d, self.head = nn.Conv1d(5, 9, 1), norm(nn.Linear(9, 11)), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        y = F.relu(self.a(x)[..., : x.shape[-1]])
        y = F.relu(self.b(y)[..., : x.shape[-1]] + self.c(x))
        return self.head(F.relu(self.d(y.mean(-1))))


def hooked(layer: nn.Module) -> nn.Module:
    """Weight norm as it was before parametrizations, and is in many networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def by_batch_norm(weight: Tensor) -> Tensor:
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


def by_moments(weight: Tensor) -> Tensor:
    var, mean = torch.var_mean(weight, [1, 2, 3], keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(var + 1e-6)


def by_hand(weight: Tensor) -> Tensor:
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    return weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)


class Standardised(nn.Module):
    """Convolutions whose weights are standardised before use (BiT)."""

    def __init__(self, standardise: Callable[[Tensor], Tensor]):
        super().__init__()
        self.standardise = standardise
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm1, self.norm2, self.head = nn.GroupNorm(2, 6), nn.GroupNorm(2, 8), nn.Linear(6, 3)

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardise(layer.weight), layer.bias, layer.stride, layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.a, x)
        y = F.relu(self.norm2(self.conv(self.b, F.relu(self.norm1(x)))))
        return self.head((x + self.conv(self.c, y)).mean((2, 3)))


class ChannelNorm(nn.Module):
    """Layer norm over channels in axis 1, written by hand, and a pool of what lies channels last."""

    def __init__(self, unbiased: bool):
        super().__init__()
        self.a, self.b, self.head, self.unbiased = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1), nn.Linear(9, 3), unbiased
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        centred = x - x.mean(1, keepdim=True)
        var = x.var(1, keepdim=True) if self.unbiased else centred.pow(2).mean(1, keepdim=True)
        x = self.scale[:, None, None] * (centred / torch.sqrt(var + 1e-6)) + self.shift[:, None, None]
        x = F.gelu(self.b(x)).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shortcut(nn.Module):
    """A strided shortcut with channels of zeros around it, then maps of two sizes side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, 2, 1)
        self.c, self.d, self.head = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 7, 1), nn.Conv2d(13, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3)) + self.c(F.relu(self.b(x))))
        y = F.interpolate(self.d(y), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([x, y], 1)).mean((2, 3))


class Merging(nn.Module):
    """Patches of a padded map are merged into one (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.merge = nn.Conv2d(3, 6, 1), nn.LayerNorm(24), nn.Linear(24, 11, False)
        self.last, self.head = nn.LayerNorm(11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.last(self.merge(self.norm(x))).mean((1, 2)))


class Unfolded(nn.Module):
    """Attention over the patches of a map, which merges batch and channels on the way (MobileViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 1, bias=False)
        self.attention, self.norm = Attention(10, F.scaled_dot_product_attention, True), nn.LayerNorm(10)
        self.c, self.d, self.head = nn.Conv2d(10, 6, 1), nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.a(x))
        x = self.b(first)
        b, c, h, w = x.shape
        n = h * w // 4
        x = x.reshape(b * c * h // 2, 2, w // 2, 2).transpose(1, 2).reshape(b, c, n, 4).transpose(1, 3)
        x = x.reshape(b * 4, n, c)
        x = (x + self.attention(self.norm(x))).contiguous().view(b, 4, n, -1)
        x = x.transpose(1, 3).reshape(b * c * h // 2, w // 2, 2, 2).transpose(1, 2).reshape(b, c, h, w)
        return self.head(F.relu(self.d(torch.cat([first, F.relu(self.c(x))], 1))).mean((2, 3)))


class Selective(nn.Module):
    """Two branches stacked, and a softmax between them (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
        self.d, self.head = nn.Conv2d(5, 12, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        share = self.d(F.relu(self.c(y.sum(1).mean((2, 3), keepdim=True)))).view(-1, 2, 6, 1, 1).softmax(1)
        return self.head((y * share).sum(1).mean((2, 3)))


class Stack(nn.Module):
    """Recurrent layers with dropout between them, of which the outputs or the last states are read."""

    def __init__(self, kind: Any, read: str = "outputs", **more: Any):
        super().__init__()
        sides = 2 if more.get("bidirectional") else 1
        self.embed, self.inner = nn.Linear(5, 7), kind(7, 6, num_layers=3, dropout=0.3, batch_first=True, **more)
        self.read, self.head = read, nn.Linear(6 * sides, 3)
        with torch.no_grad():  # else nothing of the inputs is left behind three layers
            for parameter in self.inner.parameters():
                parameter.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.inner(self.embed(x).relu())
        return self.head(outputs[:, -1] if self.read == "outputs" else torch.cat([states[-2], states[-1]], -1))


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The transposes of a matrix by three names."""
    return ((k @ q.mT).adjoint() * 0.5).softmax(-1) @ v.mT.mH


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads lie in the batch; a number of each query is spread over the keys."""
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    spread = q.tanh().sum(-1)[:, :, None].expand(-1, -1, n) * torch.linspace(-1.0, 1.0, n)
    return ((q @ k.transpose(1, 2) + spread).softmax(-1) @ v).view(b, h, n, d)


class Repeated(nn.Module):
    """6 heads of q share 2 of k and v, each repeated one by one; so is every channel of the result."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 24), nn.Linear(width, 8), nn.Linear(width, 8)
        self.proj, self.last = nn.Linear(24, 7), nn.Linear(14, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 4).transpose(1, 2).repeat_interleave(3, 1) for f in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(self.proj(y).relu().repeat_interleave(2, dim=-1))


def images() -> Inputs:
    return (torch.randn(3, 3, 6, 4),)


def seen() -> Inputs:
    return (*words(), torch.tensor([[1, 1, 1, 0, 1, 0, 0], [1] * 7, [0] * 7]))


FORMS: dict[str, Network] = {
    "llama": (lambda: Llama(Rms, True), words),
    "llama, grouped": (lambda: Llama(nn.RMSNorm, False), words),
    "interleaved": (lambda: Block(Interleaved), rows),
    "glu": (Glu, rows),
    "t5": (lambda: T5(False), words),
    "t5, by hand": (lambda: T5(True), words),
    "seen": (Seen, seen),
    "windows": (lambda: Block(Windows), lambda: (torch.randn(3, 8, 5),)),
    "folded": (lambda: Block(Folded), rows),
    "covariance": (lambda: Block(Covariance), rows),
    "shared": (Shared, words),
    "columns": (Gpt, words),
    "turned": (lambda: Block(lambda e: Attention(e, turned)), rows),
    "shifted": (lambda: Block(lambda e: Attention(e, shifted)), rows),
    "repeated": (lambda: Block(Repeated), rows),
    "pooled": (Pooled, rows),
    "weight norm": (lambda: Causal(nn.utils.parametrizations.weight_norm), rows),
    "weight norm, a hook": (lambda: Causal(hooked), rows),
    "standardised": (lambda: Standardised(by_batch_norm), images),
    "standardised, moments": (lambda: Standardised(by_moments), images),
    "standardised, by hand": (lambda: Standardised(by_hand), images),
    "channel norm": (lambda: ChannelNorm(False), images),
    "channel norm, unbiased": (lambda: ChannelNorm(True), images),
    "shortcut": (Shortcut, images),
    "merging": (Merging, lambda: (torch.randn(3, 3, 7, 5),)),
    "unfolded": (Unfolded, images),
    "selective": (Selective, images),
    "lstm, dropout": (lambda: Stack(nn.LSTM), rows),
    "gru, dropout, both ways": (lambda: Stack(nn.GRU, "states", bidirectional=True), rows),
    "rnn, dropout": (lambda: Stack(nn.RNN), rows),
}
ALL = SEQUENCES | FORMS
