"""Ranks, dropped blocks and merged runs on a simulated device, whose engines take the sum of their operators' times:
what is promised of a configuration must be what its engine takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.latency import LatencyModel
from sluice.models import enliven
from sluice.models.mobilenet import InvertedResidual
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.onnx_file import buffers_of, note_buffers
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.alternatives import PAYS, find_alternatives
from sluice.profiler.fit.cost_law import Estimate, Known
from sluice.profiler.pieces.engine import build_engine, with_ranks_in_reach
from sluice.profiler.pieces.net_time import dense_points
from sluice.profiler.pieces.partition import Partition, Piece, anchor_weight, partition_static, static_at
from sluice.profiler.pieces.variants import Alternatives
from sluice.profiler.pieces.work import work_of
from sluice.profiler.sweep.bench import AT_ONCE
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close
from sluice.solver.options import METHODS, chosen_edits
from sluice.solver.random_configurations import random_configuration
from tests.device import FakeRunner, line, staircase
from tests.networks import mixed
from tests.passes.cut.test_square import skeleton
from tests.profiler import on_device

EIGHT = staircase(8)
ADD_MS = 1e-6 * 2 * 5 * 4  # of one channel behind the projection, at a batch of two


class Bottlenecks(nn.Module):
    """Expansion, depthwise, projection; the second and third with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.body = nn.Sequential(
            *(InvertedResidual(a, b, s, 2) for a, b, s in [(11, 17, 2), (17, 17, 1), (17, 17, 1)])
        )
        self.last, self.fc = nn.Conv2d(17, 13, 1), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(self.body(F.relu(self.stem(x))))).mean((2, 3)))


@functools.cache
def dense() -> onnx.ModelProto:
    return to_onnx(*mixed())


def profiled(
    runner: FakeRunner, methods: Sequence[str] = METHODS, model: onnx.ModelProto | None = None, **options: object
) -> Profile:
    return on_device.profiled(runner, model or dense(), methods, **options)


@functools.cache
def eight() -> Profile:
    return profiled(FakeRunner(EIGHT))


def engine_ms(profile: Profile, configuration: Mapping[str, int], cost: object = EIGHT) -> float:
    return FakeRunner(cost).ms(build_engine(profile.partition, configuration, profile.options))  # type: ignore[arg-type]


def drawn(profile: Profile, count: int) -> list[dict[str, int]]:
    rng = np.random.default_rng(3)
    plans = [random_configuration(profile.latency, rng) for _ in range(count)]
    return [with_ranks_in_reach(profile.partition, profile.latency, plan, profile.options) for plan in plans]


def switched(model: LatencyModel, *chosen: str) -> dict[str, int]:
    """The dense configuration but for these switches."""
    layers = {n for rule in model.rules if set(chosen) & dict(rule.coefs).keys() for n, _ in rule.coefs}
    return {**model.dense, **dict.fromkeys(layers, 0), **dict.fromkeys(chosen, 1)}


def leaving(model: LatencyModel) -> list[str]:
    return sorted(s for s in model.switches if not s.endswith("|dense"))


def check_promises(profile: Profile, plans: Sequence[Mapping[str, int]]) -> None:
    """Exact, but for the addition of a dropped block with projection: it stays with the projection, which stays."""
    profile.ask(plans)
    assert all(map(profile.knows, plans))
    promised = [profile.latency.raw_ms(plan) - ADD_MS * plan["block2.conv2"] * plan["block2|drop"] for plan in plans]
    assert_close(promised, [engine_ms(profile, plan) for plan in plans], tol=1e-9)


def test_every_kind_of_option_is_offered() -> None:
    options = eight().options
    assert {o.form for o in options.ranks} == {"kxk-1x1", "1x1-kxk", "kx1-1xk"}
    assert set(options.drops) == {"block1|drop", "block2|drop", "block3|drop"}
    assert {len(merge.layers) for merge in options.merges.values()} == {2, 3, 4}
    assert {s.rpartition(" ")[2] for s in options.merges} >= {"3x3", "5x5"}
    assert any(len([n for run in m.runs for n in run]) < len(m.layers) for m in options.merges.values())


def test_the_promise_of_any_configuration_is_what_its_engine_takes() -> None:
    plans = drawn(eight(), 60)
    edits = [chosen_edits(eight().options, plan) for plan in plans]
    for kind in ("factorizations", "drops", "merges"):
        assert sum(bool(getattr(edit, kind)) for edit in edits) > 5, kind
    check_promises(eight(), plans)


