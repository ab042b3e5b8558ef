"""The candidate of a deep budget: down in stops, trained and priced anew at each, and dense in its form again."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sluice.passes.graph.groups import keep_masks
from sluice.pipeline import choose as choosing
from sluice.pipeline.choose import Scenario, choose, late_steps
from sluice.pipeline.prepare import Prepared, trainable
from sluice.pipeline.problem import Solution
from sluice.pipeline.progressive import Descent, dense_again, descend, stops
from sluice.pipeline.recipe import Recipe
from sluice.runtime.base.compare import relative_error
from sluice.solver.options import METHODS
from sluice.training.recovery import Recovery
from tests.pipeline.test_choose import case, data, squared

DEEP, STEPS = 0.3, 170


def ready() -> Prepared:
    return Prepared(case().gated, case().profile, METHODS, case().stripped, case().problem)


def recipe(lr: float = 1e-3) -> Recipe:
    return Recipe(data(), squared, Recovery(lr), epochs=60, progress=False, progressive=True)


def deep_ms() -> float:
    return DEEP * case().profile.latency.dense_ms()


@functools.cache
def came_down() -> Descent:
    found = descend(ready(), deep_ms(), recipe(), STEPS)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.7, []), (0.5, []), (0.25, [0.5]), (0.3, [0.3**0.5]), (0.1, [0.1 ** (1 / 3), 0.1 ** (2 / 3)])],
)
def test_stops_are_equal_ratios_of_about_a_half(share: float, expected: list[float]) -> None:
    assert stops(share) == pytest.approx(expected)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_was_trained_computes_the_same_in_the_dense_form(seed: int) -> None:
    c, rng = case(), np.random.default_rng(seed)
    widths = {
        **c.profile.latency.dense,
        **{g.name: int(rng.integers(1, g.size + 1)) for g in c.problem.analysis.groups},
    }
    choice = replace(c.problem.solve(c.profile.latency.dense_ms()).choice, widths=widths)
    solution = c.problem.solution(choice)
    slim = trainable(c.stripped, solution.plan)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in slim.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.rand_like(tensor) + 0.5)
    dense = dense_again(c.gated, solution, slim)
    assert {n: t.shape for n, t in dense.state_dict().items()} == {
        n: t.shape for n, t in c.stripped.state_dict().items()
    }
    x = torch.randn(3, 3, 9, 7)
    with torch.no_grad():
        want, have = slim.eval()(x), dense(x)
    assert relative_error(have.numpy(), want.numpy()) < 1e-5
    before = trainable(dense, solution.plan).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in slim.state_dict().items())


def test_prices_are_those_of_the_network_that_came_down() -> None:
    c, found = case(), came_down()
    weights = dict(found.captured.named_parameters())
    gone = 0
    for group in c.problem.analysis.groups:
        if group.name not in found.ready.problem.losses:
            continue
        scores, losses = found.ready.problem.scores[group.name], found.ready.problem.losses[group.name]
        alive = int((scores > 0).sum())
        gone += group.size - alive
        levels = c.problem.model.levels[group.name]
        kept = [loss for level, loss in zip(levels, losses, strict=True) if level >= alive]
        assert max(kept) <= min(
            [loss for level, loss in zip(levels, losses, strict=True) if level < alive], default=1e9
        )
    assert gone > 0 and any(not torch.equal(weights[name], p) for name, p in c.stripped.named_parameters())
    plan = found.ready.problem.solve(deep_ms()).plan
    slim = found.build(found.ready.problem.solve(deep_ms()))
    assert plan.slices and sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in weights.values())


def test_channels_that_are_gone_go_first() -> None:
    found = came_down()
    solution = found.ready.problem.solve(deep_ms())
    masks = keep_masks(found.ready.problem.analysis, solution.kept)
    for group, mask in zip(found.ready.problem.analysis.groups, masks, strict=True):
        alive = found.ready.problem.scores[group.name] > 0
        if mask.sum() <= alive.sum():
            assert (alive | ~mask).all()


@pytest.mark.parametrize("share", [0.6, 0.48])
def test_a_budget_near_the_dense_network_has_no_stops(share: float) -> None:
    assert descend(ready(), share * case().profile.latency.dense_ms(), recipe(), STEPS) is None


def test_too_few_steps_for_a_rate_leave_stops_out() -> None:
    assert descend(ready(), deep_ms(), recipe(), 40) is None


def test_a_loss_that_is_not_finite_makes_no_candidate() -> None:
    broken = replace(recipe(), loss=lambda outputs, taught, labels: outputs.mean() * torch.inf)
    assert descend(ready(), deep_ms(), broken, STEPS) is None


@pytest.mark.parametrize("better", [True, False])
def test_its_plan_is_one_more_candidate_trained_from_its_own_weights(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, target = case().problem, deep_ms()
    leader = problem.solve(target)
    monkeypatch.setattr(choosing, "_scenarios", lambda *args: [Scenario("together", problem, leader)])
    monkeypatch.setattr(choosing, "_spread", lambda *args: [])
    built: list[Solution] = []
    own = replace(problem, losses={site: values[::-1].copy() for site, values in problem.losses.items()})

    class Noted(Descent):
        def build(self, solution: Solution) -> Any:
            built.append(solution)
            return case().build(solution)

    def rehearse(plans: list[nn.Module], *args: Any, **options: Any) -> list[list[float]]:
        return [[1.0]] if len(plans) == 1 else [[1.0, 0.5], [1.0, 0.4 if better else 0.6]]

    monkeypatch.setattr(choosing, "rehearse", rehearse)
    total = 450
    found = choose(
        problem, METHODS, target, case().build, data=data(), teacher=case().stripped, loss=squared,
        recovery=Recovery(1e-3), steps=100, total=total, descent=Noted(replace(ready(), problem=own), case().stripped),
        progress=False,
    )  # fmt: skip
    assert [one.name for one in found] == (["stops", "together"] if better else ["together", "stops"])
    assert built == [next(one.solution for one in found if one.name == "stops")]
    assert late_steps(total)[1] >= choosing.LEAST
