"""Readings of the losses, and the short training that chooses between them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError, Unreachable
from sluice.importance.taylor import fisher_scores
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import Gated, insert_gates, strip_gates
from sluice.pipeline import choose as choosing
from sluice.pipeline.candidates import UniformProblem, perturbed, stratum
from sluice.pipeline.choose import ENOUGH, LEAST, MOST, TRIED, Scenario, _room, choose
from sluice.pipeline.price import price_problem
from sluice.pipeline.problem import Problem, Solution
from sluice.profiler.profile import profile_onnx
from sluice.profiler.view import Profile
from sluice.solver.options import METHODS
from sluice.training.recovery import Recovery
from sluice.training.rehearse import FAR, HELD, forecast, held_out_loss, rehearsal_cost, rehearse
from tests.device import FakeRunner, profile_on, staircase
from tests.networks import mixed


def squared(outputs: Tensor, taught: Tensor, labels: object) -> Tensor:
    return ((outputs - taught) ** 2).mean()


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return [(torch.randn(8, 3, 9, 7, generator=g), torch.randint(9, (8,), generator=g)) for _ in range(9)]


@dataclass(frozen=True)
class Case:
    inputs: tuple[Tensor, ...]
    gated: Gated
    stripped: fx.GraphModule
    profile: Profile
    problem: Problem
    scores: dict[str, np.ndarray]

    def build(self, solution: Solution) -> fx.GraphModule:
        return rewrite_torch(self.stripped, solution.plan, self.inputs, merged=False)

    def choose(self, share: float, steps: int, methods: Sequence[str] = METHODS, total: int = 0) -> list[Scenario]:
        return choose(
            self.problem, methods, share * self.profile.latency.dense_ms(), self.build, data=data(),
            teacher=self.stripped, loss=squared, recovery=Recovery(1e-3), steps=steps, total=total, progress=False,
        )  # fmt: skip


@functools.cache
def case() -> Case:
    model, inputs = mixed()
    with pytest.MonkeyPatch.context() as patch:
        profile_on(lambda target, threads=1: FakeRunner(staircase(8)), patch)
        profile = profile_onnx(to_onnx(model, inputs), deployment=Deployment(batch=2), methods=METHODS, progress=False)
    gated = insert_gates(model, inputs)
    scores = fisher_scores(gated, data())
    problem = price_problem(gated, profile, METHODS, scores, data=data(), loss=squared)
    return Case(inputs, gated, strip_gates(gated).eval(), profile, problem, scores)


def test_widths_alone_are_priced_by_scores() -> None:
    c = case()
    problem = price_problem(c.gated, c.profile, ("filter",), c.scores, loss=squared)
    assert set(problem.losses) == set(c.profile.partition.dense)
    assert all(problem.model.levels[s] == (c.profile.latency.dense[s],) for s in c.profile.latency.switches)
    solution = problem.solve(0.7 * c.profile.latency.dense_ms())
    assert solution.plan.slices and not (solution.plan.drops or solution.plan.merges or solution.plan.factorizations)


def test_structure_needs_data() -> None:
    with pytest.raises(SluiceError, match=r"priced by measuring the loss; give data"):
        price_problem(case().gated, case().profile, ("rank",), case().scores, loss=squared)


@pytest.mark.parametrize("share", [0.5, pytest.param(0.4, marks=pytest.mark.slow)])
def test_readings_differ_and_keep_the_budget(share: float) -> None:
    readings = case().choose(share, steps=0)
    assert readings[0].name == "together" and len(readings) >= 2
    assert all(a.solution.plan != b.solution.plan for i, a in enumerate(readings) for b in readings[:i])
    target = share * case().profile.latency.dense_ms()
    assert all(r.solution.choice.promised_ms <= target * (1 + 1e-6) and r.rehearsed == () for r in readings)
    for r in readings:
        plan = r.solution.plan
        used = {"filter": plan.slices, "rank": plan.factorizations, "block": plan.drops, "merge": plan.merges}
        if r.name.endswith(" alone"):
            assert {m for m, edits in used.items() if edits} == {r.name.removesuffix(" alone")}


def test_methods_that_do_not_get_there_alone_are_left_out() -> None:
    c = case()
    latency, options = c.profile.latency, c.profile.options
    least = {m: replace(c.problem, sites=options.sites(latency, [m])).least_from(0.0) for m in METHODS}
    share = 0.98 * sorted(least.values())[1] / latency.dense_ms()  # one method alone reaches it
    names = {r.name for r in c.choose(share, steps=0)}
    assert "together" in names
    assert not {f"{m} alone" for m, ms in least.items() if ms > share * latency.dense_ms()} & names
    below = 0.9 * c.problem.least_from(0.0) / latency.dense_ms()
    with pytest.raises(Unreachable):
        c.choose(below, steps=0)


def test_a_method_that_misses_the_target_alone_but_not_the_budget_is_a_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = case()
    monkeypatch.setattr(choosing, "HOPELESS", float("inf"))
    latency, options = c.profile.latency, c.profile.options
    least = {m: replace(c.problem, sites=options.sites(latency, [m])).least_from(0.0) for m in METHODS}
    method, ms = sorted(least.items(), key=lambda item: item[1])[1]
    monkeypatch.setattr(choosing, "_may_pay", lambda *args: True)
    for share, there in ((0.99, True), (0.975, False)):
        found = {r.name: r for r in c.choose(share * ms / latency.dense_ms(), steps=0)}
        assert (f"{method} alone" in found) is there
        if there:
            assert found[f"{method} alone"].solution.choice.promised_ms == pytest.approx(ms)


def test_a_rate_that_is_to_be_found_is_found_on_the_first_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    used: list[int] = []

    def tried(module: nn.Module, *args: object, recovery: Recovery, steps: int, **options: object) -> float:
        used.append(steps)
        first = case().build(case().choose(0.5, steps=0)[0].solution)
        assert recovery == Recovery(1e-3) and module.state_dict().keys() == first.state_dict().keys()
        return 0.0625

    def noted(*args: object, lr: float, **options: object) -> list[list[float]]:
        rates.append(lr)
        return [[1.0] for _ in args[0]]  # type: ignore[attr-defined]

    monkeypatch.setattr("sluice.pipeline.choose.quick_rate", tried)
    monkeypatch.setattr("sluice.pipeline.choose.rehearse", noted)
    case().choose(0.5, steps=300)
    assert rates == [0.0625] and used[0] >= LEAST


def test_one_method_has_one_reading() -> None:
    c = case()
    problem = replace(c.problem, sites=c.profile.options.sites(c.profile.latency, ["rank"]))
    (only,) = choose(
        problem, ("rank",), 0.8 * c.profile.latency.dense_ms(), c.build, data=data(), teacher=c.stripped,
        loss=squared, recovery=Recovery(1e-3), steps=7, progress=False,
    )  # fmt: skip
    assert only.rehearsed == () and only.problem is problem


STEPS = 290  # enough for six candidates, strata included


@functools.cache
def rehearsed() -> list[Scenario]:
    return case().choose(0.5, steps=STEPS, total=90)


def test_the_best_comes_first() -> None:
    readings = rehearsed()
    assert len(readings) >= 3
    rounds = [len(r.rehearsed) for r in readings]
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] >= 1
    finalists = [r for r in readings if len(r.rehearsed) == rounds[0]]
    assert len(finalists) <= 2
    assert len({r.name for r in readings}) == len(readings)
    assert any(r.name.startswith("spread prices") for r in readings)
    cost = rehearsal_cost(len(readings), len({stratum(r.solution.plan) for r in readings}))
    last = [forecast(r.rehearsed, STEPS // cost, 90) for r in finalists]
    assert last == sorted(last) == [r.foreseen for r in finalists]
    assert all((r.foreseen is None) == (len(r.rehearsed) < 2) for r in readings)


def test_the_same_data_choose_the_same() -> None:
    first, second = rehearsed(), case().choose(0.5, steps=STEPS, total=90)
    assert [(r.name, r.rehearsed) for r in first] == [(r.name, r.rehearsed) for r in second]


class Scale(nn.Module):
    """One number that is to become the teacher's; it learns nothing if ``stuck``."""

    def __init__(self, value: float, stuck: bool = False) -> None:
        super().__init__()
        self.value, self.idle = nn.Parameter(torch.tensor(value)), nn.Parameter(torch.zeros(()))
        self.stuck = stuck

    def forward(self, x: Tensor) -> Tensor:
        value = self.value.detach() if self.stuck else self.value
        return x * (value + 0 * self.idle)


