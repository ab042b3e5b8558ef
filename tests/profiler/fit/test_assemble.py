from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from sluice.core.latency import LatencyModel
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.assemble import CLOSE, Layout, Slot, fill
from sluice.profiler.fit.cache_reload import megabytes
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.pieces.joints import Joint
from sluice.profiler.pieces.partition import Piece, partition_graph, partition_static, static_at
from sluice.profiler.survey import COARSE, GRID, SIZES, complete_points, coverage, measure_slots, survey
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.solver.options import METHODS
from sluice.solver.random_configurations import random_configuration
from tests.device import FINGERPRINT, Cost, FakeRunner, chain, line, staircase
from tests.exported import named
from tests.profiler.on_device import bench_on, skipping, surveyed

CALL_MS = 0.02


EIGHT = staircase(8)


def opened(cost: Cost = EIGHT) -> Bench:
    return bench_on(LatencyTable.create(":memory:", FINGERPRINT), FakeRunner(cost, slower=lambda ms: ms + CALL_MS))


@functools.cache
def network() -> onnx.ModelProto:
    return skipping(24, 32)


def described(layout: Layout) -> object:
    slots = [(s.name, s.part.key, s.extents, s.knots, s.when) for s in layout.slots]
    return slots, dict(layout.dense), dict(layout.levels), layout.rules, layout.switches


def drawn(model: LatencyModel, count: int, seed: int = 0) -> list[dict[str, int]]:
    rng = np.random.default_rng(seed)
    return [random_configuration(model, rng) for _ in range(count)]


def ask(layout: Layout, bench: Bench, *plans: Mapping[str, int]) -> int:
    return measure_slots(bench, [point for widths in plans for point in layout.points(widths)])


def test_slots_follow_from_the_graph_whatever_the_table_holds() -> None:
    """Sites and levels must not change while a plan is looked for."""
    bench = opened()
    first = surveyed(network(), bench, METHODS)
    measure_slots(bench, complete_points(first))
    again = surveyed(network(), bench, METHODS)
    assert described(again) == described(first) and len(first.switches) > 6
    before, after = fill(first, bench.table), fill(again, bench.table)
    assert before.levels == after.levels and [t.name for t in before.terms] == [t.name for t in after.terms]


def test_the_slots_of_widths_are_the_same_on_any_device() -> None:
    layouts = [surveyed(network(), opened(cost)) for cost in (staircase(8), staircase(16, 2.0), line)]
    assert described(layouts[0]) == described(layouts[1]) == described(layouts[2])


def test_terms_are_pieces_then_joints_each_with_a_name() -> None:
    bench = opened()
    layout = surveyed(network(), bench, METHODS)
    kinds = [isinstance(slot.part, Joint) for slot in layout.slots]
    assert kinds == sorted(kinds) and any(kinds) and not all(kinds)
    names = [slot.name for slot in layout.slots]
    assert len(set(names)) == len(names)
    model = fill(layout, bench.table)
    assert [term.name for term in model.terms] == names
    assert all((term.weight < 0) == joint for term, joint in zip(model.terms, kinds, strict=True))
    assert all(rule.holds(model.dense) for rule in model.rules)


def test_what_was_measured_is_exact_and_the_rest_is_marked() -> None:
    bench = opened()
    layout = surveyed(network(), bench)
    model = fill(layout, bench.table)
    assert model.measured_at(model.dense) and model.share_estimated(model.dense) == 0.0
    assert model.intercept == pytest.approx(CALL_MS)
    narrow = {site: levels[0] for site, levels in layout.levels.items()}
    assert not model.measured_at(narrow) and 0.5 < model.share_estimated(narrow) <= 1.0
    for term in model.terms:
        if term.bound is not None:
            assert term.measured is not None and (term.bound <= term.ms).all()
            assert (term.bound[term.measured] == term.ms[term.measured]).all()
            assert (term.bound < term.ms)[~term.measured].any()
    assert model.hopeful().ms(narrow) < model.ms(narrow) and model.hopeful().dense_ms() == model.dense_ms()
    ask(layout, bench, narrow)
    known = fill(layout, bench.table)
    engine = bench.runner.ms(build_engine(layout.partition, narrow))  # type: ignore[attr-defined]
    assert known.measured_at(narrow) and known.ms(narrow) == pytest.approx(engine) == known.hopeful().ms(narrow)
    assert model.ms(narrow) != pytest.approx(engine)


def test_a_slot_that_is_off_is_not_asked_for() -> None:
    layout = surveyed(network(), opened(), METHODS)
    on = {slot.name for slot, _ in layout.points(layout.dense)}
    off = {slot.name for slot in layout.slots} - on
    assert off and all(slot.when for slot in layout.slots if slot.name in off)
    option = layout.alternatives.options.ranks[0]
    plan = {**layout.dense, f"{option.param}|dense": 0, option.switch: 1}
    now = {slot.name for slot, _ in layout.points(plan)}
    assert now - on and on - now and len(now - on) >= 2


