"""Measuring by need finds what a complete table would give, from a part of its points."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.core.errors import SluiceError, Unreachable
from sluice.core.latency import LatencyModel
from sluice.profiler.need import LAST, ROUNDS, SHARES, Solve, by_need, neutral_losses, solve_by_need, walk
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.profile import profile_known
from sluice.profiler.view import Profile
from sluice.solver import lagrangian
from sluice.solver.decide import Choice, decide, least_ms
from sluice.solver.descent import steps_from
from sluice.solver.options import METHODS, chosen_edits
from tests.device import Cost, FakeRunner, chain, line, staircase
from tests.profiler.on_device import profiled, skipping

DEVICES = {"4": staircase(4), "8": staircase(8), "8 slow": staircase(8, 1.3), "16": staircase(16), "line": line}
Losses = Mapping[str, np.ndarray]


def random_losses(model: LatencyModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Falling to nothing at the full width."""
    found = {}
    for site, levels in model.levels.items():
        steps = rng.exponential(size=len(levels) - 1)
        found[site] = np.array([*np.cumsum(steps)[::-1], 0.0])
    return found


def within(losses: Losses, target_ms: float) -> Solve:
    return lambda latency, near: decide(latency, losses, target_ms, gap=1e-9, near=near)


def loss_of(model: LatencyModel, losses: Losses, widths: Mapping[str, int]) -> float:
    return float(sum(losses[site][model.levels[site].index(widths[site])] for site in losses))


def everything(model: LatencyModel) -> list[dict[str, int]]:
    """All combinations of levels."""
    return [dict(zip(model.levels, point, strict=True)) for point in itertools.product(*model.levels.values())]


def solved(cost: Cost, seed: int) -> tuple[Profile, Losses, float, Choice | None]:
    """A small chain with random losses and a random target, solved by need."""
    rng = np.random.default_rng(seed)
    widths = [int(width) for width in rng.choice([8, 12, 16, 20, 24], size=3)]
    profile = profiled(FakeRunner(cost, slower=lambda ms: ms + 0.002), chain(widths, batch="N"))
    losses = random_losses(profile.latency, rng)
    target_ms = float(rng.uniform(0.2, 0.9)) * profile.latency.dense_ms()
    try:
        return profile, losses, target_ms, solve_by_need(profile, within(losses, target_ms))
    except Unreachable:
        return profile, losses, target_ms, None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_plan_is_the_optimum_of_the_complete_table(device: str, seed: int) -> None:
    profile, losses, target_ms, choice = solved(DEVICES[device], seed)
    asked = profile.coverage.points
    plans = everything(profile.latency)
    profile.ask(plans)
    model = profile.latency
    assert asked < profile.coverage.points
    reached = [plan for plan in plans if model.ms(plan) <= target_ms * (1 + 1e-9)]
    if choice is None:
        assert not reached
    else:
        assert choice.promised_ms == pytest.approx(model.ms(choice.widths), rel=1e-9)
        assert choice.promised_ms <= target_ms * (1 + 1e-6)
        best = min(loss_of(model, losses, plan) for plan in reached)
        assert loss_of(model, losses, choice.widths) == pytest.approx(best, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([*DEVICES.values(), staircase(12, 2.0)]))
@settings(max_examples=12, deadline=None)
def test_no_plan_is_better_but_where_a_bound_did_not_hold(seed: int, cost: Cost) -> None:
    """Whatever the device: what the bounds allow was looked at, and nothing else was chosen."""
    profile, losses, target_ms, choice = solved(cost, seed)
    hopeful, plans = profile.latency.hopeful(), everything(profile.latency)
    allowed = [plan for plan in plans if hopeful.ms(plan) <= target_ms * (1 - 1e-6)]
    if choice is None:
        assert not allowed
    else:
        chosen = loss_of(hopeful, losses, choice.widths)
        assert all(loss_of(hopeful, losses, plan) >= chosen * (1 - 1e-6) - 1e-9 for plan in allowed)


def test_every_point_of_the_plan_is_measured_and_its_engine_takes_what_is_promised() -> None:
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, chain([26, 20, 28], batch="N"))
    losses = random_losses(profile.latency, np.random.default_rng(7))
    for share in (0.7, 0.45, 0.3):
        choice = solve_by_need(profile, within(losses, share * profile.latency.dense_ms()))
        assert profile.knows(choice.widths) and profile.latency.share_estimated(choice.widths) == 0.0
        engine = runner.ms(build_engine(profile.partition, choice.widths))
        assert choice.promised_ms == pytest.approx(engine, rel=1e-9)


def test_far_fewer_points_are_measured_than_a_complete_table_has() -> None:
    profile = profiled(FakeRunner(staircase(8, 1.2)), chain([64, 48, 96, 64], batch="N"))
    losses = random_losses(profile.latency, np.random.default_rng(3))
    for share in (0.6, 0.3):
        solve_by_need(profile, within(losses, share * profile.latency.dense_ms()))
    cover = profile.coverage
    assert len(profile.layout.slots) < cover.points < 0.35 * cover.complete


