from __future__ import annotations

from pathlib import Path

import pytest

from sluice.core.deployment import Deployment
from sluice.profiler import profile as profile_module
from sluice.profiler import view as view_module
from sluice.profiler.profile import profile_onnx
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


@pytest.mark.parametrize("fail_at", [1, 5, 9])
def test_a_kill_costs_the_timing_cache_of_one_engine(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Caching(fail_at)
    monkeypatch.setattr(profile_module, "make_runner", lambda target, threads=1: killed)
    with pytest.raises(KeyboardInterrupt):
        profile_onnx(chain([20, 13], batch="N"), tmp_path / "t.db", deployment=Deployment(batch=2), progress=False)
    with LatencyTable.open(tmp_path / "t.db") as table:
        assert table.get_blob(timing_cache.NAME) == killed.cache
    assert len(killed.cache) > fail_at


def test_a_runtime_without_one_leaves_the_table_alone() -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        timing_cache.keep(FakeRunner(), table)
        assert table.blobs() == {}
        runner = FakeRunner()
        timing_cache.restore(runner, b"of another")
        assert not hasattr(runner, "cache")
