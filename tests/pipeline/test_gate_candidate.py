"""The candidate that gates make: the plan nearest to their decisions, from the leading plan on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice.passes.gates.filter_gates import BlockGate, Gate
from sluice.passes.gates.gating import Gated
from sluice.passes.gates.merge_gates import MergeGate
from sluice.passes.gates.rank_gates import RankGate
from sluice.passes.gates.start import start_at
from sluice.pipeline import choose as choosing
from sluice.pipeline.choose import DUEL, GATES, LEAST, Scenario, choose
from sluice.pipeline.gate_candidate import CHANNELS, GateCandidate, nearest_to
from sluice.pipeline.insert import insert_all
from sluice.pipeline.problem import Problem, Solution
from sluice.solver.options import METHODS
from sluice.training.budget import Budget
from sluice.training.learn_gates import learn_gates
from sluice.training.recovery import Recovery
from sluice.training.rehearse import forecast, rehearsal_cost
from tests.pipeline.test_choose import case, data, squared

SHARE, TOTAL = 0.6, 450


def target_ms() -> float:
    return SHARE * case().profile.latency.dense_ms()


@functools.cache
def leader() -> Solution:
    return case().problem.solve(target_ms())


def candidate() -> GateCandidate:
    space, stripped = case().gated.meta["space"], case().stripped
    return GateCandidate(stripped, space, METHODS, stripped, squared, Recovery(1e-3), progress=False)


def started(steps: int = 9) -> Gated:
    made = insert_all(
        case().stripped, case().inputs, case().profile, METHODS, steps=steps, space=case().gated.meta["space"],
        forms={f.param: f.form for f in leader().plan.factorizations}, merges=True,
    )  # fmt: skip
    assert made is not None
    start_at(made.gates, leader().choice.widths, case().problem.scores)
    return made


@pytest.fixture
def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leading plan and one more, which are known."""
    c, made = case(), started()
    for _, gate in made.gates.items():
        if isinstance(gate, Gate):
            gate.logit.data.neg_()
    other = nearest_to(c.problem, made)
    known = [Scenario("together", c.problem, leader()), Scenario("other", other, other.solve(target_ms()))]
    monkeypatch.setattr(choosing, "_scenarios", lambda *args: list(known))
    monkeypatch.setattr(choosing, "_spread", lambda *args: [])


def chosen(steps: int, gates: GateCandidate | None, total: int = TOTAL) -> list[Scenario]:
    return choose(
        case().problem, METHODS, target_ms(), case().build, data=data(), teacher=case().stripped, loss=squared,
        recovery=Recovery(1e-3), steps=steps, total=total, gates=gates, progress=False,
    )  # fmt: skip


def test_gates_of_every_kind_start_at_the_leading_plan() -> None:
    made, plan = started(), leader().plan
    kinds = {type(gate) for _, gate in made.gates.items()}
    assert kinds == {Gate, RankGate, BlockGate, MergeGate}
    assert plan.slices and (plan.merges or plan.drops or plan.factorizations)
    budget = Budget(made, case().profile, f"{target_ms()}ms", warmup_fraction=0.0)
    assert float(budget.expected_ms().detach()) == pytest.approx(leader().choice.promised_ms, rel=0.05)
    assert budget.scheduled_ms() == pytest.approx(target_ms())


def test_gates_that_did_not_move_choose_the_leading_plan() -> None:
    problem = nearest_to(case().problem, started())
    found = problem.solve(target_ms())
    assert found.plan == leader().plan and found.choice.loss == pytest.approx(0.0, abs=1e-9)


def test_the_distance_is_counted_in_logits() -> None:
    made = started()
    group = next(g.name for g in case().problem.analysis.groups if len(case().problem.model.levels[g.name]) > 2)
    gate = made.gates[group]
    assert isinstance(gate, Gate)
    logits = np.linspace(-1.3, 0.9, gate.size)[np.random.default_rng(0).permutation(gate.size)]
    gate.logit.data.copy_(torch.from_numpy(logits))
    problem = nearest_to(case().problem, made)
    ordered = np.sort(logits)[::-1]
    for level, loss in zip(problem.profile.latency.levels[group], problem.losses[group], strict=True):
        expected = ordered[level:].clip(min=0).sum() + (-ordered[:level]).clip(min=0).sum()
        assert loss == pytest.approx(expected, abs=1e-6)
    assert np.argsort(problem.scores[group]).tolist() == np.argsort(logits).tolist()
    for site, other in made.gates.items():
        levels, losses = np.asarray(problem.profile.latency.levels[site]), problem.losses[site]
        if isinstance(other, RankGate):
            decided = other.width()
            assert (np.diff(losses[levels >= decided]) >= 0).all() and (np.diff(losses[levels <= decided]) <= 0).all()
        elif isinstance(other, MergeGate):
            assert losses.max() == pytest.approx(CHANNELS * abs(float(other.logit.detach())))


