"""Small transformers and recurrent networks with odd, unequal sizes, one per way in which they are written.

Every network has widths of all kinds that its form offers: heads, hidden units, the residual width, states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice import models
from sluice.models import enliven
from sluice.models.bert import BertSizes

__all__ = [
    "REFERENCES",
    "SEQUENCES",
    "Attention",
    "Block",
    "Inputs",
    "Network",
    "Recurrent",
    "rows",
    "sequence",
    "words",
]

Inputs = tuple[Tensor, ...]


class Attention(nn.Module):
    """Self-attention in 3 heads of 4 dimensions; ``core`` takes q, k, v of (batch, heads, positions, dimensions)."""

    def __init__(self, width: int, core: Callable[..., Tensor], fused: bool = False, norm: bool = False):
        super().__init__()
        self.core, self.fused = core, fused
        if fused:
            self.qkv = nn.Linear(width, 36)
        else:
            self.q, self.k, self.v = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(width, 12)
        self.proj = nn.Linear(12, width)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).view(b, n, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        return self.proj(self.core(q, k, v).transpose(1, 2).reshape(b, n, 12))


class Block(nn.Module):
    """Patches or tokens of 5 numbers, one pre-norm block, the mean over positions."""

    def __init__(self, attention: Callable[[int], nn.Module], width: int = 10):
        super().__init__()
        self.embed, self.attention = nn.Linear(5, width), attention(width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 13), nn.Linear(13, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2.0
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v).view(b, h, n, d)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.linspace(-1, 1, 49).view(7, 7), scale=0.4)


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` in 5 heads of 2 dimensions."""

    def __init__(self, width: int, weights: bool = False, first: bool = True, **more: Any):
        super().__init__()
        self.inner, self.weights, self.first = (
            nn.MultiheadAttention(width, 5, batch_first=first, **more),
            weights,
            first,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        y = self.inner(x, x, x, need_weights=self.weights)[0]
        return y if self.first else y.transpose(0, 1)


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another, of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 10), nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(10, 5, kdim=6, vdim=6, batch_first=True)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.one(x).relu(), self.two(y).relu()
        return self.head(self.norm(x + self.attention(x, y, y, need_weights=False)[0]))