def trained(candidates: Sequence[nn.Module], batches: object, steps: int = 4) -> list[list[float]]:
    return rehearse(
        candidates, batches, teacher=Scale(1.0), loss=squared, lr=0.05, steps=steps, progress=False,  # type: ignore[arg-type]
    )  # fmt: skip


def numbers(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=g) for _ in range(count)]


@pytest.mark.parametrize(("count", "rounds"), [(2, [1, 1]), (3, [2, 2, 1]), (5, [3, 3, 2, 1, 1]), (1, [0])])
def test_halving(count: int, rounds: list[int]) -> None:
    found = trained([Scale(1.0 + 0.4 * (k + 1), stuck=True) for k in range(count)], numbers(20))
    assert [len(losses) for losses in found] == rounds


def test_who_learns_overtakes() -> None:
    stuck, learner = Scale(1.3, stuck=True), Scale(1.5)
    found = trained([stuck, learner], numbers(60), steps=50)
    assert len(found[0]) == len(found[1]) == 1 and found[1][-1] < found[0][-1]


class Listening(Scale):
    """Notes the batches that it sees in train and in eval mode."""

    def __init__(self, by: float) -> None:
        super().__init__(by, stuck=True)
        self.trained_on: list[int] = []
        self.judged_on: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.trained_on.append(id(x))
        else:
            self.judged_on.add(id(x))
        return super().forward(x)


