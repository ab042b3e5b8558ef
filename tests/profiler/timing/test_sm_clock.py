from __future__ import annotations

import pytest

from sluice.commands.table_listing import to_data, to_lines
from sluice.profiler.pieces.partition import partition_graph
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing import sm_clock as clocks
from tests.device import FINGERPRINT, FakeRunner, chain
from tests.profiler.on_device import bench_on


class Clocked(FakeRunner):
    """Its clock falls with every engine, from 1980 MHz to 1500."""

    def sm_clock_mhz(self) -> int | None:
        return max(1500, 1980 - self.built)


@pytest.mark.parametrize("runner", [FakeRunner(), Clocked()])
def test_the_clock_is_logged_where_there_is_one(runner: FakeRunner) -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        assert clocks.clock_range(table) is None
        cut, bench = partition_graph(chain([26, 18]), 2), bench_on(table, runner)
        for share in (1.0, 0.7, 0.4):  # calls of their own, at each of which the clock is read
            bench.measure((cut, p, tuple(round(share * e.at(cut.dense)) for e in p.extents)) for p in cut.pieces)
        told = [line for line in to_lines(to_data(table)) if "MHz" in line]
        if not isinstance(runner, Clocked):
            assert clocks.clock_range(table) is None and not told
            return
        found = clocks.clock_range(table)
        assert found is not None and found[0] < found[1] < 1980 and found[0] == 1980 - runner.built
        assert told == [f"clock while measuring: {found[0]} to {found[1]} MHz"]


def test_a_clock_that_cannot_be_read_is_no_clock() -> None:
    runner = Clocked()
    runner.sm_clock_mhz = lambda: None  # type: ignore[method-assign]
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        clocks.keep(runner, table)
        assert table.blobs() == {}
