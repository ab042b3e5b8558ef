"""Switches, ranks and rules, by both ways to solve, against brute force over every configuration within the rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.solver import decide as decide_module
from sluice.solver import lagrangian, milp_axes
from sluice.solver.decide import decide, least_ms, restricted
from sluice.solver.milp import MixedIntegerProgram

DENSE = {"a": 7, "b": 9, "c": 5, "rank": 6}
SWITCHES = {"dense A": 1, "dense B": 1, "factorized A": 0, "dropped": 0, "merged": 0, "never": 0, "both": 1}
RULES = (
    Rule((("dense A", 1), ("factorized A", 1), ("dropped", 1), ("merged", 1), ("never", 1))),
    Rule((("dense B", 1), ("dropped", 1), ("merged", 1))),
    Rule((("both", 1), ("dense A", -1), ("factorized A", 1), ("never", 1)), 0),  # both dense
)
WHEN = (
    (),
    ("dense A",),
    ("factorized A",),
    ("merged",),
    ("dense A", "factorized A"),
    ("dropped", "merged"),
    ("dense B", "dropped", "merged"),  # always one of these
    ("never",),
    ("never", "dense B"),
    ("both",),
)


def one(group: str, coef: int = 1, const: int = 0) -> Extent:
    return Extent(((group, coef),), const)


SHAPES = (
    (),
    (one("a"),),
    (one("a"), one("b")),
    (one("b"), one("a")),
    (one("c", 2, 1),),
    (one("c"), one("c")),
    (one("a"), one("rank")),
    (one("rank"), one("b")),
    (Extent((("a", 1), ("b", 1))), one("c")),
    (Extent((("a", 1), ("c", 1))), Extent((("b", 1), ("c", 1)))),
)


def random_model(seed: int) -> LatencyModel:
    """Every shape under some switches, every set of switches over some shape, on random knots; a fifth are joints."""
    rng = np.random.default_rng(seed)
    levels: dict[str, tuple[int, ...]] = {
        g: (*sorted(rng.choice(np.arange(1, n), size=2, replace=False).tolist()), n) for g, n in DENSE.items()
    }
    levels |= {s: (0, 1) for s in SWITCHES} | {"never": (0,)}
    pairs = [(SHAPES[k % len(SHAPES)], WHEN[w]) for w in range(len(WHEN)) for k in rng.permutation(len(SHAPES))[:2]]
    pairs += [(shape, WHEN[rng.integers(len(WHEN))]) for shape in SHAPES]
    # A joint under three states, of which one makes the tensor by a product and one by a product over another axis.
    pairs += [((one("a"), one("b")), ("dense A",)), ((one("a"), one("c")), ("merged",))]
    pairs += [((one("b"),), ("dense A", "factorized A", "merged"))]
    terms = []
    for number, (extents, when) in enumerate(pairs):
        knots = tuple(np.sort(rng.choice(np.arange(1, 18), size=3, replace=False)).astype(float) for _ in extents)
        ms = rng.uniform(0.1, 1.0, size=(3,) * len(extents))
        terms.append(Term(f"t{number}", extents, knots, ms, float(rng.choice([1.0, 1.0, 2.0, 1.0, -0.6])), when))
    switches = frozenset(SWITCHES)
    return LatencyModel(tuple(terms), DENSE | SWITCHES, levels, 0.2, 1.3, rules=RULES, switches=switches)


def reading_again(model: LatencyModel, seed: int, share: float = 0.5) -> LatencyModel:
    """Half of the terms that are no joints are read again; the caches spare ``share`` of what that is in dense."""
    rng = np.random.default_rng(seed + 2000)
    terms = tuple(
        replace(t, reload=rng.uniform(0.0, 1.5, np.shape(t.ms))) if t.weight > 0 and rng.random() < 0.5 else t
        for t in model.terms
    )
    heavy = replace(model, terms=terms)
    return replace(heavy, cached_ms=share * heavy.reload_ms(model.dense))


def configurations(model: LatencyModel) -> Iterator[dict[str, int]]:
    """Every combination of levels that obeys the rules; switches first, most of their combinations do not."""
    sites = sorted(model.dense, key=lambda g: g not in model.switches)
    switches = [s for s in sites if s in model.switches]
    for states in itertools.product(*(model.levels[s] for s in switches)):
        state = dict(zip(switches, states, strict=True))
        if all(rule.holds(state) for rule in model.rules):
            rest = sites[len(switches) :]
            for widths in itertools.product(*(model.levels[g] for g in rest)):
                yield state | dict(zip(rest, widths, strict=True))


def random_losses(model: LatencyModel, seed: int) -> dict[str, np.ndarray]:
    """Falling with the width, of altered switches anything; nothing is said of one site."""
    rng = np.random.default_rng(seed + 1000)
    losses = {g: np.sort(rng.gamma(0.5, size=len(model.levels[g])))[::-1] for g in DENSE}
    for group in losses:
        losses[group][-1] = 0.0
    for switch, dense in SWITCHES.items():
        losses[switch] = np.where(np.asarray(model.levels[switch]) == dense, 0.0, rng.gamma(0.5))
    del losses["dense A"]
    return losses


def loss_of(model: LatencyModel, losses: dict[str, np.ndarray], widths: dict[str, int]) -> float:
    return float(sum(loss[model.levels[g].index(widths[g])] for g, loss in losses.items()))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("grid_limit", [None, 400, 3])
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force(seed: int, grid_limit: int | None, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program, where all rules are of one kind, and by one; a limit of 3 sends products through knots."""
    model = reading_again(random_model(seed), seed, 0.3 + 0.1 * seed) if again else random_model(seed)
    if grid_limit is None:
        model = replace(model, rules=RULES[:2])
        # Where the cache penalty makes the fewest milliseconds a program, the least loss still is none.
        monkeypatch.setattr(decide_module, "_least_loss", None)
    else:
        monkeypatch.setattr(lagrangian, "COMBINATIONS", 0)
        monkeypatch.setattr(milp_axes, "GRID_LIMIT", grid_limit)
    losses = random_losses(model, seed)
    every = [(model.ms(w), loss_of(model, losses, w)) for w in configurations(model)]
    fastest = min(ms for ms, _ in every)
    # No losses at all make the dense network the best; the target must lie below what it takes.
    dense_ms = model.dense_ms()
    for share in (0.0, 0.3, 0.7):
        target = fastest + share * (dense_ms - fastest) * 0.999
        choice = decide(model, losses, target + 1e-9, gap=1e-6)
        best = min(lost for ms, lost in every if ms <= target + 1e-9)
        assert all(rule.holds(choice.widths) for rule in model.rules)
        assert choice.promised_ms == model.ms(choice.widths) <= target * (1 + 1e-6)
        assert choice.loss == loss_of(model, losses, dict(choice.widths)) == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert 0.0 <= choice.retained <= 1.0
    assert least_ms(model).promised_ms == pytest.approx(fastest, rel=1e-6)
    if not (again and grid_limit is None):
        with pytest.raises(SluiceError, match="widths, ranks and depth together reach"):
            decide(model, losses, fastest * 0.99)


