"""The beam search over ranks, on losses whose best states are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.core.errors import SluiceError
from sluice.solver.beam_search import Found, Option, beam_search

Losses = Mapping[str, Sequence[float]]


def options(*saved: float) -> tuple[Option, ...]:
    return tuple(Option(("rank", k), ms) for k, ms in enumerate(saved))


def separable(losses: Losses) -> Callable[[Mapping[str, int]], float]:
    return lambda choice: sum(losses[layer][k] for layer, k in choice.items())


def brute_force(
    steps: Mapping[str, Sequence[Option]], score: Callable[[Mapping[str, int]], float], target_ms: float
) -> float:
    """The lowest loss of all states that save enough."""
    found = math.inf
    for state in itertools.product(*(range(len(o)) for o in steps.values())):
        choice = dict(zip(steps, state, strict=True))
        if sum(steps[layer][k].saved_ms for layer, k in choice.items()) >= target_ms * (1 - 1e-9):
            found = min(found, score(choice))
    return found


def saved_by(steps: Mapping[str, Sequence[Option]], found: Found) -> float:
    return sum(steps[layer][k].saved_ms for layer, k in found.choice.items())


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, tuple[Option, ...]], dict[str, list[float]], float]:
    """Two to four layers of one to five options, losses that never fall, and a target that can be met."""
    steps, losses = {}, {}
    for k in range(draw(st.integers(2, 4))):
        gaps = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
        steps[f"layer{k}"] = options(*itertools.accumulate(gaps, initial=0))
        rises = draw(st.lists(st.integers(0, 20), min_size=len(gaps), max_size=len(gaps)))
        losses[f"layer{k}"] = [float(v) for v in itertools.accumulate(rises, initial=0)]
    most = sum(o[-1].saved_ms for o in steps.values())
    return steps, losses, draw(st.integers(0, int(most)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_wide_beam_of_small_steps_is_exact(problem: tuple) -> None:
    steps, losses, target = problem
    found = beam_search(steps, separable(losses), target, width=10**6, step_ms=1.0)
    assert found.score == brute_force(steps, separable(losses), target)
    assert found.score == separable(losses)(found.choice)
    assert found.saved_ms == saved_by(steps, found) >= target


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 3), st.sampled_from([0.5, 2.0, 7.0, None]))
def test_any_beam_meets_a_target_that_can_be_met(problem: tuple, width: int, step_ms: float | None) -> None:
    steps, losses, target = problem
    calls: list[tuple[int, ...]] = []

    def score(choice: Mapping[str, int]) -> float:
        calls.append(tuple(choice.values()))
        return separable(losses)(choice)

    found = beam_search(steps, score, target, width=width, step_ms=step_ms)
    assert saved_by(steps, found) >= target
    assert found.score >= brute_force(steps, separable(losses), target)
    assert len(calls) == len(set(calls))


def test_width_one_is_greedy() -> None:
    steps = {"a": options(0, 1, 2, 3), "b": options(0, 1, 2, 3, 4), "c": options(0, 1, 2)}
    losses = {"a": [0, 5, 6, 30], "b": [0, 4, 9.5, 11, 40], "c": [0, 7, 7.5]}
    state, path = dict.fromkeys(steps, 0), []
    for _ in range(6):
        nearest = [{**state, layer: k + 1} for layer, k in state.items() if k + 1 < len(steps[layer])]
        state = min(nearest, key=separable(losses))
        path.append(state)
    for saved, greedy in enumerate(path, start=1):
        found = beam_search(steps, separable(losses), saved, width=1, step_ms=1.0)
        assert found.choice == greedy
    assert separable(losses)(path[-1]) > brute_force(steps, separable(losses), 6)  # greedy is not best here


def test_the_beam_finds_what_greedy_cannot() -> None:
    """Together ``a`` and ``b`` cost nothing, but ``c`` is the better first step, and then nothing good follows."""
    steps = {name: options(0, 1) for name in "abc"}

    def score(choice: Mapping[str, int]) -> float:
        table = {"a": 2.0, "b": 2.5, "c": 1.0, "ab": 0.5, "ac": 9.0, "bc": 8.0, "": 0.0}
        return table["".join(name for name, k in choice.items() if k)]

    assert beam_search(steps, score, 2, width=1, step_ms=1).choice == {"a": 0, "b": 1, "c": 1}
    assert beam_search(steps, score, 2, width=2, step_ms=1).choice == {"a": 1, "b": 1, "c": 0}


def test_steps_cost_the_same_in_every_layer() -> None:
    """Of a layer with a hundred tiny steps not the tiniest is taken, which would hurt least, but one of equal cost."""
    steps = {"fine": options(*(k / 100 for k in range(101))), "coarse": options(0, 0.5, 1)}
    seen = []

    def score(choice: Mapping[str, int]) -> float:
        seen.append(tuple(choice.values()))
        return choice["fine"] * 0.02 + choice["coarse"] * 0.1

    found = beam_search(steps, score, 1.0, width=1, step_ms=0.5)
    assert set(seen) <= set(itertools.product((0, 50, 100), (0, 1, 2)))
    assert found.choice == {"fine": 0, "coarse": 2}


def test_states_of_different_cost_do_not_compete() -> None:
    """A jump of ``big`` hurts at once; it must still be there when the small steps have added up to as much."""
    steps = {"big": options(0, 4), "small": options(0, 1, 2, 3, 4)}
    losses = {"big": [0, 5], "small": [0, 1, 2, 4, 8]}
    found = beam_search(steps, separable(losses), 5, width=1, step_ms=1)
    assert found.choice == {"big": 1, "small": 1}


def test_the_last_step_is_no_longer_than_it_must_be() -> None:
    steps = {"a": options(0, 1, 2, 3, 4, 5, 6)}
    assert beam_search(steps, lambda c: c["a"], 5, step_ms=4).choice == {"a": 5}


def test_a_layer_that_saves_less_than_a_step_still_counts() -> None:
    steps = {"a": options(0, 10), "tiny": options(0, 0.1, 0.2), "small": options(0, 0.3)}
    calls = []

    def score(choice: Mapping[str, int]) -> float:
        calls.append(tuple(choice.values()))
        return sum(choice.values())

    found = beam_search(steps, score, 10.5, width=1, step_ms=5)
    assert found.choice == {"a": 1, "tiny": 2, "small": 1}
    assert len(calls) == len(set(calls))  # some states of a level compete in it twice


def test_each_state_is_scored_once() -> None:
    """Three layers of three unit steps: level n holds the states with sum n, not the 3^n ways to them."""
    steps = {name: options(0, 1, 2, 3) for name in "abc"}
    calls = []

    def score(choice: Mapping[str, int]) -> float:
        calls.append(tuple(choice.values()))
        return 0.0

    found = beam_search(steps, score, 4, width=100, step_ms=1)
    sums = [sum(state) for state in itertools.product(range(4), repeat=3)]
    assert len(calls) == sum(1 <= s <= 4 for s in sums)
    assert len(set(calls)) == len(calls)
    assert found.levels == 4


def test_losses_that_are_no_numbers_are_worst() -> None:
    steps = {"a": options(0, 1), "b": options(0, 1)}
    found = beam_search(steps, lambda c: math.nan if c["a"] else 3.0, 1, step_ms=1)
    assert (found.choice, found.score) == ({"a": 0, "b": 1}, 3.0)


def test_nothing_to_save_keeps_all_dense() -> None:
    calls = []

    def score(choice: Mapping[str, int]) -> float:
        calls.append(choice["a"])
        return 1.0 + choice["a"]

    found = beam_search({"a": options(0, 1)}, score, 0)
    assert (found.choice, found.saved_ms, found.score, calls) == ({"a": 0}, 0.0, 1.0, [0])


def test_the_default_step_bounds_the_cost() -> None:
    steps = {f"layer{k}": options(*(i / 10 for i in range(20))) for k in range(19)}
    calls = []

    def score(choice: Mapping[str, int]) -> float:
        calls.append(choice)
        return sum(k * k for k in choice.values())

    found = beam_search(steps, score, 16)
    assert found.levels == 15  # 1200 losses for 4 * 19 of a level
    assert len(calls) < 2400  # a layer's last, shorter step is extra


def test_searches_for_similar_targets_meet_the_same_states() -> None:
    steps = {f"layer{k}": options(*(i / 100 for i in range(200))) for k in range(19)}
    scored: set[tuple[int, ...]] = set()
    new = []
    for target in (14.6, 14.3, 14.9):
        before = len(scored)

        def score(at: Mapping[str, int]) -> float:
            scored.add(tuple(at.values()))
            return float(sum((k + 1) * position**2 for k, position in enumerate(at.values())))

        beam_search(steps, score, target)
        new.append(len(scored) - before)
    assert max(new[1:]) < 0.3 * new[0]


def test_what_cannot_be_met_is_said_before_anything_is_scored() -> None:
    def score(choice: Mapping[str, int]) -> float:
        raise RuntimeError("scored")

    with pytest.raises(SluiceError, match=r"budget cannot be met.* 2 layers saves 3\.5 ms of the 4 ms.*by 0\.5 ms"):
        beam_search({"a": options(0, 1), "b": options(0, 0.5, 2.5)}, score, 4)


@pytest.mark.parametrize("bad", [(), options(0.5, 1), options(0, 1, 1), options(0, 2, 1)])
def test_options_out_of_order_are_our_fault(bad: tuple[Option, ...]) -> None:
    with pytest.raises(AssertionError, match="'a'"):
        beam_search({"a": bad}, lambda c: 0.0, 0)