def test_rounds_are_on_the_same_batches_twice_as_many_each_time() -> None:
    candidates = [Listening(1.0 + k) for k in range(4)]
    batches = numbers(HELD + 30)
    trained(candidates, batches, steps=3)
    assert sorted(len(c.trained_on) for c in candidates) == [3, 3, 3 + 6, 3 + 6]
    assert all(c.trained_on[:3] == candidates[0].trained_on[:3] for c in candidates)
    assert all(len(set(c.trained_on)) == len(c.trained_on) for c in candidates)


@pytest.mark.parametrize("size", [HELD + 2, HELD + 5, 40])
def test_held_batches_are_not_trained_on(size: int) -> None:
    """Also where the data come round again."""
    candidates, batches = [Listening(1.0), Listening(2.0), Listening(3.0)], numbers(size)
    trained(candidates, batches, steps=11)
    judged = set[int]().union(*(c.judged_on for c in candidates))
    seen = {x for c in candidates for x in c.trained_on}
    assert judged == {id(b) for b in batches[:HELD]} and len(seen) >= size - HELD - 7 and not judged & seen


def test_a_candidate_that_is_not_finite_is_out() -> None:
    broken = Scale(float("nan"), stuck=True)
    found = trained([broken, Scale(1.7), Scale(1.2)], numbers(20))
    assert found[0] == [np.inf] and len(found[1]) == len(found[2]) == 2


def test_fewer_batches_than_are_held() -> None:
    found = trained([Scale(1.5), Scale(1.9)], numbers(2), steps=3)
    assert [len(losses) for losses in found] == [1, 1] and all(np.isfinite(x) for own in found for x in own)


