"""Losses of widths from scores of channels, squared changes of the loss one channel at a time.

The loss of removing channels of a group together is

    D = (sum of sqrt(score) over the removed channels)^2

since the changes that they make add up in amplitude. The least important channels go first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["amplitude_losses", "by_importance"]


def amplitude_losses(levels: Mapping[str, tuple[int, ...]], scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Losses of widths from scores of channels, shape ``(len(levels[g]),)`` each.

    Args:
        levels: increasing widths of the groups to score, the last one dense; ``model.levels`` or a part of it.
        scores: by group, squared changes of the loss by channel, shape ``(levels[g][-1],)``.

    Returns:
        Losses relative to removing all channels of all groups.

    Raises:
        SluiceError: scores missing, of the wrong shape or sign, or all zero.
    """
    sums = {}
    for group, widths in levels.items():
        size = widths[-1]
        if group not in scores:
            raise SluiceError(f"no importance given for group {group!r}; give scores of shape ({size},)")
        own = np.asarray(scores[group], dtype=float)
        if own.shape != (size,):
            raise SluiceError(f"importance of group {group!r} has shape {own.shape}; it must be ({size},)")
        if not np.isfinite(own).all() or (own < 0).any():
            raise SluiceError(f"importance of group {group!r} is negative or not finite; give non-negative scores")
        # Summed from the least important up, so that small scores are not lost in large sums.
        removed = np.concatenate([[0.0], np.cumsum(np.sqrt(own[by_importance(own)[::-1]]))])
        sums[group] = removed[::-1] ** 2
    total = sum(float(s[0]) for s in sums.values())
    if total <= 0:
        raise SluiceError(f"importance is zero in all of {len(sums)} groups; give at least one positive score")
    return {group: s[list(levels[group])] / total for group, s in sums.items()}


def by_importance(scores: np.ndarray) -> np.ndarray:
    """Indices from the highest score to the lowest; of equal scores the first comes first."""
    return np.argsort(-np.asarray(scores, dtype=float), kind="stable")