def test_the_promise_of_every_single_option_is_what_its_engine_takes() -> None:
    model = eight().latency
    plans = [switched(model, switch) for switch in leaving(model)]
    ranks = {o.switch: o.rank for o in eight().options.ranks}
    plans += [{**p, r: v} for s, r in ranks.items() for v in model.levels[r] if (p := switched(model, s))]
    check_promises(eight(), plans)


def test_merged_runs_that_begin_with_a_depthwise_convolution() -> None:
    """The channels that it shares with the layer in front are the merged run's input, and are cut like any."""
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    profile = profiled(FakeRunner(EIGHT), model=to_onnx(enliven(Bottlenecks(), 0, (x,)), x))
    model = profile.latency
    depthwise = [s for s in leaving(model) if s.startswith("body.1.conv.3.weight..body.1.conv.6.weight|merge")]
    assert {s.rpartition(" ")[2] for s in depthwise} == {"1x1", "3x3"}
    plans = [{**plan, **switched(model, switch), **widths_of(profile, plan)}
             for switch in depthwise for plan in drawn(profile, 6)]  # fmt: skip
    plans += drawn(profile, 25)
    profile.ask(plans)
    model = profile.latency
    assert_close([model.raw_ms(plan) for plan in plans], [engine_ms(profile, plan) for plan in plans], tol=1e-9)


def test_an_engine_makes_one_call_whatever_is_in_it() -> None:
    """Residual blocks close rings of pieces; dropped, merged and factorised ones have fewer or more in them."""
    call_ms = 0.02
    profile = profiled(FakeRunner(EIGHT, slower=lambda ms: ms + call_ms))
    check_promises(profile, drawn(profile, 40))
    assert profile.latency.intercept == pytest.approx(call_ms, rel=0.02)


def test_what_is_offered_does_not_depend_on_what_a_call_costs() -> None:
    """A factorised layer is two pieces and a merged run one, timed with a call each; an engine makes one in all."""
    slow = profiled(FakeRunner(EIGHT, slower=lambda ms: ms + 0.5 * eight().latency.dense_ms()))
    assert leaving(slow.latency) == leaving(eight().latency)


def widths_of(profile: Profile, plan: Mapping[str, int]) -> dict[str, int]:
    return {group: plan[group] for group in profile.partition.dense}


def test_calibration_finds_nothing_to_mend() -> None:
    """Engines of all kinds of structure, whose points are measured."""
    profile = profiled(FakeRunner(EIGHT))
    plans = [plan for plan in drawn(profile, 16) if not plan["block2|drop"]]
    profile.ask(plans)
    profile.time_engines(plans)
    model = profile.latency
    assert model.slope == pytest.approx(1.0, abs=2e-3) and model.intercept == pytest.approx(0.0, abs=2e-3)
    assert model.error["p95_abs_err"] < 2e-3 and model.error["n"] > 8


def test_a_narrowed_weight_has_no_more_ranks_than_its_smaller_side() -> None:
    """Beyond that the engine takes less than promised; the configuration in reach is the one that is built."""
    profile, rng = eight(), np.random.default_rng(4)
    plans = [random_configuration(profile.latency, rng) for _ in range(40)]
    reached = [with_ranks_in_reach(profile.partition, profile.latency, plan, profile.options) for plan in plans]
    profile.ask([*plans, *reached])
    model, changed = profile.latency, 0
    for plan, near in zip(plans, reached, strict=True):
        assert all(near[site] in levels for site, levels in model.levels.items())
        assert {s: near[s] for s in near if near[s] != plan[s]}.keys() <= {o.rank for o in profile.options.ranks}
        built, promised = engine_ms(profile, plan), model.raw_ms(plan)
        assert promised >= built * (1 - 1e-9)
        # Levels are multiples of four, kernels have steps of eight.
        changed += near != plan and promised > built * (1 + 1e-6)
    assert changed > 1
    check_promises(profile, reached)


def test_what_was_asked_makes_estimates_of_other_structures_better() -> None:
    profile = profiled(FakeRunner(line))
    plans = drawn(profile, 60)

    def missed() -> float:
        promised = [profile.latency.raw_ms(plan) for plan in plans[30:]]
        return float(np.median(np.abs(np.array(promised) / [engine_ms(profile, p, line) for p in plans[30:]] - 1)))

    before = missed()
    profile.ask(plans[:30])
    assert missed() < 0.6 * before < 0.2 and missed() < 0.05


