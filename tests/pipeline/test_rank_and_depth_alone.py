"""BSR and LayerMerge on their own: their solutions within the budget, and against what the solver would say."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sluice.core.errors import Unreachable
from sluice.core.plan import Factorize
from sluice.importance.loss_increase import LossIncrease
from sluice.passes.cut.factor import singular_values
from sluice.passes.cut.factor_torch import truncations_torch
from sluice.passes.gates.gating import insert_gates
from sluice.pipeline.bsr import BeamProblem, stable_rank_loss
from sluice.pipeline.layermerge import DepthProblem
from sluice.pipeline.price import price_problem
from sluice.pipeline.problem import Problem
from sluice.runtime.base.compare import assert_close
from sluice.solver.options import EditSpace
from sluice.training.train import fit
from tests.networks import mixed
from tests.pipeline.test_choose import case, data, squared

SHARES = (0.95, 0.85, 0.75, 0.65)


@functools.cache
def bsr() -> BeamProblem:
    """About four weights: the beam weighs every state of all weights on the data."""
    c = case()
    few = list(dict.fromkeys(option.param for option in c.profile.options.ranks))[:4]
    options = EditSpace(tuple(option for option in c.profile.options.ranks if option.param in few))
    problem = price_problem(c.gated, replace(c.profile, options=options), ("bsr",), {}, data=data(), loss=squared)
    assert isinstance(problem, BeamProblem) and set(problem.steps) == set(few)
    return problem


@functools.cache
def depth() -> DepthProblem:
    c = case()
    problem = price_problem(c.gated, c.profile, ("merge",), {}, data=data(), loss=squared)
    assert isinstance(problem, DepthProblem)
    return problem


def reachable(problem: Problem, share: float) -> bool:
    try:
        problem.solve(share * problem.model.dense_ms())
    except Unreachable:
        return False
    return True


@pytest.mark.parametrize("share", SHARES[:3])
def test_beam_search_meets_the_budget_by_ranks_alone(share: float) -> None:
    problem = bsr()
    solution = problem.solve(share * problem.model.dense_ms())
    assert solution.choice.promised_ms <= share * problem.model.dense_ms() * (1 + 1e-9)
    assert solution.plan.factorizations and not (solution.plan.slices or solution.plan.drops or solution.plan.merges)
    assert all(rule.holds(solution.choice.widths) for rule in problem.model.rules)
    assert solution.choice.promised_ms == pytest.approx(problem.model.ms(solution.choice.widths))


def test_some_budgets_are_within_reach_and_some_are_not() -> None:
    assert reachable(bsr(), SHARES[0]) and not reachable(bsr(), 0.01)
    assert reachable(depth(), SHARES[0]) and not reachable(depth(), 0.01)


def test_the_beam_is_no_worse_than_what_the_solver_makes_of_the_same_prices() -> None:
    """Jointly measured, the beam's state loses no more than the one that single prices suggest, within its steps."""
    c, problem, judge = case(), bsr(), LossIncrease(case().stripped, data(), squared)
    priced = price_problem(c.gated, problem.profile, ("rank",), {}, data=data(), loss=squared)
    target = SHARES[0] * problem.model.dense_ms()
    theirs = priced.solve(target).plan.factorizations

    state = judge.gm.state_dict()
    loss = judge.weights({f.param: truncations_torch(state[f.param], f.form)(f.rank) for f in theirs})
    assert problem.solve(target).choice.loss <= 1.5 * loss


def test_what_was_scored_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem is asked again and again, for budgets close to each other."""
    problem, target = bsr(), SHARES[0] * bsr().model.dense_ms()
    first = problem.solve(target)
    assert len(first.plan.factorizations) > 0
    monkeypatch.setattr(LossIncrease, "weights", lambda self, changed: pytest.fail("scored again"))
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed again"))
    second = problem.solve(target)
    assert second.plan == first.plan and second.choice.loss == first.choice.loss
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        problem.solve(0.9 * problem.model.dense_ms())


@pytest.mark.parametrize("share", SHARES)
def test_the_dynamic_programme_says_what_the_solver_says(share: float) -> None:
    problem = depth()
    plain = Problem(problem.profile, problem.analysis, problem.sites, problem.losses, problem.scores)
    target = share * problem.model.dense_ms()
    if not reachable(plain, share):
        assert not reachable(problem, share)
        return
    ours, theirs = problem.solve(target), plain.solve(target)
    assert ours.choice.promised_ms <= target * (1 + 1e-9)
    assert_close(ours.choice.loss, theirs.choice.loss, tol=0.011)  # the solver stops within 1%
    assert all(rule.holds(ours.choice.widths) for rule in problem.model.rules)
    assert bool(ours.plan.merges) and not ours.plan.factorizations


def test_every_merge_alone_takes_what_the_programme_is_told() -> None:
    """A generous budget with a price below zero for one merge: it is taken, and promised what the model says."""
    problem = depth()

    for switch in problem.profile.options.merges:
        losses = {s: np.array([0.0, 1e3]) for s in problem.losses} | {switch: np.array([0.0, -1.0])}
        solution = replace(problem, losses=losses).solve(2 * problem.model.dense_ms())
        assert solution.plan.merges == (problem.profile.options.merges[switch],)
        assert solution.choice.promised_ms == pytest.approx(problem.model.ms(solution.choice.widths))


def test_a_bonus_keeps_segments() -> None:

    problem, target = depth(), SHARES[1] * depth().model.dense_ms()
    if not reachable(problem, SHARES[1]):
        pytest.skip("beyond what merges reach here")
    removed = [
        sum(len(m.layers) - 1 for m in replace(problem, bonus=bonus).solve(target).plan.merges)
        for bonus in (0.0, 5.0, 50.0)
    ]
    assert removed == sorted(removed, reverse=True)


def test_the_regulariser_empties_what_will_be_cut() -> None:
    model, inputs = mixed()
    gated = insert_gates(model, inputs)
    name = "block1.conv1.weight"
    edit = Factorize(name, "kxk-1x1", 3)

    def tail() -> float:
        values = singular_values(gated.get_parameter(name).detach().numpy(), edit.form)
        return float(values[3:].sum() / values[:3].sum())

    teacher = insert_gates(model, inputs).eval()
    with torch.no_grad():
        plain = squared(gated.eval()(*inputs), teacher(*inputs), None)
        regularised = stable_rank_loss(squared, gated, (edit,), strength=2.0)(gated(*inputs), teacher(*inputs), None)
    assert_close(float(regularised - plain), 2.0 * tail(), tol=1e-5)
    before = tail()
    fit(
        gated, data(), epochs=3, teacher=teacher, loss=stable_rank_loss(squared, gated, (edit,), strength=1.0), lr=3e-3,
        progress=False,
    )  # fmt: skip
    assert tail() < 0.7 * before
