"""The cost law: milliseconds of points that were not measured, from the work of their pieces and all points known.

1. *Roofline*. For a piece with the work of `sluice.profiler.pieces.work`, in_b and out_b its channels rounded up to
   blocks of b,

       roof = sum_k rate_k * feature_k,    features: macs, macs * out_b/out, macs * out_b/out * in_b/in, moved, 1

   No rate is negative. They are fitted to the known points in relative error.
2. *Kernels differ*. ``y = log(ms / roof)`` is a Gaussian process over all known points. Its covariance is a sum over
   what two points share, all pieces, the kind (operator and kernel) or the key, and over how near their channels are,

       cov = c_0 + c_i e_i + c_o e_o + c_io e_i e_o,       e = exp(-distance / LENGTH)
       distance = |log2(rounded / rounded')| + SMOOTH |log2(width / width')| + MISALIGNED [one is whole blocks alone]

   for each of the three (`SHARED`). So a point tells much of its neighbours in the same piece, less of other pieces.
   The block is the one of `BLOCKS` under which the known points are likeliest.
3. *Bounds*. With mean and deviation of the process, ``ms = roof exp(mean)`` and ``bound = roof exp(mean - DOUBT *
   deviation)``, the least that the point is expected to take. The best plan under the bounds is the best plan of all,
   if the bounds hold: the argument of A*. A point takes no less, either, than a known point of the same piece that is
   no larger in any extent and aligned no better (`SAME`).
4. At a known point estimate and bound are the measured time.

On a real table of ResNet-20 (one core, 1,291 points of 83 pieces, three draws each; ``python -m benchmarks.law``): the
median error of estimates, and the share of points that take less than their bound by more than 5%,

    known points    the 15 dense ones    3% more     10% more    20% more
    error           21%                  11 to 13%   7 to 9%     4 to 5%
    below           0                    0.4 to 3%   0.5 to 1%   0 to 1%

Reconstruction; no paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sluice.profiler.pieces.work import Work

__all__ = ["CostLaw", "Estimate", "Known", "fit_law"]

BLOCKS = (16, 8, 4)
# Covariance shared by (all, the same kind, the same key): of any two points, along one axis, along both.
SHARED = ((0.1, 0.1, 0.02), (0.02, 0.05, 0.03), (0.02, 0.03, 0.02))
LENGTH, SMOOTH, MISALIGNED = 2.5, 0.3, 0.15
NOISE = 1e-4
DOUBT = 1.6
SAME = 0.03  # by so much less may a larger point take
LEAST_MS = 1e-5
MOST = 1200  # the time of a fit grows with the third power of the points


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Known points of one piece: extents, shape ``(n, extents)``, and milliseconds net of calls, shape ``(n,)``."""

    key: str
    work: Work
    points: np.ndarray
    ms: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Milliseconds at points, the least that they are expected to be, and which were measured; shape ``(n,)`` each."""

    ms: np.ndarray
    bound: np.ndarray
    measured: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where points lie for the process: key, kind, and channels read and made, shape ``(n,)`` each."""

    keys: np.ndarray
    kinds: np.ndarray
    channels: np.ndarray  # (n, 2)


@dataclass(frozen=True, slots=True, eq=False)
class CostLaw:
    """The roofline and the process, given the known points."""

    block: int
    rates: np.ndarray
    places: _Places
    inverse: np.ndarray
    weights: np.ndarray  # of the known points in the mean

    def estimate(self, known: Known, points: np.ndarray) -> Estimate:
        """At points of shape ``(n, extents)`` of the piece; ``known`` may be a piece of which nothing is known."""
        here = _places([known.key], [known.work], [points])
        cross = _covariance(here, self.places, self.block)
        roof = np.maximum(_features(known.work, points, self.block) @ self.rates, LEAST_MS)
        own = sum(sum(row) * k for row, k in zip(SHARED, (1, 2, 1), strict=True))
        left = np.maximum(own - np.einsum("nk,kl,nl->n", cross, self.inverse, cross, optimize=True), 0.0)
        mean = cross @ self.weights
        ms, bound = roof * np.exp(mean), roof * np.exp(mean - DOUBT * np.sqrt(left))
        measured = np.zeros(len(points), bool)
        if len(known.ms):
            smaller = (known.points[None] <= points[:, None]).all(axis=2)
            smaller &= (_aligned(known.work, known.points)[None] >= _aligned(known.work, points)[:, None]).all(axis=2)
            floor = np.where(smaller, (1.0 - SAME) * known.ms[None], 0.0).max(axis=1)
            bound = np.maximum(bound, floor)
            same = (known.points[None] == points[:, None]).all(axis=2)
            measured = same.any(axis=1)
            there = known.ms[same.argmax(axis=1)]
            ms, bound = np.where(measured, there, np.maximum(ms, bound)), np.where(measured, there, bound)
        return Estimate(ms, bound, measured)