def test_the_held_out_loss_is_the_mean_in_eval_mode() -> None:
    batches = numbers(3)
    dropping = nn.Sequential(nn.Dropout(0.5), Scale(2.0)).train()
    expected = np.mean([float((x**2).mean()) for x in batches])
    assert held_out_loss(dropping, batches, Scale(1.0), squared) == pytest.approx(expected)


def test_a_forecast_is_the_power_law_through_the_last_two_losses() -> None:
    """Losses after 10, 30 and 70 steps of ``c n^-p``."""
    losses = [5.0 * n**-0.7 for n in (10, 30, 70)]
    assert forecast(losses, 10, 1000) == pytest.approx(5.0 * 1000**-0.7)
    assert forecast(losses[:2], 10, 500) == pytest.approx(5.0 * 500**-0.7)
    # Without a slope, a rising loss or a length: the last loss.
    assert forecast(losses[:1], 10, 1000) == losses[0]
    assert forecast(losses, 10, 0) == losses[-1]
    assert forecast([1.0, 2.0], 10, 1000) == 2.0
    # Never better by going back.
    assert forecast(losses, 10, 20) == losses[-1]


def test_who_falls_faster_is_trusted_more() -> None:
    """The learner is behind when the last round ends, and ahead by its slope."""
    slow, fast = Scale(1.25, stuck=True), Scale(1.6)
    teacher, batches = Scale(1.0), numbers(80)
    found = rehearse(
        [slow, fast], batches, teacher=teacher, loss=squared, lr=0.02, steps=10, total=10_000, strata=["a", "b"],
        progress=False,
    )  # fmt: skip
    assert [len(losses) for losses in found] == [2, 2]
    assert found[1][-1] > found[0][-1] and forecast(found[1], 10, 10_000) < forecast(found[0], 10, 10_000)


@pytest.mark.parametrize(
    ("strata", "rounds"),
    [
        ("aaaa", [2, 2, 1, 1]),
        ("aaab", [2, 1, 1, 2]),
        ("aabc", [3, 1, 3, 2]),
        ("abcd", [3, 3, 2, 2]),
        ("", [2, 2, 1, 1]),
    ],
)
def test_the_best_of_every_stratum_goes_through_the_first_round(strata: str, rounds: list[int]) -> None:
    candidates = [Scale(3.0 + 0.4 * k, stuck=True) for k in range(4)]
    found = rehearse(
        candidates, numbers(30), teacher=Scale(1.0), loss=squared, lr=0.05, steps=3, strata=strata, progress=False
    )  # fmt: skip
    assert [len(losses) for losses in found] == rounds


def test_a_kind_that_is_far_behind_has_no_claim() -> None:
    candidates = [Scale(value, stuck=True) for value in (1.4, 1.5, 1.6, 1.0 + 0.4 * (FAR**0.5 + 0.1))]
    found = rehearse(
        candidates, numbers(30), teacher=Scale(1.0), loss=squared, lr=0.05, steps=3, strata="aaab", progress=False
    )
    assert [len(losses) for losses in found] == [2, 2, 1, 1]


@pytest.mark.parametrize(("count", "strata"), [(2, 1), (2, 2), (3, 1), (5, 2), (6, 4), (8, 8)])
def test_the_cost_of_a_rehearsal_is_what_it_takes(count: int, strata: int) -> None:
    candidates = [Listening(9.0 + k) for k in range(count)]
    rehearse(
        candidates, numbers(30), teacher=Scale(1.0), loss=squared, lr=0.05, steps=3,
        strata=[min(k, strata - 1) for k in range(count)], progress=False,
    )  # fmt: skip
    assert sum(len(c.trained_on) for c in candidates) == 3 * rehearsal_cost(count, strata)


