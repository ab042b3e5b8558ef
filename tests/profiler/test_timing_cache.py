from __future__ import annotations

from pathlib import Path

import pytest

from sluice.profiler import profile as profile_module
from sluice.profiler import timing_cache
from sluice.profiler.profile import profile_onnx
from sluice.profiler.table import LatencyTable
from tests.device import FINGERPRINT, FakeRunner, FakeSession, chain, staircase


class Caching(FakeRunner):
    """Every engine adds a byte to the timing cache."""

    def __init__(self) -> None:
        super().__init__(staircase(8))
        self.cache = b"own"

    def build(self, *args: object, **options: object) -> FakeSession:
        self.cache += b"+"
        return super().build(*args, **options)  # type: ignore[arg-type]


def test_a_timing_cache_lives_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runners: list[Caching] = []

    def make(target: str, threads: int = 1) -> Caching:
        runners.append(Caching())
        return runners[-1]

    monkeypatch.setattr(profile_module, "make_runner", make)
    profile = profile_onnx(chain([20, 13], batch="N"), tmp_path / "t.db", batch=2, progress=False)
    grown = max((runner.cache for runner in runners), key=len)
    assert len(grown) > 10
    assert profile.timing_cache == grown
    assert profile.runner().cache == grown  # type: ignore[attr-defined]
    with LatencyTable.open(tmp_path / "t.db") as table:
        assert table.get_blob(timing_cache.NAME) == grown
    runners.clear()
    again = profile_onnx(chain([20, 13], batch="N"), tmp_path / "t.db", batch=2, progress=False)
    assert again.timing_cache is not None and again.timing_cache.startswith(grown)
    assert any(runner.cache.startswith(grown) for runner in runners)


def test_a_runtime_without_one_leaves_the_table_alone() -> None:
    with LatencyTable.create(":memory:", FINGERPRINT) as table:
        timing_cache.keep(FakeRunner(), table)
        assert table.blobs() == {}
        runner = FakeRunner()
        timing_cache.restore(runner, b"of another")
        assert not hasattr(runner, "cache")
