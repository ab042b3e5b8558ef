"""A problem measures what its plans use, and no more; what one budget measured serves the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sluice.core.deployment import Deployment
from sluice.core.errors import Unreachable
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.pipeline.problem import Problem
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.profile import profile_known, profile_onnx
from sluice.profiler.view import Profile
from sluice.solver.amplitude_losses import amplitude_losses
from tests.device import FakeRunner, chain, profile_on, staircase

DENSE = chain([36, 28, 20], batch="N")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    one = FakeRunner(staircase(8))
    profile_on(lambda target, threads=1: one, monkeypatch)
    return one


def profiled(table: Path | str = ":memory:", complete: bool = False) -> Profile:
    return profile_onnx(DENSE, table, deployment=Deployment(batch=2), complete=complete, progress=False)


def problem_of(profile: Profile) -> Problem:
    rng, latency = np.random.default_rng(0), profile.latency
    scores = {g: rng.uniform(0.1, 1.0, n) for g, n in latency.dense.items()}
    losses = amplitude_losses(latency.levels, scores)
    return Problem(profile, analyze_onnx(DENSE), frozenset(latency.dense), losses, scores)


def points(profile: Profile) -> int:
    return profile.coverage.points


def test_only_what_plans_use_is_measured(runner: FakeRunner) -> None:
    profile = profiled()
    problem, before = problem_of(profile), points(profile)
    choice = problem.solve(0.6 * profile.latency.dense_ms()).choice
    assert profile.knows(choice.widths) and profile.latency.share_estimated(choice.widths) == 0.0
    assert before < points(profile) < profile.coverage.complete / 2
    # Where times add up, what is measured is what the engine takes.
    assert choice.promised_ms == pytest.approx(runner.ms(build_engine(profile.partition, choice.widths)), rel=1e-6)


def test_the_plan_is_as_good_as_that_of_a_complete_table(runner: FakeRunner) -> None:
    few, all_points = problem_of(profiled()), problem_of(profiled(complete=True))
    for share in (0.75, 0.5, 0.3):
        target = share * few.profile.latency.dense_ms()
        found, best = few.solve(target).choice, all_points.solve(target).choice
        assert found.promised_ms <= target * (1 + 1e-6)
        assert found.loss <= 1.02 * best.loss + 1e-9
    assert points(few.profile) < points(all_points.profile)


def test_what_one_budget_measured_serves_the_next(runner: FakeRunner) -> None:
    profile = profiled()
    problem, dense = problem_of(profile), profile.latency.dense_ms()
    first = problem.solve(0.5 * dense)
    built = runner.built
    again = problem.solve(0.5 * dense)
    assert runner.built == built and again.plan == first.plan
    before = points(profile)
    for share in (0.51, 0.49):  # which ask for little more
        problem.solve(share * dense)
    assert points(profile) - before < before / 2


def test_a_table_keeps_what_was_asked_for(runner: FakeRunner, tmp_path: Path) -> None:
    profile = profiled(tmp_path / "t.db")
    target = 0.6 * profile.latency.dense_ms()
    first = problem_of(profile).solve(target)
    profile.bench.table.close()
    built = runner.built
    assert problem_of(profiled(tmp_path / "t.db")).solve(target).plan == first.plan and runner.built == built


def test_the_least_is_measured_where_it_matters(runner: FakeRunner) -> None:
    profile = profiled()
    problem, dense = problem_of(profile), profile.latency.dense_ms()
    built = runner.built
    assert problem.least_from(10 * dense) < dense and runner.built == built  # an estimate is enough
    least = problem.least_from(0.0)
    assert runner.built > built
    choice = problem.solve(least * (1 + 1e-6)).choice
    assert profile.knows(choice.widths) and choice.promised_ms == pytest.approx(least)
    with pytest.raises(Unreachable, match="cannot be met"):
        problem.solve(0.9 * least)


def test_sites_that_are_not_free_stay_dense(runner: FakeRunner) -> None:
    whole = problem_of(profiled())
    problem = replace(whole, sites=frozenset({"conv1"}))
    dense = whole.profile.latency.dense
    widths = problem.solve(0.9 * whole.profile.latency.dense_ms()).choice.widths
    assert widths["conv1"] < dense["conv1"] and {g for g in dense if widths[g] < dense[g]} == {"conv1"}
    assert all(len(levels) == 1 for g, levels in problem.model.levels.items() if g != "conv1")


def test_where_nothing_can_be_measured_the_rest_is_estimated(runner: FakeRunner, tmp_path: Path) -> None:
    profiled(tmp_path / "t.db").bench.table.close()
    built = runner.built
    known = profile_known(DENSE, tmp_path / "t.db")
    target = 0.6 * known.latency.dense_ms()
    choice = problem_of(known).solve(target).choice
    assert runner.built == built and not known.open
    assert choice.promised_ms <= target * (1 + 1e-6) and 0.0 < known.latency.share_estimated(choice.widths) <= 1.0
    true_ms = runner.ms(build_engine(known.partition, choice.widths))
    assert choice.promised_ms == pytest.approx(true_ms, rel=0.5)