def test_training_keeps_the_budget_and_moves_gates_and_weights() -> None:
    made = started(12)
    budget = Budget(made, case().profile, f"{target_ms()}ms", warmup_fraction=0.0)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}

    def forever() -> Iterator[Any]:
        while True:
            yield from data()

    assert learn_gates(
        made, budget, forever(), 12, teacher=case().stripped, loss=squared, recovery=Recovery(), lr=1e-3, progress=False
    )
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert {n.startswith("gates.") for n in moved} == {True, False}
    assert not made.training and int(made.gates.progress) == 12
    found = nearest_to(case().problem, made).solve(target_ms())
    assert found.choice.promised_ms <= target_ms() * (1 + 1e-6)


def test_a_loss_that_is_not_finite_makes_no_candidate() -> None:
    def broken(outputs: Tensor, taught: Tensor, labels: object) -> Tensor:
        return outputs.mean() * torch.inf

    assert replace(candidate(), loss=broken).learn(case().problem, leader(), target_ms(), iter(data()), 3, 1e-3) is None


def test_gates_are_one_more_candidate_of_the_same_steps(few_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, used, tried = 100, dict[str, int](), list[int]()
    inner = choosing.rehearse

    def learn(
        self: GateCandidate, problem: Problem, leader: Solution, ms: float, stream: object, count: int, lr: float
    ) -> Problem:
        used["gates"] = count
        assert lr == 1e-3 and ms == target_ms()
        return replace(problem, losses={s: v[::-1].copy() for s, v in problem.losses.items()})

    def rehearse(plans: list[nn.Module], *args: Any, **options: Any) -> list[list[float]]:
        strata = len(set(options["strata"]))
        tried.append(options["steps"] * rehearsal_cost(len(plans), strata))
        found: list[list[float]] = inner(plans, *args, **options)
        return found

    monkeypatch.setattr(GateCandidate, "learn", learn)
    monkeypatch.setattr(choosing, "rehearse", rehearse)
    without = chosen(steps, None)
    first = tried.pop()
    found = chosen(steps, candidate())
    share = int(GATES * TOTAL)
    assert tried[0] == first and len(tried) == 2 and used["gates"] == share - int(DUEL * share)
    assert used["gates"] + tried[1] <= share < used["gates"] + tried[1] + rehearsal_cost(2, 2)
    names = [one.name for one in found]
    assert names.count("gates") == 1 and names.index("gates") < 2 and "gates" not in [one.name for one in without]
    once = int(DUEL * share) // rehearsal_cost(2, 2)
    assert [len(one.rehearsed) for one in found[:2]] == [2, 2]
    ends = [forecast(one.rehearsed, once, TOTAL) for one in found[:2]]
    assert ends[0] <= ends[1]


def test_a_plan_without_others_is_compared_with_the_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    only = Scenario("together", case().problem, leader())
    monkeypatch.setattr(choosing, "_scenarios", lambda *args: [only])
    monkeypatch.setattr(choosing, "_spread", lambda *args: [])
    own = replace(case().problem, losses={s: v[::-1].copy() for s, v in case().problem.losses.items()})
    monkeypatch.setattr(GateCandidate, "learn", lambda *args: own)
    assert chosen(100, None) == [only]
    found = chosen(100, candidate())
    assert {one.name for one in found} == {"together", "gates"} and all(len(one.rehearsed) == 2 for one in found)
    monkeypatch.setattr(GateCandidate, "learn", lambda *args: None)
    assert [(one.name, one.rehearsed) for one in chosen(100, candidate())] == [("together", ())]


def test_too_few_steps_leave_gates_out(few_plans: None) -> None:
    least = int(LEAST * rehearsal_cost(2, 2) / (DUEL * GATES))
    assert all(one.name != "gates" for one in chosen(100, candidate(), total=least - 10))
