from __future__ import annotations

from collections.abc import Sequence

import pytest

from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.profiler.pieces.engine import build_engine, model_key
from sluice.profiler.pieces.partition import partition_graph
from sluice.profiler.sweep import engine_times
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import ENGINES, measure_engines, missing_plans
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.runtime.base.runner import Session
from tests.device import FINGERPRINT, FakeRunner, chain
from tests.profiler.on_device import bench_on, profiled


def test_engines_for_validation_stay_out_of_the_calibration() -> None:
    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        runner = FakeRunner()
        bench = bench_on(table, runner)
        key = model_key(partition, partition.dense)
        plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
        found = measure_engines(partition, bench, plans)
        assert table.engines(key) == []
        recorded = measure_engines(partition, bench, plans[:2], record=key)
        assert [(widths, m.ms) for widths, m in table.engines(key)] == list(zip(plans[:2], recorded, strict=True))
        engines = [cut_graph(partition.model, partition.analysis, partition.masks(plan)) for plan in plans]
        assert found == pytest.approx([runner.ms(engine) for engine in engines])


def test_engines_are_timed_together_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = partition_graph(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        together: list[int] = []
        time = Bench.time

        def noted(self: Bench, sessions: Sequence[Session], most: int) -> tuple[Measurement, ...]:
            together.append(len(sessions))
            return time(self, sessions, most)

        monkeypatch.setattr(Bench, "time", noted)
        monkeypatch.setattr(engine_times, "PASSES", 1)
        everything = measure_engines(partition, bench, plans)
        assert together == [11]
        working = 4 * 2 * 9 * 9 * (26 + 26)  # the first activation's input and output
        sizes = [build_engine(partition, plan).ByteSize() + working for plan in plans]
        monkeypatch.setattr(engine_times, "AT_ONCE", sum(sizes[:4]))
        assert measure_engines(partition, bench, plans) == everything
        assert together[1] == 4 and sum(together[1:]) == 11 and len(together) > 3
        monkeypatch.setattr(engine_times, "AT_ONCE", 1)  # one engine must fit, whatever it takes
        assert measure_engines(partition, bench, plans[:2]) == everything[:2] and together[-2:] == [1, 1]


@pytest.mark.parametrize(("slow", "passes"), [((), 2), ((1.09,), 3), ((1.0, 1.09), 3), ((1.09, 1.05), 3)])
def test_engines_are_timed_again_until_two_passes_agree(
    slow: tuple[float, ...], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is slow as a whole, or one engine in it is."""
    done: list[float] = []

    def one(self: Bench, sessions: Sequence[Session], most: int) -> tuple[Measurement, ...]:
        done.append(slow[len(done)] if len(done) < len(slow) else 1.0)
        odd = 1.3 if len(done) == 1 else 1.0
        ms = [done[-1] * session.sample(1) * (odd if k == 4 else 1.0) for k, session in enumerate(sessions)]
        return tuple(Measurement(m, 0.01, 24, "thread_cpu") for m in ms)

    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        monkeypatch.setattr(Bench, "time", one)
        plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(11)]
        found = measure_engines(partition, bench, plans)
        engines = [build_engine(partition, plan) for plan in plans]
    assert len(done) == passes
    assert found == pytest.approx([FakeRunner().ms(engine) for engine in engines])


def test_a_pass_on_a_busy_machine_counts_only_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's scale made the first too quick by a fifth."""
    given = [(0.8, 0.25), (0.8, 0.25), (1.0, 0.01)]
    done: list[float] = []

    def one(self: Bench, sessions: Sequence[Session], most: int) -> tuple[Measurement, ...]:
        factor, spread = given[min(len(done), 2)]
        done.append(factor)
        return tuple(Measurement(factor * s.sample(1), spread, 24, "thread_cpu") for s in sessions)

    partition = partition_graph(chain([26, 18]), 2)
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        bench = bench_on(table, FakeRunner())
        monkeypatch.setattr(Bench, "time", one)
        plans = [{"conv0": width, "conv1": 18} for width in (9, 12, 17, 26)]
        truth = [FakeRunner().ms(build_engine(partition, plan)) for plan in plans]
        assert measure_engines(partition, bench, plans) == pytest.approx(truth) and len(done) == 3
        done.clear()
        assert len(measure_engines(partition, bench, plans[:3])) == 3 and len(done) == 1  # fewer have one pass
        given[2:] = given[:2]
        done.clear()
        assert measure_engines(partition, bench, plans) == pytest.approx([0.8 * ms for ms in truth])


def test_no_more_references_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = partition_graph(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(12)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        measure_engines(partition, bench_on(table, FakeRunner()), plans[:9], record="net")
        monkeypatch.setattr(engine_times, "AT_ONCE", 1)
        later = FakeRunner()
        measure_engines(partition, bench_on(table, later), plans[9:], known=table.engines("net"))
        assert later.built == len(plans[9:]) + engine_times.FEWEST


def test_new_engines_are_given_in_the_time_of_the_known_ones() -> None:
    """The machine is a tenth slower by now, for these engines though not for the reference."""
    partition = partition_graph(chain([26, 18]), 2)
    plans = [{"conv0": 3 + k, "conv1": 18 - k} for k in range(16)]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        measure_engines(partition, bench_on(table, FakeRunner()), plans[:9], record="net")
        known = table.engines("net")
        later = FakeRunner(slower=lambda ms: 1.1 * ms)
        truth = [FakeRunner().ms(build_engine(partition, plan)) for plan in plans]
        bench = bench_on(table, later)
        assert measure_engines(partition, bench, plans[9:], known=known) == pytest.approx(truth[9:])
        assert later.built == len(plans[9:]) + min(9, engine_times.REFERENCES)
        assert measure_engines(partition, bench, plans[9:]) == pytest.approx([1.1 * ms for ms in truth[9:]])
        assert measure_engines(partition, bench, plans[9:], known=known[:1]) == pytest.approx(truth[9:])


def test_networks_have_keys_of_their_own() -> None:
    widths = {"conv0": 26, "conv1": 18}
    key = model_key(partition_graph(chain([26, 18]), 2), widths)
    assert key == model_key(partition_graph(chain([26, 18]), 2), dict(widths))
    assert key != model_key(partition_graph(chain([26, 17]), 2), {"conv0": 26, "conv1": 17})
    assert key != model_key(partition_graph(chain([26, 18], stride=2), 2), widths)
    assert key != model_key(partition_graph(chain([26, 18]), 2), {**widths, "conv0.weight|dense": 1})


def test_random_plans_fill_up_to_a_number_and_are_the_same_for_all() -> None:
    profile = profiled(FakeRunner(), chain([26, 18, 30], batch="N"))
    dense = [dict(profile.layout.dense)]
    plans = missing_plans(profile.partition, profile.latency, profile.options, dense, 0)
    assert len(plans) == ENGINES - 1 and dense[0] not in plans
    assert len({tuple(plan.items()) for plan in plans}) == len(plans)
    assert all(plan[site] in levels for plan in plans for site, levels in profile.latency.levels.items())
    assert plans == missing_plans(profile.partition, profile.latency, profile.options, dense, 0)
    assert plans != missing_plans(profile.partition, profile.latency, profile.options, dense, 1)
    assert missing_plans(profile.partition, profile.latency, profile.options, [*dense, *plans], 0) == []
    small = profiled(FakeRunner(), chain([4], batch="N"))  # two engines are all there are
    assert len(missing_plans(small.partition, small.latency, small.options, [{"conv0": 4}], 0)) == 1
