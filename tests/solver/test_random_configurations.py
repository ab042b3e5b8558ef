"""Random configurations: all levels and states occur, no rule is broken, without switches nothing is new."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.core.latency import LatencyModel, Rule
from sluice.solver.random_configurations import random_configuration


def layered(layers: int) -> LatencyModel:
    """Layers in a row: dense, two forms of factorization, merges of neighbours, a drop of the first two."""
    dense: dict[str, int] = {"a": 13, "b": 7, "c": 5}
    levels: dict[str, tuple[int, ...]] = {"a": (4, 8, 13), "b": (1, 7), "c": (5,)}
    covers: dict[int, list[str]] = {}
    for k in range(layers):
        dense[f"rank {k}"], levels[f"rank {k}"] = 6, (2, 6)
        covers[k] = [f"dense {k}", f"form {k}", f"other form {k}"]
        if k:
            covers[k].append(f"merge {k}")
            covers[k - 1].append(f"merge {k}")
    for k in (0, 1):
        covers[k].append("drop")
    names = sorted({s for own in covers.values() for s in own})
    rules = [Rule(tuple((s, 1) for s in own)) for own in covers.values()]
    # One that follows from others, one that nothing binds.
    rules.append(Rule((("some form of 0", 1), ("form 0", -1), ("other form 0", -1)), 0))
    names += ["some form of 0", "free"]
    dense |= {s: int(s.startswith("dense")) for s in names}
    levels |= {s: (0, 1) for s in names}
    return LatencyModel((), dense, levels, rules=tuple(rules), switches=frozenset(names))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**31), st.sets(st.integers(0, 4)))
def test_rules_and_levels_hold(layers: int, seed: int, fixed: set[int]) -> None:
    model = layered(layers)
    frozen = {f"form {k}": (0,) for k in fixed if k < layers} | {"free": (1,)}
    model = LatencyModel((), model.dense, {**model.levels, **frozen}, rules=model.rules, switches=model.switches)
    plan = random_configuration(model, np.random.default_rng(seed))
    assert list(plan) == list(model.levels)
    assert all(plan[g] in levels for g, levels in model.levels.items())
    assert all(rule.holds(plan) for rule in model.rules)


@st.composite
def systems(draw: st.DrawFn) -> LatencyModel:
    """Up to seven switches under up to five linear rules with small coefficients, some switches fixed."""
    names = [f"s{k}" for k in range(draw(st.integers(1, 7)))]
    rules = []
    for _ in range(draw(st.integers(0, 5))):
        own = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
        coefs = tuple((name, draw(st.sampled_from([1, 1, 1, -1, 2]))) for name in own)
        rules.append(Rule(coefs, draw(st.integers(-1, 2))))
    dense = {name: draw(st.integers(0, 1)) for name in names}
    levels = {name: draw(st.sampled_from([(0, 1), (0, 1), (0, 1), (dense[name],)])) for name in names}
    return LatencyModel((), dense, levels, rules=tuple(rules), switches=frozenset(names))


@settings(max_examples=200, deadline=None)
@given(systems(), st.integers(0, 2**31))
def test_a_state_is_found_exactly_where_there_is_one(model: LatencyModel, seed: int) -> None:
    states = itertools.product(*model.levels.values())
    named = (dict(zip(model.levels, state, strict=True)) for state in states)
    allowed = [plan for plan in named if all(rule.holds(plan) for rule in model.rules)]
    if allowed:
        assert random_configuration(model, np.random.default_rng(seed)) in allowed
    else:
        with pytest.raises(RuntimeError, match="exclude every configuration"):
            random_configuration(model, np.random.default_rng(seed))


def test_every_state_and_both_ends_occur() -> None:
    model = layered(3)
    rng = np.random.default_rng(0)
    plans = [random_configuration(model, rng) for _ in range(1500)]
    assert {g: {plan[g] for plan in plans} for g in model.levels} == {g: set(v) for g, v in model.levels.items()}
    names = sorted(model.switches - {"free"})
    allowed = {
        states
        for states in itertools.product((0, 1), repeat=len(names))
        if all(rule.holds(dict(zip(names, states, strict=True))) for rule in model.rules)
    }
    assert {tuple(plan[s] for s in names) for plan in plans} == allowed
    dense = [sum(plan[f"dense {k}"] for k in range(3)) for plan in plans]
    assert min(dense.count(k) for k in (0, 3)) > 150


def test_what_covers_several_layers_is_chosen_about_as_often_as_what_covers_one() -> None:
    model = layered(5)
    rng = np.random.default_rng(1)
    plans = [random_configuration(model, rng) for _ in range(600)]
    merged = np.mean([sum(plan[f"merge {k}"] for k in range(1, 5)) for plan in plans]) / 4
    form = np.mean([sum(plan[f"form {k}"] for k in range(5)) for plan in plans]) / 5
    assert 0.5 < merged / form < 2


def test_without_switches_only_widths_are_drawn() -> None:
    """One number for the plan and one for every site, all rules and switches aside."""
    model = layered(2)
    sites = {g: n for g, n in model.dense.items() if g not in model.switches}
    plain = LatencyModel((), sites, {g: model.levels[g] for g in sites})
    drawn, other = np.random.default_rng(5), np.random.default_rng(5)
    plan = random_configuration(plain, drawn)
    other.uniform(size=1 + len(sites))
    assert drawn.uniform() == other.uniform()
    full = random_configuration(model, np.random.default_rng(5))
    assert plan == {g: full[g] for g in sites}


def test_rules_that_exclude_everything_are_a_bug() -> None:
    rules = (Rule((("s", 1),), 1), Rule((("s", 1),), 0))
    model = LatencyModel((), {"s": 1}, {"s": (0, 1)}, rules=rules, switches=frozenset({"s"}))
    with pytest.raises(RuntimeError, match="2 rules exclude every configuration"):
        random_configuration(model, np.random.default_rng(0))
