"""Builds of a plan by need, on a device that counts them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import builds as benchmark
from tests.device import FakeRunner, FakeSession, chain


class Counting(FakeRunner):
    """Has free borders, as TensorRT has."""

    clock = "cuda"
    free_borders = True

    @property
    def builds(self) -> int:
        return self.built

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        session = super().build(model, batch=batch, feeds_shapes=feeds_shapes)
        session.clock = "cuda"
        return session


def test_what_a_plan_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "exported", lambda network: chain([50, 36], batch=8))
    runner = Counting()
    found = benchmark.count("resnet20", 0.5, ("filter",), runner)  # type: ignore[arg-type]
    assert 0 < found["dense_builds"] < found["builds"] == runner.built
    assert 0 < found["points"] <= found["points_of_a_complete_table"]
    assert found["promised_share"] <= 0.5 + 1e-4
    benchmark.show({"one": found})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["builds"] == runner.built