class ByWork:
    """A law without a doubt: every piece takes its multiply-accumulates, ``factor`` times as long as dense pieces."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def estimate(self, known: Known, points: np.ndarray) -> Estimate:
        ms = self.factor * known.work.at(points)[0]
        return Estimate(ms, ms, np.zeros(len(points), bool))


def offered_by(factor: float) -> tuple[Partition, Alternatives]:
    static = static_at(dense(), 2)
    space = find_search_space(read_onnx(static), ())
    cut = partition_static(static, space.analysis, 2)
    dense_ms = {p.name: float(work_of(p, cut).at(np.array([at], dtype=float))[0][0]) for p, at in dense_points(cut)}
    return cut, find_alternatives(cut, ByWork(factor), dense_ms, METHODS, space, "fp32")  # type: ignore[arg-type]


def test_what_cannot_pay_is_not_offered() -> None:
    _, everything = offered_by(1e-6)
    _, some = offered_by(2.0)
    _, nothing = offered_by(100.0)
    assert not nothing.options.ranks and not nothing.options.merges
    assert nothing.options.drops.keys() == some.options.drops.keys() == everything.options.drops.keys()
    assert set(some.options.ranks) <= set(everything.options.ranks) and some.options.ranks
    ranks = [sum(len(shown.ranks) for shown in found.shown) for found in (some, everything)]
    assert 0 < ranks[0] < ranks[1]
    assert some.options.merges.keys() < everything.options.merges.keys()


def test_what_is_offered_takes_less_than_what_it_replaces() -> None:
    """By the law that decides; ranks a little more, since the narrowed layer may take less."""
    cut, found = offered_by(1.0)
    weights = {anchor_weight(piece): piece for piece in cut.pieces}

    def macs(partition: Partition, pieces: Sequence[Piece], sizes: Mapping[str, int]) -> float:
        at = [np.array([[float(extent.at(sizes)) for extent in piece.extents]]) for piece in pieces]
        return sum(float(work_of(p, partition).at(point)[0][0]) for p, point in zip(pieces, at, strict=True))

    assert found.shown
    for shown in found.shown:
        place = shown.place
        before = macs(cut, [weights[layer] for layer in place.layers if layer in weights], cut.dense)
        if place.rank is None:
            assert macs(shown.partition, place.pieces, shown.partition.dense) < before
        for rank in shown.ranks:
            sizes = {**shown.partition.dense, str(place.rank): rank}
            assert macs(shown.partition, place.pieces, sizes) < PAYS * before


def test_ranks_that_cost_more_than_the_layer_are_no_levels() -> None:
    profile = eight()
    model, within = profile.latency, 1.1
    for option in profile.options.ranks:
        plan = switched(model, option.switch)
        layer = [t for t in model.terms if t.when == (f"{option.param}|dense",) and t.weight > 0]
        instead = [t for t in model.terms if t.when == (option.switch,) and t.weight > 0]
        (before,) = (t.at(model.dense) for t in layer)
        for rank in model.levels[option.rank]:
            assert len(instead) == 2
            least = [
                t.at({**plan, option.rank: rank})
                if t.bound is None
                else replace(t, ms=t.bound).at({**plan, option.rank: rank})
                for t in instead
            ]
            assert sum(least) < within * before


def test_a_rule_for_every_layer_that_can_change() -> None:
    profile = eight()
    model, options = profile.latency, profile.options
    states: dict[str, set[str]] = {}
    for rule in model.rules:
        (layer,) = (n.removesuffix("|dense") for n, _ in rule.coefs if n.endswith("|dense"))
        assert layer not in states and rule.total == 1 and {c for _, c in rule.coefs} == {1}
        states[layer] = {n for n, _ in rule.coefs} - {f"{layer}|dense"}
    weights = {name for name, shape in profile.partition.analysis.tensors.items() if len(shape) > 1}
    for layer in weights:
        named = {o.switch for o in options.ranks if o.param == layer}
        named |= {s for s, drop in options.drops.items() if layer in drop.params}
        named |= {s for s, merge in options.merges.items() if layer in merge.layers}
        assert named <= states.get(layer, set())
        # What remains are merges that swallow the block of a projection.
        assert all("|merge" in s for s in states.get(layer, set()) - named)
    assert {s for own in states.values() for s in own} | {f"{n}|dense" for n in states} == model.switches
    assert all(rule.holds(model.dense) for rule in model.rules)
    assert all(model.levels[s] == (0, 1) for s in model.switches)


def test_terms_have_names_of_their_own() -> None:
    names = [term.name for term in eight().latency.terms]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_offers_what_is_its_own(method: str) -> None:
    profile = profiled(FakeRunner(EIGHT), (method,))
    options, model = profile.options, profile.latency
    assert [bool(options.ranks), bool(options.drops), bool(options.merges)] == [
        method == name for name in ("rank", "block", "merge")
    ]
    own = options.sites(model, [method])
    widths = set(profile.partition.dense)
    assert own & widths == (widths if method == "filter" else set())
    assert own - widths == set(model.dense) - widths
    assert bool(model.switches) == (method != "filter")


def test_sites_of_a_method_among_all() -> None:
    options, model = eight().options, eight().latency
    for method in METHODS:
        own = options.sites(model, [method])
        for other in set(METHODS) - {method}:
            shared = own & options.sites(model, [other])
            assert all(site.endswith("|dense") for site in shared)
    assert options.sites(model, METHODS) == frozenset(model.dense)


@pytest.mark.parametrize("pattern", ["block3", "block3.*", "block3.conv1", "block3.conv1.weight"])
def test_excluded_layers_stay_as_they_are(pattern: str) -> None:
    options = profiled(FakeRunner(EIGHT), exclude=[pattern]).options
    named = {o.param for o in options.ranks}
    named |= {n for edit in options.drops.values() for n in edit.params}
    named |= {n for merge in options.merges.values() for n in merge.layers}
    touched = {"block3.conv1.weight"} | ({"block3.conv2.weight"} if "conv1" not in pattern else set())
    assert not named & touched
    assert {"stem.weight", "block1.conv1.weight", "block2.conv2.weight", "tail2.weight"} <= named


def model_of(profile: Profile) -> dict[str, object]:
    latency = profile.latency
    terms = {t.name: (t.ms.tolist(), [k.tolist() for k in t.knots], t.when) for t in latency.terms}
    return {"terms": terms, "levels": latency.levels, "slope": latency.slope, "intercept": latency.intercept}


def test_a_profile_continues_its_table(tmp_path: Path) -> None:
    first = profiled(FakeRunner(EIGHT), table=tmp_path / "t.db")
    plans = drawn(first, 5)
    first.ask(plans)
    again = FakeRunner(EIGHT)
    second = profiled(again, table=tmp_path / "t.db")
    assert second.ask(plans) == 0 and again.built == 0
    assert model_of(second) == model_of(first)
    one = FakeRunner(EIGHT)  # fewer methods have other sites, and so another network: its dense engine
    profiled(one, ("filter", "block"), table=tmp_path / "t.db")
    assert one.built == 1


@pytest.mark.parametrize("share", [0.5])
def test_a_kill_among_the_alternatives_loses_the_call_in_flight_only(share: float, tmp_path: Path) -> None:
    def run(runner: FakeRunner, **options: object) -> int:
        profile = profiled(runner, ("rank", "merge"), **options)
        profile.ask(drawn(profile, 12))
        return runner.built

    whole = run(FakeRunner(EIGHT))
    killed = FakeRunner(EIGHT, fail_at=int(share * whole))
    with pytest.raises(KeyboardInterrupt):
        run(killed, table=tmp_path / "t.db")
    again = run(FakeRunner(EIGHT), table=tmp_path / "t.db")
    assert 0 < again < whole and killed.built + again <= whole + AT_ONCE + 4


def test_what_is_offered_follows_from_the_dense_network_alone(tmp_path: Path) -> None:
    """Were it otherwise, a plan could lose its sites to what is measured for it, and shards would differ."""
    first = profiled(FakeRunner(EIGHT), table=tmp_path / "t.db")
    first.ask(drawn(first, 20))
    second = profiled(FakeRunner(EIGHT), table=tmp_path / "t.db")
    assert second.options == first.options and second.latency.levels == eight().latency.levels


def test_an_engine_has_the_structure_of_its_plan() -> None:
    """What is timed with random factors is what the rewriter makes of the plan, operator by operator."""
    profile = eight()
    analysis = analyze(capture(*mixed()))
    free = {g.name: tuple(range(1, g.size + 1)) for g in analysis.groups}
    free |= {o.rank: tuple(range(1, 1 + max(profile.latency.levels[o.rank]))) for o in profile.options.ranks}
    anything = replace(profile.latency, levels={**profile.latency.levels, **free})
    rng = np.random.default_rng(6)
    for _ in range(12):
        plan = random_configuration(anything, rng)
        kept = {g.name: range(plan[g.name]) for g in analysis.groups}
        edits = chosen_edits(profile.options, plan)
        rewritten = rewrite_onnx(dense(), make_plan(analysis, kept, edits=edits))
        engine = build_engine(profile.partition, plan, profile.options)
        assert skeleton(engine) == skeleton(rewritten)
        assert shapes(engine) == shapes(rewritten)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    tensors = {i.name: tuple(i.dims) for i in model.graph.initializer}
    return {name: tensors[name] for node in model.graph.node for name in node.input if len(tensors.get(name, ())) > 1}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    return lambda target, value: monkeypatch.setattr(target, value)


def test_a_forgotten_rank_is_noticed(wrong: Callable[[str, object], None]) -> None:
    """The comparison above is one that fails: here engines are built one rank too wide."""
    profile = eight()
    plan = switched(profile.latency, "tail2.weight|kxk-1x1")
    check_promises(profile, [plan])
    edits = chosen_edits(profile.options, plan)
    (edit,) = edits.factorizations
    wider = replace(edits, factorizations=(replace(edit, rank=edit.rank + 1),))
    wrong("sluice.profiler.pieces.engine.chosen_edits", lambda options, configuration: wider)
    with pytest.raises(AssertionError):
        check_promises(profile, [plan])


class Flipped(nn.Module):
    """Weights stored as (in, out), read by a matrix product and by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(48, 40)), nn.Parameter(torch.randn(40))
        self.w2, self.b2 = nn.Parameter(torch.randn(40, 56)), nn.Parameter(torch.randn(56))
        self.fc = nn.Linear(56, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x @ self.w1 + self.b1)
        return self.fc(F.relu(torch.addmm(self.b2, x, self.w2)))


