from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sluice.core.deployment import Deployment
from sluice.profiler import profile as profile_module
from sluice.profiler import view as view_module
from sluice.profiler.profile import profile_onnx
from sluice.profiler.sweep import bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing import timing_cache
from tests.device import FINGERPRINT, FakeRunner, FakeSession, chain, staircase


class Caching(FakeRunner):
    """Every engine adds a byte to the timing cache."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(staircase(8), fail_at=fail_at)
        self.cache = b"own"

    def build(self, *args: object, **options: object) -> FakeSession:
        built = super().build(*args, **options)  # type: ignore[arg-type]
        self.cache += b"+"
        return built


def test_a_timing_cache_lives_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runners: list[Caching] = []

    def make(target: str, threads: int = 1) -> Caching:
        runners.append(Caching())
        return runners[-1]

    for module in (profile_module, view_module):
        monkeypatch.setattr(module, "make_runner", make)
    profile = profile_onnx(
        chain([20, 13], batch="N"), tmp_path / "t.db", deployment=Deployment(batch=2), progress=False
    )
    grown = max((runner.cache for runner in runners), key=len)
    assert len(grown) > 10
    assert profile.bench.table.get_blob(timing_cache.NAME) == grown
    assert profile.runner().cache == grown  # type: ignore[attr-defined]
    with LatencyTable.open(tmp_path / "t.db") as table:
        assert table.get_blob(timing_cache.NAME) == grown
    runners.clear()
    again = profile_onnx(chain([20, 13], batch="N"), tmp_path / "t.db", deployment=Deployment(batch=2), progress=False)
    kept = again.bench.table.get_blob(timing_cache.NAME)
    assert kept is not None and kept.startswith(grown)
    assert any(runner.cache.startswith(grown) for runner in runners)


@pytest.mark.parametrize("fail_at", [3, 9, 13])
def test_a_kill_costs_the_timing_cache_of_what_it_measured(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "AT_ONCE", 3)
    killed = Caching(fail_at)
    monkeypatch.setattr(profile_module, "make_runner", lambda target, threads=1: killed)
    with pytest.raises(KeyboardInterrupt):
        profile_onnx(
            chain([20, 13, 9, 7], batch="N"), tmp_path / "t.db", deployment=Deployment(batch=2), progress=False
        )
    with LatencyTable.open(tmp_path / "t.db") as table:
        kept, points = table.get_blob(timing_cache.NAME), len(table)
    assert (kept is None) == (points <= 2) == (fail_at == 3), "the reference engine and a call come first"
    if kept is not None:
        assert killed.cache.startswith(kept) and len(killed.cache) - len(kept) <= 6


def test_the_cache_is_written_once_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every engine: it holds megabytes."""
    written: list[str] = []
    put, put_many = LatencyTable.put_blob, LatencyTable.put_many

    def counted(self: LatencyTable, name: str, content: bytes) -> None:
        written.append(name)
        put(self, name, content)

    def committed(self: LatencyTable, rows: Any) -> None:
        written.append("points")
        put_many(self, rows)

    monkeypatch.setattr(LatencyTable, "put_blob", counted)
    monkeypatch.setattr(LatencyTable, "put_many", committed)
    monkeypatch.setattr(bench, "AT_ONCE", 3)
    runner = Caching()
    for module in (profile_module, view_module):
        monkeypatch.setattr(module, "make_runner", lambda target, threads=1: runner)
    profile = profile_onnx(chain([20, 13, 9, 7], batch="N"), deployment=Deployment(batch=2), progress=False)
    # First come the reference engine and the time of a call, last a whole engine.
    assert written[:3] == ["points", "host", "points"] and written[-1] == timing_cache.NAME
    assert written[3:-1] == [timing_cache.NAME, "points"] * (len(written) // 2 - 2), "points have their kernels"
    kept = profile.bench.kept
    assert len(written) > 10 and written.count(timing_cache.NAME) <= kept.engines / 3
    assert kept.engines == runner.built and 0 < kept.mb_per_build == kept.bytes / 1e6 / kept.engines


def test_a_table_knows_the_kernels_of_its_parts() -> None:
    runner = Caching()
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        assert timing_cache.known_kernels(table) == frozenset()
        timing_cache.keep_kernels(runner, table, [("conv", 3), "0123"])
        timing_cache.keep_kernels(runner, table, [("conv", 3), ("relu", 1)])
        found = timing_cache.known_kernels(table)
        assert found == {timing_cache.digest(k) for k in [("conv", 3), "0123", ("relu", 1)]} and "0123" in found
        assert len(found) == 3
        timing_cache.keep_kernels(FakeRunner(), table, ["of a runtime without a cache"])
        assert timing_cache.known_kernels(table) == found


def test_a_runtime_without_one_leaves_the_table_alone() -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        timing_cache.keep(FakeRunner(), table)
        assert table.blobs() == {}
        runner = FakeRunner()
        timing_cache.restore(runner, b"of another")
        assert not hasattr(runner, "cache")