def test_what_was_measured_for_one_solver_serves_the_others() -> None:
    model = chain([32, 24, 40], batch="N")

    def points(*shares: float, together: bool) -> tuple[int, list[float]]:
        profile = profiled(FakeRunner(staircase(8)), model)
        losses = random_losses(profile.latency, np.random.default_rng(5))
        before, solvers = profile.coverage.points, [within(losses, s * profile.latency.dense_ms()) for s in shares]
        found = by_need(profile, solvers) if together else [solve_by_need(profile, solve) for solve in solvers]
        assert all(isinstance(choice, Choice) for choice in found)
        return profile.coverage.points - before, [choice.loss for choice in found if isinstance(choice, Choice)]

    one, (loss,) = points(0.5, together=False)
    other, (less,) = points(0.55, together=False)
    both, losses = points(0.5, 0.55, together=False)
    assert 0 < both < one + other and losses == pytest.approx([loss, less])
    assert points(0.5, 0.5, 0.5, together=True) == (one, pytest.approx([loss] * 3))
    assert points(0.5, 0.55, together=True)[1] == pytest.approx([loss, less])


def test_a_second_solution_of_the_same_problem_measures_nothing() -> None:
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, chain([26, 20, 28], batch="N"))
    solve = within(random_losses(profile.latency, np.random.default_rng(1)), 0.5 * profile.latency.dense_ms())
    first, built = solve_by_need(profile, solve), runner.built
    second = solve_by_need(profile, solve)
    assert runner.built == built
    assert (second.widths, second.promised_ms) == (first.widths, first.promised_ms)


def test_what_cannot_be_reached_is_said_and_stops_no_one_else() -> None:
    profile = profiled(FakeRunner(staircase(8)), chain([26, 20, 28], batch="N"))
    losses = random_losses(profile.latency, np.random.default_rng(1))
    dense_ms = profile.latency.dense_ms()

    def least(latency: LatencyModel, near: Mapping[str, int] | None) -> Choice:
        return least_ms(latency)

    none, some, quickest = by_need(profile, [within(losses, 1e-3 * dense_ms), within(losses, 0.6 * dense_ms), least])
    assert isinstance(none, Unreachable) and isinstance(some, Choice) and isinstance(quickest, Choice)
    assert profile.knows(some.widths) and profile.knows(quickest.widths)
    assert quickest.promised_ms < some.promised_ms <= 0.6 * dense_ms * (1 + 1e-6)
    with pytest.raises(Unreachable):
        solve_by_need(profile, within(losses, 0.9 * quickest.promised_ms))


def test_a_closed_profile_answers_by_estimates(tmp_path: Path) -> None:
    model, path = chain([26, 20, 28], batch="N"), tmp_path / "t.db"
    there = profiled(FakeRunner(staircase(8)), model, table=path)
    there.bench.table.close()
    before = path.read_bytes()
    profile = profile_known(model, path)
    assert not profile.open
    losses = random_losses(profile.latency, np.random.default_rng(1))
    target_ms = 0.5 * profile.latency.dense_ms()
    choice = solve_by_need(profile, within(losses, target_ms))
    assert choice.promised_ms == profile.latency.ms(choice.widths) <= target_ms * (1 + 1e-6)
    assert not profile.knows(choice.widths) and profile.latency.share_estimated(choice.widths) > 0.3
    # By the estimates, not by their bounds.
    assert profile.latency.hopeful().ms(choice.widths) < choice.promised_ms
    assert path.read_bytes() == before


def test_a_solver_that_never_settles_is_asked_so_often_and_no_more() -> None:
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, chain([64, 64, 64, 64, 64], batch="N"))
    plans = everything(profile.latency)
    rng, given_models = np.random.default_rng(0), []

    def restless(latency: LatencyModel, near: Mapping[str, int] | None) -> Choice:
        given_models.append(latency)
        unknown = [k for k in rng.integers(len(plans), size=50) if not profile.knows(plans[int(k)])]
        return Choice(plans[int(unknown[0])], 0.0, 0.0, 0.0, 0.0, 0.0)

    choice = solve_by_need(profile, restless)
    assert len(given_models) == ROUNDS + LAST
    assert profile.knows(choice.widths)
    assert choice.promised_ms == pytest.approx(runner.ms(build_engine(profile.partition, choice.widths)))
    # Bounds first, then the estimates themselves.
    assert all(term.bound is None for latency in given_models[:ROUNDS] for term in latency.terms)
    assert any(term.bound is not None for latency in given_models[ROUNDS:] for term in latency.terms)