class Padded(nn.Module):
    """Attention that leaves out positions, told by a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 10), nn.LayerNorm(10), nn.Linear(10, 3)
        self.attention = nn.MultiheadAttention(10, 5, batch_first=True)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.attention(x, x, x, key_padding_mask=keep < 0.0, need_weights=False)[0]
        return self.head(self.norm(x + y))


class Grouped(nn.Module):
    """6 heads of q share 2 of k and v."""

    def __init__(self, width: int, expanded: bool):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 24), nn.Linear(width, 8), nn.Linear(width, 8)
        self.proj, self.expanded = nn.Linear(24, width), expanded

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 4).transpose(1, 2) for f in (self.k, self.v))
        if self.expanded:
            k, v = (t[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class Vision(nn.Module):
    """Patches, a class token, positions, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 10, 3, 3), nn.Parameter(torch.rand(1, 1, 10) + 0.5)
        self.position, self.scale = nn.Parameter(torch.rand(1, 7, 10) + 0.5), nn.Parameter(torch.rand(10) + 0.5)
        self.norm1, self.attention = nn.LayerNorm(10), Attention(10, F.scaled_dot_product_attention, True, True)
        self.norm2, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 13), nn.Linear(13, 10)
        self.norm3, self.head = nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.scale * self.attention(self.norm1(x))
        x = x + self.scale * self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class Window(nn.Module):
    """Windows of 2 x 2 positions, rolled by one, with a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.qkv, self.proj = (
            nn.Conv2d(3, 10, 1),
            nn.LayerNorm(10),
            nn.Linear(10, 36),
            nn.Linear(12, 10),
        )
        self.table = nn.Parameter(torch.randn(9, 3))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])
        self.last, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, v, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, v // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, values = self.qkv(y).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * 0.5
        scores = scores + self.table[self.index.view(-1)].view(4, 4, 3).permute(2, 0, 1).unsqueeze(0)
        y = self.proj((scores.softmax(-1) @ values).transpose(1, 2).reshape(-1, 4, 12))
        y = y.view(b, h // 2, v // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, v, c)
        x = x + torch.roll(y, (1, 1), (1, 2))
        return self.head(self.last(x).mean((1, 2)))


class Language(nn.Module):
    """Words and positions, a post-norm block, and scores of words by the table of words."""

    def __init__(self, tied: bool):
        super().__init__()
        self.word, self.place, self.norm0 = nn.Embedding(17, 10), nn.Embedding(9, 10), nn.LayerNorm(10)
        self.attention, self.norm1 = Attention(10, F.scaled_dot_product_attention), nn.LayerNorm(10)
        self.up, self.down, self.norm2 = nn.Linear(10, 13), nn.Linear(13, 10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 17, bias=False)
        if tied:
            self.head.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.word(x) + self.place(torch.arange(x.shape[1])))
        x = self.norm1(x + self.attention(x))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x)


class Encoder(nn.Module):
    def __init__(self, first: bool):
        super().__init__()
        self.embed = nn.Linear(5, 10)
        self.layer = nn.TransformerEncoderLayer(10, 5, 13, batch_first=True, norm_first=first)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))).mean(1))


class Recurrent(nn.Module):
    """A layer in front, the recurrent one, and a reader of the last position."""

    def __init__(self, kind: Any, hidden: int, states: bool = False, **more: Any):
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.inner = kind(7, hidden, batch_first=True, **more)
        self.states = nn.ModuleList([nn.Linear(5, hidden), nn.Linear(5, hidden)]) if states else None
        self.head = nn.Linear(more.get("proj_size", hidden) * (2 if more.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).relu()
        if self.states is None:
            y, _ = self.inner(y)
        else:
            h, c = (layer(x.mean(1)).unsqueeze(0) for layer in self.states)
            y, _ = self.inner(y, (h, c))
        return self.head(y[:, -1])


class Last(nn.Module):
    """Reads the last state, not the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.inner, self.head = nn.Embedding(17, 7), nn.GRU(7, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.word(x))[1][-1])


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind: Any, pair: bool):
        super().__init__()
        self.embed, self.cell, self.head, self.pair = nn.Linear(5, 7), kind(7, 6), nn.Linear(6, 3), pair

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        h = x.new_zeros(x.shape[0], 6)
        c = h
        for step in range(3):
            if self.pair:
                h, c = self.cell(x[:, step], (h, c))
            else:
                h = self.cell(x[:, step], h)
        return self.head(h)


def rows() -> Inputs:
    return (torch.randn(3, 7, 5),)


def words() -> Inputs:
    return (torch.arange(21).view(3, 7) % 17,)