class Attention(nn.Module):
    """Two residual branches with products of activations, which no weight tells apart."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(7, width)
        self.parts = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(width, width) for n in ("q", "k", "v", "p")}) for _ in range(2)
        )
        self.fc = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for part in self.parts:
            scores = part["q"](x) @ part["k"](x).transpose(1, 2)  # type: ignore[index]
            x = x + part["p"](torch.softmax(scores, -1) @ part["v"](x))  # type: ignore[index]
        return self.fc(x.mean(1))


def test_weights_stored_as_in_out_have_ranks() -> None:
    profile = profiled(FakeRunner(line), ("filter", "rank"), to_onnx(Flipped(), torch.randn(2, 48)))
    assert {o.param for o in profile.options.ranks} >= {"w1", "w2"}
    plans = drawn(profile, 30)
    assert any(plan[o.switch] for plan in plans for o in profile.options.ranks)
    profile.ask(plans)
    assert_close([profile.latency.raw_ms(p) for p in plans], [engine_ms(profile, p, line) for p in plans], tol=0.02)


def test_a_dropped_branch_takes_its_weightless_pieces_along() -> None:
    profile = profiled(FakeRunner(line), ("block",), to_onnx(Attention(), torch.randn(2, 9, 7)))
    drops = sorted(profile.options.drops)
    assert len(drops) == 2
    for chosen in ([drops[0]], [drops[1]], drops):
        plan = switched(profile.latency, *chosen)
        profile.ask([plan])
        assert_close(profile.latency.raw_ms(plan), engine_ms(profile, plan, line), tol=0.02)


def test_a_buffer_is_offered_no_rank() -> None:
    """Such as the kernel of a transform: its factors would never be trained."""
    noted = onnx.ModelProto()
    noted.CopyFrom(dense())
    note_buffers(noted, ["tail2.weight", "absent"])
    assert buffers_of(noted) == {"tail2.weight", "absent"} and not buffers_of(dense())
    free, untrained = (profiled(FakeRunner(EIGHT), ("rank",), model) for model in (dense(), noted))
    named = {o.param for o in free.options.ranks}
    assert "tail2.weight" in named and "tail2.weight" not in free.space.left_alone
    assert {o.param for o in untrained.options.ranks} == named - {"tail2.weight"}
    assert untrained.space.left_alone["tail2.weight"] == "is a buffer, not a parameter: no rank"
