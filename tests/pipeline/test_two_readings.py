"""What only one of the two graphs has is neither promised nor cut, and the report says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sluice
from sluice.artifacts.result import Compressed
from sluice.passes.graph import aten, onnx_axes
from sluice.passes.graph.groups import Analysis, without_groups
from tests import tiny

SETTINGS: dict[str, Any] = {"batch": tiny.BATCH, "methods": ("filter",), "progress": False}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


def lose(monkeypatch: pytest.MonkeyPatch, front_end: Any, name: str, group: str) -> None:
    """From here on the front end does not know the operator behind a group."""
    real = getattr(front_end, name)

    def reading(*args: Any, **options: Any) -> Analysis:
        return without_groups(real(*args, **options), {group: "unknown operator Mystery"})

    monkeypatch.setattr(front_end, name, reading)


def compressed() -> Compressed:
    return sluice.compress(
        tiny.model(), tiny.inputs(), budget="70%", data=tiny.data(), epochs=0, **SETTINGS,
    )  # fmt: skip


def check(done: Compressed) -> None:
    """The second convolution is cut, the first stays, in the file, the plan and the report alike."""
    assert done.report.met() and done.report.parity_max_rel < 1e-4
    assert done.plan.widths["conv2"] < 13 and done.plan.widths.get("conv1", 10) == 10
    assert done.module.get_parameter("conv1.weight").shape[0] == 10
    assert [row.kept for row in done.report.groups if row.name == "conv1"] in ([], [10])
    assert "conv1" in dict(done.report.skipped)


def test_a_group_that_the_onnx_graph_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, onnx_axes, "analyze_onnx", "conv1")
    check(compressed())


def test_a_group_that_the_torch_graph_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, aten, "analyze", "conv1")
    done = compressed()
    check(done)
    assert done.report.promised_ms == pytest.approx(done.report.measured_ms)  # of the file, not of another network


def test_a_gate_without_a_place_in_the_table_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of one's own: gates are inserted before the budget sees what the file shows."""
    lose(monkeypatch, onnx_axes, "analyze_onnx", "conv1")
    measured = sluice.profile(tiny.model(), tiny.inputs(), **SETTINGS)
    gated = sluice.insert_gates(tiny.model(), tiny.inputs(), steps=3)
    assert set(gated.gates) == {"conv1", "conv2"}
    budget = sluice.Budget(gated, measured, "70%")
    assert set(budget.gates) == {"conv2"}
    optimizer = torch.optim.Adam(gated.parameters(), lr=0.05)
    gated.train()
    for x, y in tiny.data()[:3]:
        loss = torch.nn.functional.cross_entropy(gated(x), y) + budget.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gated.step()
    assert gated.gates["conv1"].width() == 10
    check(sluice.finish(gated, budget, progress=False))
