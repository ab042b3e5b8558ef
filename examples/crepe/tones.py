"""Synthesised tones of known pitch, the pitch of CREPE's bins, and its accuracy.

1. A tone of pitch f0 is ``sum_k a_k sin(k phi(t) + p_k)`` over the harmonics ``k f0`` below 7.6 kHz: phases p_k and the
   deviations of ``a_k`` from a power law ``k^-r`` are random, and so are the law, an exponential decay over the frame,
   and the rate and depth of a vibrato. The pitch of a frame is the one at its middle.
2. Noise, white or with energy falling as 1/f, is added at a random ratio of powers. Frames have mean 0, deviation 1.
3. Bin i stands for ``20 i + 1997.379...`` cents above 10 Hz. The pitch read from bins is the average of the nine around
   the highest, weighted by their probabilities (Kim et al. 2018, eq. 2, restricted as in the authors' code).
4. *Raw pitch accuracy*: share of frames whose pitch is off by less than 50 cents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from examples.crepe.model import FRAME

__all__ = ["RATE", "Frames", "Tones", "make_tones", "raw_pitch_accuracy", "read_cents"]

RATE = 16_000
LOWEST_HZ, HIGHEST_HZ = 50.0, 1000.0
HIGHEST_HARMONIC_HZ = 7600.0
SNR_DB = (0.0, 30.0)
CENTS_PER_BIN, FIRST_CENTS = 20.0, 1997.3794084376191


@dataclass(frozen=True, slots=True, eq=False)
class Tones:
    """Frames float32 ``(N, samples)``, mean 0 and deviation 1; their pitch in cents above 10 Hz, float32 ``(N,)``."""

    frames: Tensor
    cents: Tensor


def make_tones(
    count: int, seed: int, *, samples: int = FRAME, snr_db: tuple[float, float] = SNR_DB, chunk: int = 512
) -> Tones:
    """``count`` frames; the same for the same seed, and independent for different ones.

    Args:
        samples: per frame.
        snr_db: range of the signal-to-noise ratio, uniform in decibels.
    """
    rng = np.random.default_rng(seed)
    parts = [_chunk(min(chunk, count - start), rng, samples, snr_db) for start in range(0, count, chunk)]
    frames, cents = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Tones(torch.from_numpy(frames), torch.from_numpy(cents))


def _chunk(
    count: int, rng: np.random.Generator, samples: int, snr_db: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1))

    f0 = np.exp(uniform(np.log(LOWEST_HZ), np.log(HIGHEST_HZ)))
    time = (np.arange(samples) - samples / 2) / RATE
    depth, rate = uniform(0.0, 30.0) * np.log(2) / 1200, 2 * np.pi * uniform(4.0, 7.0)
    start = uniform(0.0, 2 * np.pi)
    # The integral of f0 (1 + depth sin(rate t + start)): a vibrato of some cents is as good as linear in depth.
    phase = 2 * np.pi * f0 * (time - depth / rate * np.cos(rate * time + start))
    pitch = f0 * (1 + depth * np.sin(start))
    law = uniform(1.0, 2.0)
    tone = np.zeros((count, samples), dtype=np.float32)
    turn = np.exp(1j * phase).astype(np.complex64)
    turned = np.ones_like(turn)
    for k in range(1, int(HIGHEST_HARMONIC_HZ / f0.min()) + 1):
        turned *= turn  # exp(i k phi) without another sine
        amplitude = k**-law * np.exp(0.3 * rng.standard_normal((count, 1))) * (k * f0 < HIGHEST_HARMONIC_HZ)
        tone += (turned * (amplitude * np.exp(1j * uniform(0.0, 2 * np.pi))).astype(np.complex64)).imag
    tone = tone * np.exp(-uniform(0.0, 20.0) * time)
    noise = _noise(count, rng, samples)
    level = 10 ** (uniform(*snr_db) / 20)
    frames = level * tone / _deviation(tone) + noise / _deviation(noise)
    frames = (frames - frames.mean(1, keepdims=True)) / _deviation(frames)
    return frames.astype(np.float32), (1200 * np.log2(pitch[:, 0] / 10)).astype(np.float32)


def _noise(count: int, rng: np.random.Generator, samples: int) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal((count, samples)))
    falling = 1 / np.sqrt(np.maximum(1, np.arange(spectrum.shape[1])))
    return np.fft.irfft(np.where(rng.random((count, 1)) < 0.5, spectrum, spectrum * falling), samples)


def _deviation(x: np.ndarray) -> np.ndarray:
    return np.maximum(x.std(1, keepdims=True), 1e-8)


def read_cents(probabilities: Tensor) -> Tensor:
    """Pitch ``(N,)`` in cents above 10 Hz from ``(N, bins)`` probabilities."""
    bins = torch.arange(probabilities.shape[1], dtype=probabilities.dtype, device=probabilities.device)
    near = (bins - probabilities.argmax(1, keepdim=True)).abs() <= 4
    weights = torch.where(near, probabilities, 0.0)
    return CENTS_PER_BIN * (weights @ bins) / weights.sum(1).clamp(min=1e-30) + FIRST_CENTS


def raw_pitch_accuracy(model: nn.Module, tones: Tones, *, tolerance: float = 50.0, batch: int = 256) -> float:
    """Percent of frames whose pitch is off by less than ``tolerance`` cents, in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            read = torch.cat([read_cents(model(frames)) for frames in tones.frames.split(batch)])
    finally:
        model.train(training)
    return 100.0 * float(((read - tones.cents).abs() < tolerance).float().mean())


class Frames:
    """Shuffled batches of frames without labels; a fresh order every epoch."""

    def __init__(self, tones: Tones, size: int, seed: int):
        self.frames, self.size = tones.frames, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.frames) // self.size

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.frames), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield self.frames[chosen]
