"""Shards: the work is divided, the union is whole, and a dead shard costs what it had not done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.profiler import profile as profile_module
from sluice.profiler.profile import ShardDone, profile_onnx, profile_shard
from sluice.profiler.sweep.engine_times import ENGINES
from sluice.profiler.sweep.shards import Shard
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table_tools.merge import merge_tables
from sluice.profiler.view import Profile
from tests.device import FakeRunner, chain, staircase
from tests.profiler.timing.test_reference_engine import Host

WIDTHS = [26, 20, 28, 18, 30, 22, 19, 27]
COUNT = 4


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ShardDone | None, int]]:
    """Profile a chain, whole or a shard, on a fresh simulated device; how many engines were built for it."""

    def run(path: Path, shard: Shard | None = None, fail_at: int | None = None) -> tuple[ShardDone | None, int]:
        runner = FakeRunner(staircase(8), fail_at=fail_at)
        monkeypatch.setattr(profile_module, "make_runner", lambda target, threads=1: runner)
        model = chain(WIDTHS, batch="N", size=7)
        if shard is None:
            profile_onnx(model, path, deployment=Deployment(batch=2), complete=True, progress=False)
            return None, runner.built
        return profile_shard(model, path, shard, deployment=Deployment(batch=2), progress=False), runner.built

    return run


def points(path: Path) -> int:
    with LatencyTable.open(path) as table:
        return len(table)


def content(path: Path) -> dict[tuple[str, tuple[int, ...]], float]:
    with LatencyTable.open(path) as table:
        return {(key, at): m.ms for key in table.keys() for at, m in table.points(key).items()}  # noqa: SIM118


def test_the_work_is_divided_and_the_union_is_whole(tmp_path: Path, measure: Callable[..., tuple]) -> None:
    measure(tmp_path / "whole.db")
    whole = points(tmp_path / "whole.db")
    parts = [tmp_path / f"{k}.db" for k in range(COUNT)]
    for k, path in enumerate(parts):
        done, _ = measure(path, Shard(k + 1, COUNT))
        assert done.points == points(path) - 1 and done.engines == 0 and not done.complete  # its reference apart
        assert done.points <= 0.42 * whole
    merged = merge_tables(parts, tmp_path / "all.db")
    assert merged.points == whole
    assert content(tmp_path / "all.db") == pytest.approx(content(tmp_path / "whole.db"))

    # What is left are engines; shards of the merged table divide them, and nothing is left to the last run.
    again = [tmp_path / f"{k} again.db" for k in range(COUNT)]
    engines = 0
    for k, path in enumerate(again):
        path.write_bytes((tmp_path / "all.db").read_bytes())
        done, built = measure(path, Shard(k + 1, COUNT))
        assert done.complete and done.points == 0
        assert built == done.engines < ENGINES
        engines += built
        done, built = measure(path, Shard(k + 1, COUNT))
        assert built == done.engines == 0
    assert engines == ENGINES
    merge_tables(again, tmp_path / "done.db")
    assert measure(tmp_path / "done.db") == (None, 0)
    assert measure(tmp_path / "all.db") == (None, ENGINES)


def test_a_dead_shard_costs_what_it_had_not_done(tmp_path: Path, measure: Callable[..., tuple]) -> None:
    measure(tmp_path / "2.db", Shard(2, 2))
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "dead.db", Shard(1, 2), fail_at=100)
    kept = points(tmp_path / "dead.db")
    assert kept > 20
    # Any host goes on with it under its number, or finishes what all have left.
    alone, _ = measure(tmp_path / "alone.db", Shard(1, 2))
    merge_tables([tmp_path / "2.db", tmp_path / "dead.db"], tmp_path / "all.db")
    missing, _ = measure(tmp_path / "dead.db", Shard(1, 2))
    assert missing.points == alone.points + 1 - kept
    before = points(tmp_path / "all.db")
    measure(tmp_path / "all.db")
    measure(tmp_path / "whole.db")
    assert content(tmp_path / "all.db") == pytest.approx(content(tmp_path / "whole.db"))
    assert 0 < points(tmp_path / "all.db") - before <= missing.points


@pytest.mark.parametrize("factor", [0.93, 1.04, 1.1])
def test_the_host_of_the_first_table_finishes_in_its_own_time(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What both hosts have measured is what the one that finishes would have measured alone."""

    def run(name: str, speed: float, path: Path, shard: Shard | None) -> Profile | ShardDone:
        runner = Host(name, speed)
        monkeypatch.setattr(profile_module, "make_runner", lambda target, threads=1: runner)
        model, settings = chain(WIDTHS[:4], batch="N", size=7), {"deployment": Deployment(batch=2), "progress": False}
        return (
            profile_shard(model, path, shard, **settings)
            if shard
            else profile_onnx(model, path, complete=True, **settings)
        )

    run("a", 1.0, tmp_path / "1.db", Shard(1, 2))
    run("b", factor, tmp_path / "2.db", Shard(2, 2))
    for shard in (None, Shard(1, 2)):
        with pytest.raises(SluiceError, match=r"1\.db was begun on another host"):
            run("b", factor, tmp_path / "1.db", shard)
    merge_tables([tmp_path / "2.db", tmp_path / "1.db"], tmp_path / "all.db")
    done, alone = run("b", factor, tmp_path / "all.db", None), run("b", factor, tmp_path / "alone.db", None)
    assert done.coverage.disturbed == 0
    assert content(tmp_path / "all.db") == pytest.approx(content(tmp_path / "alone.db"))
    assert done.latency.dense_ms() == pytest.approx(alone.latency.dense_ms())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_every_point_has_one_owner(count: int) -> None:
    shards = [Shard(k, count) for k in range(1, count + 1)]
    owners = [[shard.index for shard in shards if shard.takes("key", (k, 7))] for k in range(1000)]
    assert all(len(found) == 1 for found in owners)
    assert {found[0] for found in owners} == set(range(1, count + 1))


def test_a_shard_without_work_measures_the_dense_network_alone(tmp_path: Path, measure: Callable[..., tuple]) -> None:
    """What is offered follows from the dense network, so every shard has it."""
    first, _ = measure(tmp_path / "1.db", Shard(1, 9999))
    done, built = measure(tmp_path / "9999.db", Shard(9999, 9999))
    assert (done.engines, done.complete) == (0, False) and 0 < done.points <= first.points and built > 0
    again, built = measure(tmp_path / "9999.db", Shard(9999, 9999))
    assert (again.points, built) == (0, 0)


def test_shard_numbers() -> None:
    assert Shard.parse("2/8") == Shard(2, 8) and str(Shard(2, 8)) == "2/8"
    for text in ("0/8", "9/8"):
        with pytest.raises(SluiceError, match=f"there is no shard {text}; give 1/8 to 8/8"):
            Shard.parse(text)
    for text in ("", "2", "2/", "/8", "-1/8", "1/0", "a/b", "1/2/3", "1.5/2", "1/20000", "1/" + "9" * 5000):
        with pytest.raises(SluiceError, match="is no shard; give its number and how many there are, as in 2/8"):
            Shard.parse(text)