Network = tuple[Callable[[], nn.Module], Callable[[], Inputs]]
SEQUENCES: dict[str, Network] = {
    "sdpa": (lambda: Block(lambda e: Attention(e, F.scaled_dot_product_attention)), rows),
    "fused": (lambda: Block(lambda e: Attention(e, F.scaled_dot_product_attention, fused=True)), rows),
    "fused, by hand": (lambda: Block(lambda e: Attention(e, by_hand, fused=True, norm=True)), rows),
    "by hand": (lambda: Block(lambda e: Attention(e, by_hand)), rows),
    "einsum": (lambda: Block(lambda e: Attention(e, by_einsum)), rows),
    "bmm": (lambda: Block(lambda e: Attention(e, by_bmm)), rows),
    "causal": (lambda: Block(lambda e: Attention(e, causal)), rows),
    "masked": (lambda: Block(lambda e: Attention(e, masked)), rows),
    "multihead": (lambda: Block(Multihead), rows),
    "multihead, weights": (lambda: Block(lambda e: Multihead(e, weights=True)), rows),
    "multihead, positions first": (lambda: Block(lambda e: Multihead(e, first=False)), rows),
    "multihead, no bias": (lambda: Block(lambda e: Multihead(e, bias=False)), rows),
    "cross": (Cross, lambda: (*rows(), torch.randn(3, 4, 4))),
    "padded": (Padded, lambda: (*rows(), torch.tensor([[1.0, 1, 1, -1, 1, -1, -1]] * 3))),
    "grouped": (lambda: Block(lambda e: Grouped(e, False)), rows),
    "grouped, expanded": (lambda: Block(lambda e: Grouped(e, True)), rows),
    "vision": (Vision, lambda: (torch.randn(3, 3, 9, 6),)),
    "window": (Window, lambda: (torch.randn(3, 3, 6, 4),)),
    "language": (lambda: Language(False), words),
    "language, tied": (lambda: Language(True), words),
    "encoder": (lambda: Encoder(False), rows),
    "encoder, norm first": (lambda: Encoder(True), rows),
    "lstm": (lambda: Recurrent(nn.LSTM, 6), rows),
    "lstm, both ways": (lambda: Recurrent(nn.LSTM, 6, bidirectional=True), rows),
    "lstm, stacked": (lambda: Recurrent(nn.LSTM, 6, num_layers=2), rows),
    "lstm, no bias": (lambda: Recurrent(nn.LSTM, 6, bias=False), rows),
    "lstm, states": (lambda: Recurrent(nn.LSTM, 6, states=True), rows),
    "gru": (lambda: Recurrent(nn.GRU, 6), rows),
    "gru, stacked both ways": (lambda: Recurrent(nn.GRU, 6, num_layers=2, bidirectional=True), rows),
    "gru, last state": (Last, words),
    "rnn": (lambda: Recurrent(nn.RNN, 6), rows),
    "lstm cell": (lambda: Cells(nn.LSTMCell, True), rows),
    "gru cell": (lambda: Cells(nn.GRUCell, False), rows),
    "rnn cell": (lambda: Cells(nn.RNNCell, False), rows),
}


def reference(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A reference network at odd sizes; of several outputs, all in a row."""

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = getattr(models, name)(**sizes)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([out.flatten(1) for out in self.inner(x)], 1)

    return Row if name == "detector3d" else partial(getattr(models, name), **sizes)


BERT = BertSizes(words=17, width=10, heads=3, dims=4, hidden=13, depth=2, positions=9, plane=11)
# The reference networks of `sluice.models`, at odd sizes.
REFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "vit": (reference("vit", num_classes=3, size=8, width=10, heads=3, hidden=13, depth=2, dims=4),
            lambda: (torch.randn(3, 1, 8, 8),)),
    "bert": (reference("bert", sizes=BERT), lambda: (*words(), torch.tensor([[1] * 5 + [0] * 2] * 3))),
    "layout bert": (reference("layout_bert", num_classes=3, sizes=BERT),
                    lambda: (*words(), (torch.arange(84).view(3, 7, 4) % 11).sort(-1)[0])),
    "attention recommender": (reference("attention_recommender", items=17, steps=9, width=12, hidden=13), words),
    "gru recommender": (reference("gru_recommender", items=17, width=7, hidden=6), words),
    "gru classifier": (reference("gru_classifier", num_classes=3, features=5, width=7, hidden=6), rows),
    "lstm classifier": (reference("lstm_classifier", num_classes=3, words=17, width=7, hidden=6), words),
    "unet": (reference("unet", widths=(8, 12), time=10), lambda: (torch.randn(3, 1, 6, 4), torch.rand(3) * 50)),
    "detector3d": (reference("detector3d", classes=2, features=3, depth=4, space=5, plane=7),
                   lambda: (torch.randn(3, 3, 4, 8, 8),)),
    "resnet1d": (reference("resnet1d", num_classes=3, in_channels=12, widths=(5, 6, 7)),
                 lambda: (torch.randn(3, 12, 31),)),
}  # fmt: skip


def sequence(name: str, networks: Mapping[str, Network] = SEQUENCES) -> tuple[nn.Module, Inputs]:
    """The network, one of these or of `REFERENCES`, in eval mode with every channel alive; and inputs of batch 3."""
    factory, inputs = networks[name] if name in networks else REFERENCES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, given = factory(), inputs()
    return enliven(model, 0, given), given
