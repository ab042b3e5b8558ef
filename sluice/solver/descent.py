"""A configuration walked downhill by single moves, within a budget.

1. Height is compared in this order: the loss; the number of structural edits (switches that leave their dense value);
   the widths and ranks that are given up.
2. A move sets one width or rank to another of its levels, or undoes one edit: all layers that it covers become dense.
3. A move counts if it lowers the height, obeys the rules of the model and stays within the budget. The walk ends where
   no move counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from sluice.core.latency import LatencyModel

__all__ = ["downhill", "is_valid", "loss_of", "steps_from"]

Step = tuple[float, str, dict[str, int]]  # what it is worth, its site, where it leads


def downhill(
    model: LatencyModel, losses: Mapping[str, np.ndarray], widths: Mapping[str, int], target_ms: float
) -> dict[str, int]:
    """The configuration where the walk from ``widths`` ends.

    Args:
        losses: by site, the increase of the loss at every one of its levels, shape ``(len(levels[site]),)``.
        target_ms: milliseconds that the configuration may not exceed.
    """

    def height(at: Mapping[str, int]) -> tuple[float, int, int]:
        edits = sum(at[s] != model.dense[s] for s in model.switches)
        return loss_of(model, losses, at), edits, -sum(w for g, w in at.items() if g not in model.switches)

    current = dict(widths)
    lowest = height(current)
    moved = True
    while moved:
        moved = False
        for change in _moves(model, current):
            after = {**current, **change}
            reached = height(after)
            if reached < lowest and is_valid(model, after) and model.ms(after) <= target_ms:
                current, lowest, moved = after, reached, True
    return current


def steps_from(
    model: LatencyModel, losses: Mapping[str, np.ndarray], widths: Mapping[str, int]
) -> list[dict[str, int]]:
    """The configurations one level of one width or rank away whose milliseconds were not measured.

    Steps to fewer milliseconds come by what they save per loss, steps to less loss by what they win per millisecond,
    in turns, the best first; unknown points are at their bounds.
    """
    hopeful = model.hopeful()
    now = hopeful.ms(widths)
    found: tuple[list[Step], list[Step]] = ([], [])  # to fewer milliseconds, to less loss
    for site, own in losses.items():
        levels = model.levels[site]
        at = levels.index(widths[site])
        for to in (at - 1, at + 1) if site not in model.switches else ():
            if 0 <= to < len(levels):
                after = {**widths, site: levels[to]}
                saved, lost = now - hopeful.ms(after), float(own[to] - own[at])
                if saved * lost > 0.0 and not model.measured_at(after):
                    found[lost < 0.0].append((saved / lost if lost > 0.0 else lost / saved, site, after))
    ordered = [sorted(steps, key=lambda step: (-step[0], step[1])) for steps in found]
    return [step[2] for pair in itertools.zip_longest(*ordered) for step in pair if step is not None]


def loss_of(model: LatencyModel, losses: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> float:
    """The sum of the losses at the levels of a configuration."""
    return float(sum(loss[model.levels[g].index(widths[g])] for g, loss in losses.items()))


def is_valid(model: LatencyModel, widths: Mapping[str, int]) -> bool:
    """Whether every site has one of its levels and all rules hold."""
    offered = all(widths[g] in levels for g, levels in model.levels.items())
    return offered and all(rule.holds(widths) for rule in model.rules)


def _moves(model: LatencyModel, widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    for group in model.dense:
        if group not in model.switches:
            yield from ({group: level} for level in model.levels[group])
    for switch in model.switches:
        if widths[switch] != model.dense[switch]:
            rules = [rule for rule in model.rules if switch in dict(rule.coefs)]
            back = {s: model.dense[s] for rule in rules for s, _ in rule.coefs}
            if all(value in model.levels[s] for s, value in back.items()):  # a narrowed model may shut the dense state
                yield back