def fit_law(known: Sequence[Known]) -> CostLaw:
    """The law of all known points, of which there is at least one; of about `MOST` of them where there are more."""
    found = [one for one in known if len(one.ms)]
    step = math.ceil(sum(len(one.ms) for one in found) / MOST)
    found = [Known(one.key, one.work, one.points[::step], one.ms[::step]) for one in found]
    ms = np.maximum(np.concatenate([one.ms for one in found]), LEAST_MS)
    places = _places([one.key for one in found], [one.work for one in found], [one.points for one in found])
    fits = [_fit(found, ms, places, block) for block in BLOCKS]
    return max(fits, key=lambda fit: fit[0])[1]


def _fit(found: Sequence[Known], ms: np.ndarray, places: _Places, block: int) -> tuple[float, CostLaw]:
    """The log-likelihood of the points under one block, and the law."""
    features = np.concatenate([_features(one.work, one.points, block) for one in found])
    rates = _rates(features / ms[:, None])
    rest = np.log(ms / np.maximum(features @ rates, LEAST_MS))
    covariance = _covariance(places, places, block) + NOISE * np.eye(len(ms))
    inverse = np.linalg.inv(covariance)
    weights = inverse @ rest
    likelihood = -0.5 * float(rest @ weights) - 0.5 * float(np.linalg.slogdet(covariance)[1])
    return likelihood, CostLaw(block, rates, places, inverse, weights)


def _rates(design: np.ndarray) -> np.ndarray:
    """The non-negative rates under which the rows come nearest to one: the best of all subsets of the columns."""
    count, best, least = design.shape[1], np.zeros(design.shape[1]), np.inf
    for size in range(1, count + 1):
        for columns in itertools.combinations(range(count), size):
            own = np.linalg.lstsq(design[:, columns], np.ones(len(design)), rcond=None)[0]
            missed = float(np.square(design[:, columns] @ own - 1.0).sum())
            if (own >= 0).all() and missed < least * (1.0 - 1e-9):
                least, best = missed, np.zeros(count)
                best[list(columns)] = own
    return best


def _places(keys: Sequence[str], works: Sequence[Work], points: Sequence[np.ndarray]) -> _Places:
    counts = [len(each) for each in points]
    return _Places(
        np.repeat(np.array(keys), counts),
        np.repeat(np.array([work.kind for work in works]), counts),
        np.concatenate([work.channels(each) for work, each in zip(works, points, strict=True)]),
    )


def _covariance(a: _Places, b: _Places, block: int) -> np.ndarray:
    """Shape ``(len(a), len(b))``."""
    shared = [1.0, (a.kinds[:, None] == b.kinds[None]).astype(float), (a.keys[:, None] == b.keys[None]).astype(float)]
    always, one, both = (sum(c * s for c, s in zip(row, shared, strict=True)) for row in SHARED)
    near = [_near(a.channels[:, k], b.channels[:, k], block) for k in range(2)]
    found: np.ndarray = always + one * (near[0] + near[1]) + both * near[0] * near[1]
    return found


def _near(a: np.ndarray, b: np.ndarray, block: int) -> np.ndarray:
    whole = [block * np.ceil(x / block) for x in (a, b)]
    distance = np.abs(np.log2(whole[0])[:, None] - np.log2(whole[1])[None])
    distance += SMOOTH * np.abs(np.log2(a)[:, None] - np.log2(b)[None])
    distance += MISALIGNED * ((whole[0] == a)[:, None] != (whole[1] == b)[None])
    found: np.ndarray = np.exp(-distance / LENGTH)
    return found


def _features(work: Work, points: np.ndarray, block: int) -> np.ndarray:
    macs, moved = work.at(points)
    channels = work.channels(points)
    into, out = (block * np.ceil(channels / block) / channels).T
    return np.stack([macs, macs * out, macs * out * into, moved, np.ones(len(points))], axis=1)


def _aligned(work: Work, points: np.ndarray) -> np.ndarray:
    """The largest power of two up to 16 that divides what the anchor reads and makes, shape ``(n, 2)``."""
    channels = work.channels(points)
    found = np.ones_like(channels)
    for step in (2, 4, 8, 16):
        found = np.where(channels % step == 0, step, found)
    return found
