"""Both ways to solve against brute force, refusals, and the choice that is handed on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sluice.core.errors import SluiceError, Unreachable
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.solver import decide as decide_module
from sluice.solver import lagrangian, milp_axes
from sluice.solver.amplitude_losses import amplitude_losses
from sluice.solver.decide import Choice, decide, least_ms, restricted, tightened, unreachable
from sluice.solver.descent import downhill, loss_of


def term(rng: np.random.Generator, extents: list[Extent], dense: dict[str, int], name: str, points: int = 4) -> Term:
    """Random, not monotone, sometimes a joint; knots inside, at and beyond the reachable values."""
    knots = []
    for extent in extents:
        top = extent.at(dense)
        inner = rng.choice(np.arange(1, int(top * 1.3) + 2), size=min(points, int(top)), replace=False)
        knots.append(np.sort(inner).astype(float))
    ms = rng.uniform(0.1, 1.0, size=tuple(len(k) for k in knots))
    return Term(name, tuple(extents), tuple(knots), ms, float(rng.choice([1.0, 2.0, -0.4])))


def random_model(seed: int) -> LatencyModel:
    rng = np.random.default_rng(seed)
    dense = {"a": 7, "b": 9, "c": 5, "d": 11}
    levels = {
        g: (*sorted(rng.choice(np.arange(1, n), size=rng.integers(1, 4), replace=False).tolist()), n)
        for g, n in dense.items()
    }

    def one(group: str, coef: int = 1) -> Extent:
        return Extent(((group, coef),))

    shapes = [
        [],
        [one("a")],
        [one("a"), one("b")],
        [one("b", 3), one("c")],
        [one("c"), one("c")],
        [one("a"), one("b"), one("d")],
        [Extent((("a", 1), ("b", 1)), 2)],
        [Extent((("a", 1), ("b", 1), ("d", 2))), one("c")],
        [Extent((("b", 1), ("c", 1))), Extent((("b", 1), ("d", 1)), 1)],
        [Extent((("a", 1), ("c", 1), ("d", 1))), Extent((("b", 1), ("c", 2)))],
        [Extent((), 3), one("d")],
        [Extent((("a", 1), ("b", 1), ("c", 1), ("d", 1)))],
    ]
    terms = tuple(term(rng, s, dense, f"t{k}") for k, s in enumerate(shapes))
    return LatencyModel(terms, dense, levels, intercept=0.3, slope=1.1)


def brute(model: LatencyModel, importance: dict[str, np.ndarray]) -> list[tuple[float, float]]:
    """(ms, loss) of every combination of levels."""
    total = sum(float(np.sqrt(i).sum()) ** 2 for i in importance.values())
    out = []
    for combo in itertools.product(*(model.levels[g] for g in model.dense)):
        widths = dict(zip(model.dense, combo, strict=True))
        # What leaves a group together adds up in amplitude.
        lost = sum(
            float(np.sqrt(np.sort(importance[g])[: len(importance[g]) - w]).sum()) ** 2 for g, w in widths.items()
        )
        out.append((model.ms(widths), lost / total))
    return out


def decided(model: LatencyModel, importance: dict[str, np.ndarray], target: float, gap: float = 1e-3) -> Choice:
    return decide(model, amplitude_losses(model.levels, importance), target, gap=gap)


def importance_of(model: LatencyModel, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 1000)
    return {g: rng.gamma(0.5, size=n) for g, n in model.dense.items()}


def by_program(monkeypatch: pytest.MonkeyPatch, grid_limit: int = milp_axes.GRID_LIMIT) -> None:
    """Too many combinations for anything but the mixed-integer program."""
    monkeypatch.setattr(lagrangian, "COMBINATIONS", 0)
    monkeypatch.setattr(milp_axes, "GRID_LIMIT", grid_limit)


def without_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a mixed-integer program was solved")

    monkeypatch.setattr(decide_module, "solve", fail)


@pytest.mark.parametrize("seed", range(6))
def test_near_a_configuration_its_surroundings_are_searched(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all levels within the reach; everywhere, if these do not reach the target."""
    by_program(monkeypatch)
    monkeypatch.setattr(decide_module, "REACH", 1)
    monkeypatch.setattr(decide_module, "LOCAL_GAP", 1e-6)
    model, rng = random_model(seed), np.random.default_rng(seed)
    losses = amplitude_losses(model.levels, importance_of(model, seed))
    middle = {g: levels[len(levels) // 2] for g, levels in model.levels.items()}
    around = {
        g: [w for k, w in enumerate(levels) if abs(k - levels.index(middle[g])) <= 1]
        for g, levels in model.levels.items()
    }
    plans = [dict(zip(around, combo, strict=True)) for combo in itertools.product(*around.values())]
    target = float(rng.choice([model.ms(plan) for plan in plans]))
    best = min(
        sum(losses[g][model.levels[g].index(w)] for g, w in plan.items()) for plan in plans if model.ms(plan) <= target
    )
    choice = decide(model, losses, target, gap=1e-6, near=middle)
    assert choice.local and choice.loss == pytest.approx(best, rel=1e-5)
    everywhere = [
        model.ms(dict(zip(model.levels, combo, strict=True))) for combo in itertools.product(*model.levels.values())
    ]
    least = min(everywhere)
    if least < min(model.ms(plan) for plan in plans) * (1 - 1e-6):
        assert not decide(model, losses, least * (1 + 1e-9), near=middle).local
    with pytest.raises(Unreachable):
        decide(model, losses, 0.5 * least, near=middle)


@pytest.mark.parametrize("grid_limit", [None, 400, 40, 3])
@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed: int, grid_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program, and by one: a limit of 3 sends every joint term through interpolation."""
    if grid_limit is None:
        without_program(monkeypatch)
    else:
        by_program(monkeypatch, grid_limit)
    model = random_model(seed)
    importance = importance_of(model, seed)
    combos = brute(model, importance)
    fastest = min(ms for ms, _ in combos)
    slowest = max(ms for ms, _ in combos)
    for share in (0.02, 0.2, 0.5):
        target = fastest + share * (slowest - fastest)
        choice = decided(model, importance, target, gap=1e-6)
        best = min(lost for ms, lost in combos if ms <= target)
        assert choice.promised_ms == model.ms(choice.widths)
        assert choice.promised_ms <= target * (1 + 1e-6)
        assert choice.loss == pytest.approx(best, rel=1e-5)
        worst = max(lost for _, lost in combos)  # every group at its smallest level
        assert choice.retained == pytest.approx(1 - best / worst, rel=1e-5)


@pytest.mark.parametrize("grid_limit", [None, 400, 3])
@pytest.mark.parametrize("seed", range(4))
def test_least_equals_brute_force(seed: int, grid_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if grid_limit is None:
        without_program(monkeypatch)
    else:
        by_program(monkeypatch, grid_limit)
    model = random_model(seed)
    combos = brute(model, {g: np.ones(n) for g, n in model.dense.items()})
    least = least_ms(model)
    assert least.promised_ms == pytest.approx(min(ms for ms, _ in combos), rel=1e-6)
    assert decided(model, importance_of(model, seed), least.promised_ms).promised_ms <= least.promised_ms * (1 + 1e-6)


def test_staircase_is_not_undercut_by_a_secant() -> None:
    """Between the knots 4 and 20 the time bulges; an interpolation without adjacency would offer the secant."""
    dense = {"a": 8, "b": 8, "c": 8}
    levels = {g: (2, 4, 6, 8) for g in dense}
    knots = np.asarray([4.0, 6.0, 20.0, 24.0])
    bulge = Term("concat", (Extent((("a", 1), ("b", 1), ("c", 1))),), (knots,), np.asarray([1.0, 3.0, 3.0, 4.0]))
    model = LatencyModel((bulge,), dense, levels)
    importance = {g: np.ones(8) for g in dense}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milp_axes, "GRID_LIMIT", 3)
        choice = decided(model, importance, 3.0)
    assert sum(choice.widths.values()) == 20
    with pytest.raises(SluiceError, match="cannot be met"):
        decided(model, importance, 2.9)


def test_more_levels_than_knots_interpolates_without_binaries() -> None:
    rng = np.random.default_rng(3)
    dense = {"a": 31, "b": 29}
    levels = {g: tuple(range(1, n + 1)) for g, n in dense.items()}
    knots = (np.asarray([1.0, 9.0, 31.0]), np.asarray([3.0, 12.0, 20.0, 27.0]))
    pair = Term("pair", (Extent((("a", 1),)), Extent((("b", 1),))), knots, rng.uniform(0.2, 1.0, (3, 4)))
    model = LatencyModel((pair,), dense, levels)
    importance = importance_of(model, 3)
    combos = brute(model, importance)
    target = float(np.quantile([ms for ms, _ in combos], 0.1))
    choice = decided(model, importance, target, gap=1e-6)
    assert choice.loss == pytest.approx(min(lost for ms, lost in combos if ms <= target), rel=1e-5)


def line(milliseconds: tuple[float, float] = (1.0, 3.0)) -> LatencyModel:
    single = Term("conv", (Extent((("a", 1),)),), (np.asarray([2.0, 6.0]),), np.asarray(milliseconds))
    return LatencyModel((single,), {"a": 6, "b": 3}, {"a": (2, 4, 6), "b": (1, 3)})


def test_the_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(SluiceError) as caught:
        decided(line((1.4301, 3.49)), {"a": np.ones(6), "b": np.ones(3)}, 1.2)
    assert str(caught.value) == (
        "budget 1.20 ms cannot be met: filter gates alone reach 1.44 ms (41.0% of dense 3.49 ms); ask for at least that"
    )
    assert "0.0512 ms" in str(unreachable(0.0123, 0.05111, 0.1))
    assert "widths, ranks and depth together reach 0.0512 ms" in str(unreachable(0.0123, 0.05111, 0.1, structure=True))
    assert "met: dropped blocks alone reach" in str(unreachable(1.0, 2.0, 3.0, methods=["block"]))
    several = str(unreachable(1.0, 2.0, 3.0, methods=["filter", "rank", "merge"]))
    assert "met: widths, ranks and merged runs together reach" in several


def test_least_keeps_what_costs_nothing_and_dense_needs_no_solver() -> None:
    assert dict(least_ms(line()).widths) == {"a": 2, "b": 3}
    dense = decided(line(), {"a": np.ones(6), "b": np.ones(3)}, 3.0)
    assert dict(dense.widths) == {"a": 6, "b": 3}
    assert (dense.loss, dense.retained) == (0.0, 1.0)


def test_least_is_found_when_there_is_no_time_to_fill_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second program only chooses among equally fast configurations; the first must not be out of time."""
    by_program(monkeypatch)
    found, calls = decide_module.solve, [0]

    def out_of_time(*args: object) -> object:
        calls[0] += 1
        if calls[0] == failing:
            raise decide_module.OutOfTime("no configuration found in 20 s")
        return found(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(decide_module, "solve", out_of_time)
    failing = 2
    assert dict(least_ms(line()).widths) == {"a": 2, "b": 3}
    assert calls == [2]
    calls[0], failing = 0, 1
    with pytest.raises(SluiceError, match="no configuration found"):
        least_ms(line())


def test_where_the_program_finds_nothing_in_time_the_best_that_was_met_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gap that holds against brute force."""

    def out_of_time(*_: object) -> object:
        raise decide_module.OutOfTime("no configuration found in 20 s")

    monkeypatch.setattr(lagrangian, "LABELS", 0)
    monkeypatch.setattr(decide_module, "solve", out_of_time)
    unproved = 0
    for seed in range(8):
        model = random_model(seed)
        losses = amplitude_losses(model.levels, importance_of(model, seed))
        plans = [dict(zip(model.levels, combo, strict=True)) for combo in itertools.product(*model.levels.values())]
        target = float(np.quantile([model.ms(plan) for plan in plans], 0.3))
        best = min(loss_of(model, losses, plan) for plan in plans if model.ms(plan) <= target)
        choice = decide(model, losses, target, gap=1e-6)
        assert choice.promised_ms <= target * (1 + 1e-6)
        assert choice.loss * (1.0 - choice.gap) <= best * (1 + 1e-6) <= choice.loss * (1 + 1e-5)
        unproved += choice.gap > 1e-6
    assert unproved > 3


def test_kept_takes_the_largest_and_the_first_of_equals() -> None:
    importance = {"a": np.asarray([0.0, 5.0, 1.0, 1.0, 7.0, 1.0]), "b": np.asarray([1.0, 1.0, 1.0])}
    choice = decided(line(), importance, 2.0)
    assert dict(choice.widths) == {"a": 4, "b": 3}
    assert choice.kept(importance) == {"a": (1, 2, 3, 4), "b": (0, 1, 2)}
    assert choice.kept({"b": importance["b"]}) == {"b": (0, 1, 2)}


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"a": np.ones(6)}, "no importance given for group 'b'"),
        ({"a": np.ones(5), "b": np.ones(3)}, r"has shape \(5,\); it must be \(6,\)"),
        ({"a": -np.ones(6), "b": np.ones(3)}, "negative or not finite"),
        ({"a": np.full(6, np.nan), "b": np.ones(3)}, "negative or not finite"),
        ({"a": np.zeros(6), "b": np.zeros(3)}, "zero in all of 2 groups"),
    ],
)
def test_wrong_importance_is_refused(importance: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(SluiceError, match=message):
        decided(line(), importance, 2.0)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"c": np.zeros(3)}, "losses are given for 'c', which is no site of the model"),
        ({"a": np.zeros(2)}, r"losses of site 'a' have shape \(2,\); give one per level, \(3,\)"),
        ({"a": np.asarray([1.0, -0.1, 0.0])}, "losses of site 'a' are negative or not finite"),
        ({"a": np.asarray([np.inf, 0.1, 0.0])}, "losses of site 'a' are negative or not finite"),
    ],
)
def test_wrong_losses_are_refused(losses: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(SluiceError, match=message):
        decide(line(), losses, 2.0)
    with pytest.raises(SluiceError, match="finite number of milliseconds"):
        decide(line(), {}, float("nan"))


def test_losses_may_have_any_unit() -> None:
    for unit in (1e-9, 1.0, 1e9):
        choice = decide(line(), {"a": unit * np.asarray([0.7, 0.2, 0.0])}, 2.0)
        assert dict(choice.widths) == {"a": 4, "b": 3}
        assert (choice.loss, choice.retained) == (pytest.approx(0.2 * unit), pytest.approx(1 - 0.2 / 0.7))


def test_restricted_keeps_other_groups_dense() -> None:
    model = restricted(line(), frozenset({"b"}))
    assert model.levels == {"a": (6,), "b": (1, 3)}
    assert least_ms(model).promised_ms == 3.0
    assert replace(model, levels=line().levels).dense_ms() == line().dense_ms()


def test_no_move_leads_to_a_state_that_is_shut() -> None:
    """A layer whose dense state a narrowed model does not have stays factorised, however cheap dense were."""
    switches = {"dense": 1, "low": 0}
    terms = tuple(Term(name, (), (), np.asarray(1.0), when=frozenset([name])) for name in switches)
    rule = Rule((("dense", 1), ("low", 1)))
    whole = LatencyModel(terms, switches, dict.fromkeys(switches, (0, 1)), rules=(rule,), switches=frozenset(switches))
    factorised, losses = {"dense": 0, "low": 1}, {"low": np.asarray([0.0, 1.0])}
    assert downhill(whole, losses, factorised, 9.0) == switches
    shut = replace(whole, levels={"dense": (0,), "low": (1,)})
    assert downhill(shut, {"low": np.asarray([1.0])}, factorised, 9.0) == factorised


def test_an_algorithm_that_adds_up_is_asked_for_what_it_missed() -> None:
    """It believes that a millisecond less is asked for than is saved in the end: beyond 6 ms half of it is spared."""
    asked: list[float] = []

    def solve(target_ms: float) -> Choice:
        asked.append(target_ms)
        if target_ms < 3.0:
            raise unreachable(target_ms, 3.0, 10.0)
        return Choice({}, max(target_ms, 6.0 - 0.5 * (6.0 - target_ms)), 0.0, 1.0, 0.0, 0.0)

    assert tightened(7.0, solve).promised_ms == 7.0 and asked == [7.0]
    assert tightened(5.0, solve).promised_ms <= 5.0 and asked[-1] == pytest.approx(4.0)
    assert tightened(4.0, solve).promised_ms == 5.0  # nothing below 4.5 is in reach: what there was
    with pytest.raises(Unreachable):
        tightened(2.0, solve)
