from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chosen
from benchmarks.fidelity import main
from benchmarks.need import drawn_losses, summary
from sluice.core.latency import LatencyModel

ROWS = [
    {"network": "a", "target": "t", "budget": 0.5, "promised": 0.49, "measured": 0.5},
    {"network": "a", "target": "t", "budget": 0.25, "promised": 0.26, "measured": 0.26},
    {"network": "b", "target": "t", "budget": 0.2, "refused": "out of reach"},
]


def test_errors_are_of_the_plans_that_were_measured() -> None:
    found = chosen.chosen_summary(ROWS)
    assert (found["plans"], found["refused"], found["met"]) == (2, 1, 0.5)
    assert found["median_abs_err"] == pytest.approx(0.01)
    assert found["p95_abs_err"] == pytest.approx(0.019)


def test_rows_of_a_network_take_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chosen, "RESULT", tmp_path / "chosen.json")
    chosen._publish(ROWS)
    better = {**ROWS[2], "promised": 0.2, "measured": 0.2}
    del better["refused"]
    chosen._publish([better])
    assert chosen.published() == [*ROWS[:2], better]
    assert main(["--chosen", "--show"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["plans"] == 3


def test_drawn_losses_fall_with_the_width_and_know_no_dense_switch() -> None:
    levels = {"g": (4, 8, 16), "w|dense": (0, 1), "w|1x1": (0, 1), "fixed": (3,)}
    dense = {"g": 16, "w|dense": 1, "w|1x1": 0, "fixed": 3}
    model = LatencyModel((), dense, levels, switches=frozenset({"w|dense", "w|1x1"}))
    losses = drawn_losses(model, 0, 1.0)
    assert losses.keys() == {"g", "w|1x1"}
    assert losses["g"][0] > losses["g"][1] > losses["g"][2] == 0
    assert losses["w|1x1"][0] == 0 < losses["w|1x1"][1]


def test_the_summary_of_needs_tells_the_worst() -> None:
    cases = [{"share": 0.1, "loss_excess": 0.0}, {"share": 0.3, "loss_excess": 0.02}]
    assert summary(cases) == {"worst_share": 0.3, "median_share": 0.2, "worst_loss_excess": 0.02, "equal": 0.5}
