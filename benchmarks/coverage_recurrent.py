"""Recurrent and temporal networks as people write them in plain torch, for `benchmarks.coverage`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

FEATURES = 9


class Sequence(nn.Module):
    """Two recurrent layers over (batch, steps, features), and classes from the last step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN], width: int, bidirectional: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, 24)
        self.recurrent = kind(24, width, 2, batch_first=True, dropout=0.1, bidirectional=bidirectional)
        self.head = nn.Linear(width * (1 + bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x).relu())[0][:, -1])


def lstm(width: int = 32, bidirectional: bool = False) -> nn.Module:
    return Sequence(nn.LSTM, width, bidirectional)


def gru(width: int = 32, bidirectional: bool = False) -> nn.Module:
    return Sequence(nn.GRU, width, bidirectional)


def rnn(width: int = 32, bidirectional: bool = False) -> nn.Module:
    return Sequence(nn.RNN, width, bidirectional)


class Attended(nn.Module):
    """A bidirectional LSTM whose states are summed by learned attention."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(FEATURES, 20, batch_first=True, bidirectional=True)
        self.score, self.head = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 1)), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(x)[0]
        return self.head((self.score(y).softmax(1) * y).sum(1))


def attended() -> nn.Module:
    return Attended()


class Crnn(nn.Module):
    """Text in images: convolutions, their columns as steps, a bidirectional GRU (Shi et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.recurrent, self.head = nn.GRU(24 * 4, 32, bidirectional=True, batch_first=True), nn.Linear(64, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(self.recurrent(y.permute(0, 3, 1, 2).flatten(2))[0])


def crnn() -> nn.Module:
    return Crnn()


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions with weight norm and a shortcut (Bai et al. 2018)."""

    def __init__(self, inner: int, outer: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.one = weight_norm(nn.Conv1d(inner, outer, 3, dilation=dilation))
        self.two = weight_norm(nn.Conv1d(outer, outer, 3, dilation=dilation))
        self.shortcut = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.pad(x, (self.pad, 0))).relu()
        return (self.two(F.pad(y, (self.pad, 0))).relu() + self.shortcut(x)).relu()


def tcn() -> nn.Module:
    return nn.Sequential(
        TemporalBlock(FEATURES, 24, 1), TemporalBlock(24, 24, 2), TemporalBlock(24, 32, 4),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def m5() -> nn.Module:
    """Waveforms (Dai et al. 2017)."""
    layers: list[nn.Module] = []
    for inner, outer, kernel, stride in ((1, 32, 20, 4), (32, 32, 3, 1), (32, 64, 3, 1), (64, 64, 3, 1)):
        layers += [nn.Conv1d(inner, outer, kernel, stride), nn.BatchNorm1d(outer), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 7))


def transformer() -> nn.Module:
    """Two layers of torch's own encoder."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Linear(FEATURES, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)
    )


class Conformer(nn.Module):
    """One block: half a feed-forward, attention, gated depthwise convolution, half a feed-forward (Gulati 2020)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(FEATURES, width), nn.Linear(width, 5)
        self.halves = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(2)
        )
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.convolution = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1), nn.GLU(1), nn.Conv1d(width, width, 5, padding=2, groups=width),
            nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1),
        )  # fmt: skip
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + 0.5 * self.halves[0](x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(x + 0.5 * self.halves[1](x)))


def conformer() -> nn.Module:
    return Conformer()


class DeepSpeech(nn.Module):
    """Frames through linear layers, a bidirectional recurrent layer whose directions are added (Hannun et al. 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(FEATURES, 32), nn.Hardtanh(0, 20), nn.Linear(32, 32), nn.Hardtanh(0, 20))
        self.recurrent = nn.RNN(32, 24, nonlinearity="relu", bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.Hardtanh(0, 20), nn.Linear(32, 29))

    def forward(self, x: Tensor) -> Tensor:
        forth, back = torch.chunk(self.recurrent(self.front(x))[0], 2, dim=-1)
        return self.head(forth + back)


def deepspeech() -> nn.Module:
    return DeepSpeech()