def test_structures_are_chosen_by_need_as_well() -> None:
    """Ranks, a block and merged runs: what is chosen of them is measured, and its engine takes what is promised."""
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, skipping(24, 32), METHODS)
    losses = neutral_losses(profile.latency)
    before = profile.coverage.points
    kinds = set()
    for share in (0.8, 0.55, 0.4):
        choice = solve_by_need(profile, within(losses, share * profile.latency.dense_ms()))
        edits = chosen_edits(profile.options, choice.widths)
        kinds |= {kind for kind in ("factorizations", "drops", "merges") if getattr(edits, kind)}
        assert profile.knows(choice.widths) and choice.promised_ms <= share * profile.latency.dense_ms() * (1 + 1e-6)
    assert kinds and before < profile.coverage.points < profile.coverage.complete / 2


def test_a_walk_measures_plans_and_their_engines() -> None:
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, chain([26, 20, 28], batch="N"))
    walk(profile, ("filter",))
    engines = profile.bench.table.engines(profile.model_key)
    assert 3 <= len(engines) <= 2 + len(SHARES) and profile.latency.error["n"] == len(engines)
    assert all(profile.knows(widths) for widths, _ in engines)
    assert profile.latency.error["p95_abs_err"] < 1e-6
    least = min(m.ms for _, m in engines)
    assert least == pytest.approx(least_ms(profile.latency).promised_ms, rel=1e-6)
    built = runner.built
    walk(profile, ("filter",))
    assert runner.built == built


def test_neutral_losses() -> None:
    profile = profiled(FakeRunner(staircase(8)), skipping(24, 32), METHODS)
    model = profile.latency
    losses = neutral_losses(model)
    for site, values in losses.items():
        levels = model.levels[site]
        at = levels.index(model.dense[site])
        assert values[at] == 0.0 and (values >= 0).all() and len(values) == len(levels) > 1
        if site not in model.switches:
            assert (np.diff(values) < 0).all()
    assert set(losses) == {site for site, levels in model.levels.items() if len(levels) > 1}


def test_after_its_minutes_a_profile_measures_no_more_and_answers_by_estimates() -> None:
    runner = FakeRunner(staircase(8))
    profile = profiled(runner, chain([50, 36, 20], batch="N"), minutes=1e-9)
    model, built = profile.latency, runner.built
    assert profile.knows(model.dense) and model.dense_ms() == pytest.approx(runner.ms(profile.partition.model))
    assert not profile.open
    target = 0.5 * model.dense_ms()
    choice = solve_by_need(profile, lambda latency, near: decide(latency, neutral_losses(latency), target, near=near))
    walk(profile, ("filter",))
    assert runner.built == built and choice.promised_ms <= target * (1 + 1e-6)
    assert profile.latency.share_estimated(choice.widths) > 0.5
    # An engine that was measured all the same, to verify a plan, is learned.
    known = len(profile.bench.table.engines(profile.model_key))
    profile.learn(choice.widths, 0.5)
    assert len(profile.bench.table.engines(profile.model_key)) == known + 1


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_minutes_that_leave_no_time_are_refused(minutes: float) -> None:
    with pytest.raises(SluiceError, match="leave no time to measure"):
        profiled(FakeRunner(), chain([50, 36], batch="N"), minutes=minutes)


def cliff(into: int, out: int, rest: float) -> float:
    """Widths that leave a remainder of 16 take six times as long, so the law expects the next width to as well."""
    return 1e-6 * into * out * rest * (6.0 if into % 16 or out % 16 else 1.0)


def test_a_plan_behind_too_high_a_bound_is_found_where_it_is_a_step_away() -> None:
    found = {}
    for near in (False, True):
        profile = profiled(FakeRunner(cliff), chain([40, 56, 40], batch="N"))
        losses = random_losses(profile.latency, np.random.default_rng(5))
        target_ms = 0.3 * profile.latency.dense_ms()
        steps = (lambda latency, widths, losses=losses: steps_from(latency, losses, widths)) if near else None
        choice = solve_by_need(profile, within(losses, target_ms), steps)
        assert choice.promised_ms <= target_ms * (1 + 1e-6)
        found[near] = choice.loss, profile.coverage.points
    assert found[True][0] < 0.98 * found[False][0] and found[True][1] > found[False][1]


def test_a_program_is_solved_near_its_last_choice_and_everywhere_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lagrangian, "COMBINATIONS", 0)
    profile = profiled(FakeRunner(staircase(8)), chain([64, 64, 64], batch="N"))
    losses = random_losses(profile.latency, np.random.default_rng(1))
    target_ms = 0.4 * profile.latency.dense_ms()
    asked: list[bool] = []

    def solve(latency: LatencyModel, near: Mapping[str, int] | None) -> Choice:
        asked.append(near is not None)
        return decide(latency, losses, target_ms, gap=1e-9, near=near)

    choice = solve_by_need(profile, solve)
    assert not asked[0] and any(asked) and not asked[-1] and not choice.local
    asked.clear()
    (found,) = by_need(profile, [solve], rounds=0, near=[choice.widths])
    assert asked == [True] and isinstance(found, Choice) and found.local
