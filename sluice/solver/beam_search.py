"""Ranks of all layers chosen together, by beam search on the loss of the truncated, not fine-tuned network.

A state gives every layer one of its options (dense, or a form with a rank), and saves the sum of their milliseconds.

1. *Equal cost.* A step takes at least ``step_ms`` off one layer: to the nearest option that saves so much more, to the
   last option where none does, and never past the milliseconds that the target still needs. Without this rule the
   search would first take the layers with the smallest steps, since these hurt the least.
2. *Levels.* Options are not evenly spaced, so a step may save more. States are ranked only against those of their own
   level ``floor(saved_ms / step_ms)``, and of each level the best ``width`` go on. ``width = 1`` is greedy.
3. *Every state once*, however many ways lead to it: a state is a tuple of positions, its loss is kept.
4. Levels are worked off in order until all waiting states meet the target; of these the lowest loss wins. Every
   path can be followed to the last option of every layer, so whether the target can be met is known beforehand.

Source: BSR (arXiv 2111.15179), modified beam search. A reconstruction: confirmed are a beam search over the ranks of
all layers jointly, before fine-tuning, and one hyper-parameter, the wanted compression; the width, the equal steps (in
milliseconds here) and the stop are inferred.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["Found", "Option", "beam_search"]

WIDTH = 4
# Losses that a search may cost by default, roughly, as far as the fewest and the most levels allow.
EVALUATIONS = 1200
LEVELS = (8, 32)
SIMILAR = 4  # steps of an octave of targets
# Relative: sums of the same milliseconds in another order differ in the last digits.
EXACT = 1e-9

State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a layer: ``label`` is the caller's, ``saved_ms`` is relative to the dense layer."""

    label: object
    saved_ms: float


@dataclass(frozen=True, slots=True)
class Found:
    """The best state within the target: a position among its options for every layer.

    ``levels`` counts those levels (rule 2) that had states.
    """

    choice: Mapping[str, int]
    saved_ms: float
    score: float
    levels: int


def beam_search(
    steps: Mapping[str, Sequence[Option]],
    score: Callable[[Mapping[str, int]], float],
    target_ms: float,
    *,
    width: int = WIDTH,
    step_ms: float | None = None,
) -> Found:
    """The options with the lowest score among those found that save ``target_ms``.

    Args:
        steps: for every layer its options, the first of which saves nothing (dense), the others more and more.
        score: held-out loss at a position for every layer, lower is better; a value that is not finite is worst. Called
            once for every state, starting with the states one step away.
        target_ms: milliseconds to be saved in all, dense latency minus budget.
        width: states kept of each level, ``K``.
        step_ms: least milliseconds that a step saves. The default divides the target, or one up to 19% larger, into as
            many levels as `EVALUATIONS` losses allow for this width and number of layers.

    Raises:
        SluiceError: all layers at their last option do not save enough.
    """
    layers = tuple(steps)
    saved = {layer: np.array([option.saved_ms for option in steps[layer]], dtype=float) for layer in layers}
    for layer, ms in saved.items():
        if len(ms) == 0 or ms[0] != 0 or not (np.diff(ms) > 0).all():
            raise AssertionError(f"options of {layer!r} save {ms.tolist()} ms; they must start at 0 and increase")
    if width < 1 or not math.isfinite(target_ms) or (step_ms is not None and not step_ms > 0):
        raise AssertionError(f"cannot search with width={width}, target_ms={target_ms}, step_ms={step_ms}")
    columns = [saved[layer] for layer in layers]
    most = sum(float(ms[-1]) for ms in columns)
    enough = target_ms - EXACT * abs(target_ms)
    if most < enough:
        raise SluiceError(
            f"budget cannot be met: factorising all {len(layers)} layers saves {most:.4g} ms of the {target_ms:.4g} ms "
            f"wanted; raise the budget by {target_ms - most:.4g} ms or more"
        )
    if step_ms is None:
        fewest, largest = LEVELS
        # For similar targets the same step, so that they meet the same states.
        similar = 2.0 ** (math.ceil(SIMILAR * math.log2(target_ms)) / SIMILAR) if target_ms > 0 else target_ms
        step_ms = similar / min(largest, max(fewest, EVALUATIONS // (width * max(1, len(layers)))))

    def saves(state: State) -> float:
        return sum(float(ms[position]) for ms, position in zip(columns, state, strict=True))

    scores: dict[State, float] = {}

    def rank(state: State) -> tuple[float, float, State]:
        if state not in scores:
            value = float(score(dict(zip(layers, state, strict=True))))
            scores[state] = value if math.isfinite(value) else math.inf
        return scores[state], -saves(state), state

    dense = (0,) * len(layers)
    if enough <= 0:
        return Found(dict(zip(layers, dense, strict=True)), 0.0, rank(dense)[0], 0)
    waiting: dict[int, set[State]] = defaultdict(set)
    waiting[0].add(dense)
    done: set[State] = set()
    seen = 0
    while waiting:
        level = min(waiting)
        states = waiting.pop(level)
        seen += 1
        # A last option may save less than a step and lead to a state of the same level, whose turn comes then: beside
        # its parent, which has given up less, it would not be chosen.
        while states:
            again: set[State] = set()
            for state in _best(states, rank, width):
                for child in _children(state, columns, min(step_ms, target_ms - saves(state))):
                    total = saves(child)
                    place = int(total / step_ms * (1 + EXACT))
                    if total >= enough:
                        done.add(child)
                    elif place <= level:
                        again.add(child)
                    else:
                        waiting[place].add(child)
            states = again
    best = min(done, key=rank)
    return Found(dict(zip(layers, best, strict=True)), saves(best), scores[best], seen)


def _best(states: set[State], rank: Callable[[State], tuple[float, float, State]], width: int) -> list[State]:
    """The first ``width`` in rank order; one state needs no score."""
    return list(states) if len(states) == 1 else sorted(states, key=rank)[:width]


def _children(state: State, columns: Sequence[np.ndarray], least_ms: float) -> list[State]:
    """One step further in every layer that has one."""
    found = []
    for k, (position, ms) in enumerate(zip(state, columns, strict=True)):
        wanted = (ms[position] + least_ms) * (1 - EXACT)
        following = min(max(int(np.searchsorted(ms, wanted)), position + 1), len(ms) - 1)
        if following > position:
            found.append((*state[:k], following, *state[k + 1 :]))
    return found