def test_room_follows_the_steps() -> None:
    assert _room(0) == 0 and _room(100_000) == MOST
    for steps in (100, 300, 620, 2000):
        found = _room(steps)
        assert found == 0 or (rehearsal_cost(found, (found + 1) // 2) + TRIED) * ENOUGH <= steps
    assert 3 <= _room(300) <= _room(620) < MOST


def test_too_few_steps_trust_the_prices() -> None:
    readings = case().choose(0.5, steps=LEAST)
    assert readings[0].name == "together" and all(r.rehearsed == () for r in readings)


def test_those_that_the_steps_do_not_suffice_for_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [replace(one, rehearsed=()) for one in rehearsed()]
    strata = [stratum(one.solution.plan) for one in known]
    monkeypatch.setattr("sluice.pipeline.choose._scenarios", lambda *_: list(known))
    monkeypatch.setattr(
        "sluice.pipeline.choose.rehearse", lambda plans, *_, **__: [[1.0 / (k + 1)] for k in range(len(plans))]
    )
    for count in (2, len(known) - 1):
        cost = rehearsal_cost(count, len(set(strata[:count])))
        found = case().choose(0.5, steps=LEAST * cost)
        heard = [one.name for one in found if one.rehearsed]
        assert heard == [one.name for one in known[: len(heard)]][::-1] and count <= len(heard) < len(known)
        assert [one.name for one in found[len(heard) :]] == [one.name for one in known[len(heard) :]]


def test_spread_prices_prefer_other_changes_and_come_out_the_same_again() -> None:
    problem, draws = case().problem, [perturbed(case().problem) for _ in range(2)]
    options = problem.profile.options
    merges, widths = options.merges.keys() & problem.losses.keys(), problem.profile.partition.dense.keys()
    ratios = []
    for _ in range(5):
        one, other = next(draws[0]), next(draws[1])
        assert one.losses.keys() == problem.losses.keys()
        assert all(np.array_equal(one.losses[s], other.losses[s]) for s in problem.losses)
        factors = {s: one.losses[s].max() / v.max() for s, v in problem.losses.items() if v.max() > 0}
        for site, factor in factors.items():
            assert np.allclose(one.losses[site], factor * problem.losses[site])
        means = [np.mean([np.log(factors[s]) for s in kind if s in factors]) for kind in (merges, widths)]
        ratios.append(means[0] - means[1])
    assert max(ratios) > 1.0 and min(ratios) < -1.0


def test_uniform_widths_keep_one_share_of_every_group() -> None:
    c = case()
    sites = c.profile.options.sites(c.profile.latency, ["filter"])
    uniform = UniformProblem(c.profile, c.problem.analysis, sites, c.problem.losses, c.problem.scores)
    latency = c.profile.latency
    target = 0.7 * latency.dense_ms()
    choice = uniform.choose(latency, target)
    model = uniform.model
    kept = {g: (choice.widths[g], levels) for g, levels in model.levels.items() if len(levels) > 1}
    share = choice.retained
    above = min(n / levels[-1] for _, levels in kept.values() for n in levels if n / levels[-1] > share)
    base, larger = (
        {g: max((n for n in ls if n <= s * ls[-1]), default=ls[0]) for g, (_, ls) in kept.items()}
        for s in (share, above)
    )
    assert all(width in (base[g], larger[g]) for g, (width, _) in kept.items())
    assert latency.ms({**choice.widths, **base}) <= latency.ms(choice.widths) == choice.promised_ms <= target
    # No larger share is within the target, nor is any group that might go a step beyond.
    assert latency.ms({**choice.widths, **larger}) > target
    steps = [{**choice.widths, g: larger[g]} for g, (width, _) in kept.items() if width < larger[g]]
    assert steps and all(latency.ms(step) > target for step in steps)
    assert all(choice.widths[s] == latency.dense[s] for s in latency.levels if s not in kept)
    with pytest.raises(Unreachable):
        uniform.choose(latency, 0.01 * latency.dense_ms())
