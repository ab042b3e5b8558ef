"""Recurrent networks over steps: a GRU classifier, an LSTM classifier with dropout, a GRU recommender.

The classifiers read the last step. The recommender (GRU4Rec, Hidasi et al. 2016) looks items up in a table, and scores
all items by the same table.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "GruClassifier",
    "GruRecommender",
    "LstmClassifier",
    "gru_classifier",
    "gru_recommender",
    "lstm_classifier",
]


class GruClassifier(nn.Module):
    """(N, T, features), or images (N, 1, T, features) row by row, to (N, num_classes)."""

    def __init__(self, num_classes: int, features: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.gru = nn.GRU(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.squeeze(1) if x.ndim == 4 else x
        states, _ = self.gru(self.embed(rows).relu())
        return self.head(states[:, -1])


class LstmClassifier(nn.Module):
    """Tokens (N, T) to (N, num_classes) by two layers, both ways, with dropout between them and before the head."""

    def __init__(self, num_classes: int, words: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(2 * hidden, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.words(tokens))
        return self.head(self.drop(states.mean(1)))


class GruRecommender(nn.Module):
    """Items (N, T) to scores of the next item (N, items); the table of items scores them as well."""

    def __init__(self, items: int, width: int, hidden: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.gru, self.out = nn.GRU(width, hidden, batch_first=True), nn.Linear(hidden, width)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        _, last = self.gru(self.items(history))
        return F.linear(self.out(last[-1]), self.items.weight)


def gru_classifier(
    num_classes: int = 10, features: int = 28, width: int = 32, hidden: int = 64, layers: int = 2
) -> GruClassifier:
    """A small GRU over the rows of an image, (N, 1, 28, 28) by default."""
    return GruClassifier(num_classes, features, width, hidden, layers)


def lstm_classifier(
    num_classes: int = 4, words: int = 97, width: int = 24, hidden: int = 32, dropout: float = 0.3
) -> LstmClassifier:
    """A small bidirectional LSTM over 20 tokens by default."""
    return LstmClassifier(num_classes, words, width, hidden, dropout)


def gru_recommender(items: int = 97, width: int = 24, hidden: int = 40) -> GruRecommender:
    """A small GRU recommender over 12 items by default."""
    return GruRecommender(items, width, hidden)