@pytest.mark.parametrize("labels", [0, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_that_is_too_long_leaves_few_levels_to_a_program(
    seed: int, labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(random_model(seed), rules=RULES[:2])
    losses = random_losses(model, seed)
    every = [(model.ms(w), loss_of(model, losses, w)) for w in configurations(model)]
    monkeypatch.setattr(lagrangian, "LABELS", labels)
    fewer, program = [], decide_module.MixedIntegerProgram

    def counted(left: LatencyModel) -> MixedIntegerProgram:
        fewer.append(sum(map(len, left.levels.values())) < sum(map(len, model.levels.values())))
        return program(left)

    monkeypatch.setattr(decide_module, "MixedIntegerProgram", counted)
    dense_ms, fastest = model.dense_ms(), min(ms for ms, _ in every)
    for share in (0.3, 0.7):
        target = fastest + share * (dense_ms - fastest)
        choice = decide(model, losses, target, gap=1e-6)
        assert choice.loss == pytest.approx(min(lost for ms, lost in every if ms <= target), rel=1e-5, abs=1e-6)
    assert all(fewer)
    assert fewer or labels


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_cost_of_a_configuration_is_what_the_model_says(seed: int, share: float | None) -> None:
    """With every site fixed the program has one solution, at any of which its cost is the model's."""
    model = random_model(seed) if share is None else reading_again(random_model(seed), seed, share)
    rng = np.random.default_rng(seed)
    every = list(configurations(model))
    for k in rng.choice(len(every), size=6, replace=False):
        fixed = replace(model, levels={g: (w,) for g, w in every[k].items()})
        assert least_ms(fixed).promised_ms == pytest.approx(model.ms(every[k]), rel=1e-9)
        assert dict(least_ms(fixed).widths) == every[k]


def test_configurations_lie_on_both_sides_of_what_the_caches_hold() -> None:
    """What the comparison above says of the hinge it says of both."""
    model = reading_again(random_model(0), 0, 0.9)
    again = [model.reload_ms(widths) for widths in itertools.islice(configurations(model), 0, None, 97)]
    assert min(again) == 0.0 < max(again)


def test_what_is_always_read_again_is_a_constant() -> None:
    width, knots = one("a"), np.asarray([1.0, 7.0])
    terms = (
        Term("plain", (width,), (knots,), np.asarray([1.0, 7.0])),
        Term("heavy", (), (), np.asarray(2.0), reload=np.asarray(1.5)),
    )
    model = LatencyModel(terms, {"a": 7}, {"a": (1, 4, 7)}, cached_ms=0.5)
    assert least_ms(model).promised_ms == 1.0 + 2.0 + 1.0
    assert dict(decide(model, {"a": np.asarray([2.0, 1.0, 0.0])}, 7.1).widths) == {"a": 4}


def test_an_inactive_term_costs_nothing_and_needs_no_width() -> None:
    """Factorized is dear or, with its joint, cheap; dense knows nothing of it, and the rank stays at no loss."""
    rank, width = one("rank"), one("a")
    knots = (np.asarray([1.0, 6.0]), np.asarray([2.0, 7.0]))
    terms = (
        Term("dense", (width,), (knots[1],), np.asarray([1.0, 2.0]), 1.0, ("dense A",)),
        Term("first", (rank, width), knots, np.full((2, 2), 50.0), 1.0, ("factorized A",)),
        Term("joint", (width,), (knots[1],), np.asarray([-30.0, -40.0]), 1.0, ("factorized A",)),
    )
    levels = {"a": (2, 7), "rank": (1, 6), "dense A": (0, 1), "factorized A": (0, 1)}
    dense = {"a": 7, "rank": 6, "dense A": 1, "factorized A": 0}
    rules = (Rule((("dense A", 1), ("factorized A", 1))),)
    model = LatencyModel(terms, dense, levels, rules=rules, switches=frozenset(("dense A", "factorized A")))
    choice = decide(model, {"rank": np.asarray([3.0, 0.0]), "a": np.asarray([1.0, 0.0])}, 1.5)
    assert dict(choice.widths) == {"a": 2, "rank": 6, "dense A": 1, "factorized A": 0}
    assert choice.promised_ms == 1.0
    assert dict(least_ms(model).widths) == {"a": 2, "rank": 6, "dense A": 1, "factorized A": 0}
    cheap = replace(model, terms=(*model.terms[:2], replace(model.terms[2], ms=np.asarray([-30.0, -49.5]))))
    assert cheap.dense_ms() == 2.0
    assert dict(decide(cheap, {"a": np.asarray([1.0, 0.0])}, 0.9).widths)["factorized A"] == 1


def test_of_equal_losses_the_one_with_fewer_edits() -> None:
    """Both layers gain from a factorization of their own; one merge does as much."""
    names = ("dense A", "dense B", "factorized A", "factorized B", "merged")
    ms = (2.0, 2.0, 1.0, 1.0, 2.0)
    terms = tuple(Term(s, (), (), np.asarray(v), 1.0, (s,)) for s, v in zip(names, ms, strict=True))
    rules = tuple(Rule(((f"dense {x}", 1), (f"factorized {x}", 1), ("merged", 1))) for x in "AB")
    dense = {s: int(s.startswith("dense")) for s in names}
    model = LatencyModel(terms, dense, {s: (0, 1) for s in names}, rules=rules, switches=frozenset(names))
    assert decide(model, {}, 2.0).widths["merged"] == 1
    assert least_ms(model).widths["merged"] == 1
    alike = replace(model, terms=tuple(replace(t, ms=np.asarray(2.0 if t.name == "merged" else 1.0)) for t in terms))
    assert least_ms(alike).widths == dense
    single = decide(model, {}, 3.0)
    assert sum(v != dense[s] for s, v in single.widths.items()) == 2  # one layer's two switches
    assert decide(model, {}, 4.0).widths == dense
    # A gap as wide as this lets the solver stop anywhere; what is altered in vain is turned back all the same.
    losses = {s: np.asarray([0.0, 1e-3]) for s in ("factorized A", "factorized B", "merged")}
    assert decide(model, losses, 3.0, gap=10.0).loss == pytest.approx(1e-3)


def test_restricted_leaves_other_switches_dense() -> None:
    model = random_model(0)
    losses = random_losses(model, 0)
    only = restricted(model, frozenset(("a", "b")))
    assert {only.levels[s] for s in model.switches} == {(0,), (1,)}
    every = [(only.ms(w), w) for w in configurations(only)]
    assert least_ms(only).promised_ms == pytest.approx(min(ms for ms, _ in every), rel=1e-9)
    structure = restricted(model, frozenset(SWITCHES))
    fastest = min(model.ms(w) for w in configurations(structure))
    assert least_ms(structure).promised_ms == pytest.approx(fastest, rel=1e-9)
    kept = {g: loss for g, loss in losses.items() if g in SWITCHES and len(structure.levels[g]) == len(loss)}
    choice = decide(structure, kept, (fastest + model.dense_ms()) / 2)
    assert all(rule.holds(choice.widths) for rule in model.rules)
    assert {g: choice.widths[g] for g in DENSE} == DENSE


def test_equal_terms_share_columns() -> None:
    model = random_model(1)
    pair = next(t for t in model.terms if len(t.extents) == 2 and len(t.when) == 1 and t.when[0] != "never")
    (switch,) = pair.when
    moved = replace(pair, name="other", extents=pair.extents[::-1], knots=pair.knots[::-1], ms=2 * pair.ms.T)
    alone = replace(pair, name="joint", extents=pair.extents[:1], knots=pair.knots[:1], ms=pair.ms[:, 0], weight=-1.0)
    before = MixedIntegerProgram(replace(model, terms=(pair,)))
    after = MixedIntegerProgram(replace(model, terms=(pair, moved, alone)))
    assert len(after.cost) == len(before.cost)
    assert len(after.rows().lb) == len(before.rows().lb)
    assert not np.allclose(after.cost, before.cost)
    # A joint under two states of the layer joins the one product and needs columns under the other only.
    second = next(s for s in ("dense A", "factorized A") if s != switch)
    both = MixedIntegerProgram(replace(model, terms=(pair, replace(alone, when=(switch, second)))))
    assert len(both.cost) == len(before.cost) + len(model.levels[pair.extents[0].coefs[0][0]])
