"""Ten synthesised words by many speakers, and a small network that spots them.

A word is a path of two formants through four targets, with a hiss in one of its quarters. What comes out is its
spectrogram in decibels over 32 frames and 16 bands:

    E(t, b) = e(t) sum_k a_k exp(-(b - s f_k(t / d))^2 / (2 w^2)) + h(t) r(b) + n(t, b),    x = log(E + 1e-2)

1. A *speaker* has the length of a vocal tract (s), a width of formants (w), a balance between them (a), a pace and an
   accent, which moves every target of every word. An utterance moves all of these a little, is shifted by up to five
   frames, and lies in noise whose level is drawn anew.
2. Speakers of the test set are never heard in training.
3. All is drawn by numpy from seeds: the same words on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["BANDS", "FRAMES", "Utterances", "WordBatches", "Words", "ds_cnn", "make_words"]

WORDS, FRAMES, BANDS = 10, 32, 16
TARGETS = 4
SPEAKERS = 60
VOCABULARY_SEED = 11
LOUDEST_NOISE = 1.2
WIDTH, BLOCKS = 64, 4


@dataclass(frozen=True, slots=True, eq=False)
class Utterances:
    """Spectrograms float32 ``(N, 1, frames, bands)``, deviation about 1; words int64 ``(N,)``."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    train: Utterances
    test: Utterances


def make_words(train: int, test: int, seed: int = 0) -> Words:
    """Utterances of ``SPEAKERS`` speakers to train on, and of a third as many others to test on."""
    rng = np.random.default_rng(seed)
    vocabulary = _vocabulary()
    heard, unheard = (_speakers(count, rng) for count in (SPEAKERS, SPEAKERS // 3))
    return Words(_utter(train, vocabulary, heard, rng), _utter(test, vocabulary, unheard, rng))


def _vocabulary() -> tuple[np.ndarray, np.ndarray]:
    """Formants ``(words, 2, targets)`` in bands, and the quarter in which each word hisses ``(words,)``."""
    rng = np.random.default_rng(VOCABULARY_SEED)
    low, high = rng.uniform(1.5, 6.0, (WORDS, 1, TARGETS)), rng.uniform(6.5, 13.0, (WORDS, 1, TARGETS))
    return np.concatenate((low, high), axis=1), rng.integers(0, 4, WORDS)


def _speakers(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "tract": rng.uniform(0.84, 1.18, count),
        "width": rng.uniform(0.7, 1.5, count),
        "balance": rng.uniform(0.4, 1.1, count),
        "pace": rng.uniform(0.75, 1.25, count),
        "accent": rng.normal(0.0, 0.5, (count, WORDS, 2, TARGETS)),
    }


def _utter(
    count: int, vocabulary: tuple[np.ndarray, np.ndarray], speakers: dict[str, np.ndarray], rng: np.random.Generator
) -> Utterances:
    paths, hisses = vocabulary
    words, who = rng.integers(0, WORDS, count), rng.integers(0, len(speakers["tract"]), count)

    def near(name: str, spread: float) -> np.ndarray:
        return speakers[name][who] * np.exp(rng.normal(0.0, spread, count))

    targets = paths[words] + speakers["accent"][who, words] + rng.normal(0.0, 0.35, (count, 2, TARGETS))
    targets = targets * near("tract", 0.02)[:, None, None]
    start, length = rng.uniform(1.0, 6.0, count), 22.0 / near("pace", 0.05)
    progress = (np.arange(FRAMES)[None] - start[:, None]) / length[:, None]  # 0 to 1 within the word
    place = np.clip(progress, 0.0, 1.0) * (TARGETS - 1)
    left = np.minimum(place.astype(int), TARGETS - 2)
    part = (place - left)[:, None]
    formants = (1 - part) * np.take_along_axis(targets, left[:, None], 2)
    formants += part * np.take_along_axis(targets, left[:, None] + 1, 2)
    envelope = 1 / (1 + np.exp(-20 * progress)) / (1 + np.exp(20 * (progress - 1)))
    bands, width = np.arange(BANDS), near("width", 0.1)[:, None, None]
    weights = np.stack((np.ones(count), near("balance", 0.1)), 1)
    energy = np.zeros((count, FRAMES, BANDS))
    for k in range(2):
        energy += weights[:, k, None, None] * np.exp(-((bands - formants[:, k, :, None]) ** 2) / (2 * width**2))
    energy *= envelope[:, :, None]
    hissing = (np.floor(progress * 4) == hisses[words][:, None]) * rng.uniform(0.1, 0.5, (count, 1))
    energy += hissing[:, :, None] * (bands > BANDS // 2)
    energy += rng.uniform(0.0, LOUDEST_NOISE, (count, 1, 1)) * rng.exponential(1.0, energy.shape)
    x = np.log(energy + 1e-2)
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    return Utterances(torch.from_numpy(x[:, None].astype(np.float32)), torch.from_numpy(words))


class WordBatches:
    """Shuffled batches, each spectrogram moved in time by up to two frames; a fresh order every epoch."""

    def __init__(self, utterances: Utterances, size: int, seed: int):
        self.utterances, self.size = utterances, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.utterances.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.utterances.x), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            shift = int(torch.randint(-2, 3, (), generator=self.generator))
            yield self.utterances.x[chosen].roll(shift, 2), self.utterances.y[chosen]


def ds_cnn(width: int = WIDTH) -> nn.Sequential:
    """(N, 1, 32, 16) to (N, 10): a convolution of 10x4 and four depthwise-separable blocks (Zhang et al. 2017)."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, (10, 4), 2, (4, 1), bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(BLOCKS):
        layers += [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, WORDS))