def test_sums_of_groups_are_known_where_they_were_measured() -> None:
    """Every total that a plan has becomes a knot; between knots nothing counts as measured."""
    bench = opened(staircase(4, 1.4))
    layout = surveyed(named("concat"), bench)
    sums = [s for s in layout.slots if isinstance(s.part, Piece) and any(len(e.coefs) > 1 for e in s.extents)]
    assert sums
    model = fill(layout, bench.table)
    plans = drawn(model, 30)
    plan = next(p for p in plans if any(set(s.at(p)) - {v for k in s.knots for v in k} for s in sums))
    assert not model.measured_at(plan)
    ask(layout, bench, plan)
    after = fill(layout, bench.table)
    assert after.measured_at(plan) and after.levels == model.levels
    knots = {t.name: [set(k.tolist()) for k in t.knots] for t in after.terms}
    for slot in sums:
        assert all(v in k for v, k in zip(slot.at(plan), knots[slot.name], strict=True))
    engine = bench.runner.ms(build_engine(layout.partition, plan))  # type: ignore[attr-defined]
    assert after.ms(plan) == pytest.approx(engine)


def put_joint(bench: Bench, layout: Layout, savings: Mapping[int, float]) -> Slot:
    slot = next(s for s in layout.slots if isinstance(s.part, Joint) and s.extents)
    for at in list(bench.table.points(slot.part.key)):
        assert at == (layout.dense[slot.extents[0].coefs[0][0]],)
    for size, ms in savings.items():
        assert isinstance(slot.part, Joint)
        found = Measurement(ms + slot.part.calls * bench.call(), 0.0, 9, FINGERPRINT.clock)
        bench.table.put(slot.part.key, (size,), found)
    return slot


@pytest.mark.parametrize(("apart", "counts"), [(0.5 * CLOSE, True), (2.0 * CLOSE, False)])
def test_a_joint_between_two_sizes_of_like_savings_is_known(apart: float, counts: bool) -> None:
    bench = opened()
    layout = surveyed(chain([32, 24], batch="N"), bench)
    dense_ms = fill(layout, bench.table).dense_ms() - CALL_MS
    slot = put_joint(bench, layout, {8: 0.1, 32: 0.1 + apart * dense_ms})
    term = next(t for t in fill(layout, bench.table).terms if t.name == slot.name)
    site = slot.extents[0].coefs[0][0]
    assert term.measured_at({site: 16}) == counts and term.measured_at({site: 8}) and term.measured_at({site: 32})
    assert not term.measured_at({site: 4})
    assert term.at({site: 20}) == pytest.approx(0.1 + apart * dense_ms / 2)  # linear between, constant beyond
    assert term.at({site: 4}) == pytest.approx(0.1) and term.bound is None


def test_a_joint_of_which_nothing_is_known_saves_its_calls_alone() -> None:
    """Net of calls that is nothing, and it is an estimate."""
    bench = opened()
    layout = surveyed(network(), bench, ("rank",))
    parts = {slot.name: slot.part.key for slot in layout.slots if isinstance(slot.part, Joint)}
    unknown = [t for t in fill(layout, bench.table).terms if t.name in parts and not bench.table.points(parts[t.name])]
    assert unknown
    for term in unknown:
        assert (term.ms == 0.0).all() and term.measured is not None and not term.measured.any()


def test_a_complete_table_has_a_grid_of_every_part() -> None:
    bench = opened()
    layout = surveyed(chain([64, 48, 96], batch="N"), bench)
    points = complete_points(layout)
    assert len({(slot.part.key, at) for slot, at in points}) == len(points)
    by_slot: dict[str, set[tuple[int, ...]]] = {}
    for slot, at in points:
        by_slot.setdefault(slot.part.key, set()).add(at)
        assert all(v in values for v, values in zip(at, slot.knots, strict=True))
    for slot in layout.slots:
        own = by_slot[slot.part.key]
        most = SIZES if isinstance(slot.part, Joint) else GRID if len(slot.knots) > 1 else COARSE
        assert len(own) <= most
        # All corners are among them, the dense size too.
        assert set(itertools.product(*((k[0], k[-1]) for k in slot.knots))) <= own
    before = coverage(layout, bench.table)
    assert before.complete == len(points) > before.points == len({s.part.key for s in layout.slots})
    assert measure_slots(bench, points) == len(points) - before.points
    after = coverage(layout, bench.table)
    assert (after.points, after.complete, after.disturbed) == (len(points), len(points), 0)


def test_the_partition_of_a_layout_is_the_network() -> None:
    layout = surveyed(network(), opened())
    cut = partition_graph(network(), 2)
    assert [p.key for p in layout.partition.pieces] == [p.key for p in cut.pieces] and layout.dense == cut.dense


def test_pieces_that_no_width_changes_have_one_point() -> None:
    """As between layers that are left out."""
    bench = opened()
    model = chain([24, 16, 20], batch="N")
    static = static_at(model, 2)
    space = find_search_space(read_onnx(static), ("conv0", "conv1"))
    cut = partition_static(static, space.analysis, 2)
    layout = survey(cut, bench, methods=("filter",), space=space)
    assert any(isinstance(s.part, Piece) and not s.extents for s in layout.slots)
    found = fill(layout, bench.table)
    assert found.ms(found.dense) == pytest.approx(bench.runner.ms(cut.model))  # type: ignore[attr-defined]
    weights = megabytes(layout, found)
    assert all(weights[term.name].shape == term.ms.shape for term in found.terms if term.name in weights)
