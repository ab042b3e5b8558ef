"""What only one of the two graphs has is neither promised nor cut, and the report says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sluice
from sluice.artifacts.result import Compressed
from sluice.core.deployment import Deployment
from sluice.passes.graph import aten, onnx_axes
from sluice.passes.graph.groups import Analysis, without_groups
from sluice.passes.search_space import find_search_space, read_torch
from sluice.profiler.profile import profile_known, profile_onnx
from sluice.solver.options import METHODS
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


def test_a_table_serves_whether_or_not_both_graphs_were_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device fills a table by the file alone; the host then limits the choice to what its torch graph has."""
    table, dense = tmp_path / "t.db", tiny.residual_onnx()
    profile_onnx(dense, table, deployment=Deployment(batch=tiny.BATCH), methods=METHODS, progress=False)
    lose(monkeypatch, aten, "analyze", "conv1")
    like = find_search_space(read_torch(sluice.capture(tiny.residual(), tiny.inputs())))
    like = like.without(["block1.conv1.weight", "conv2.weight"])
    known = profile_known(dense, table, methods=METHODS, like=like)  # which measures nothing
    assert known.latency.levels["conv1"] == (known.latency.dense["conv1"],) and len(known.latency.levels["conv2"]) > 1
    assert "conv2.weight" not in {option.param for option in known.options.ranks}
    assert list(known.options.drops) == ["block2|drop"] and known.latency.levels["block1|drop"] == (0,)
    told = known.space.left_alone
    assert "no group of the torch graph" in told["conv1"] and "cannot be factorised" in told["conv2.weight"]
    assert "is no residual block" in told["block1"]


class Scaled(nn.Module):
    """(N, 3, 9, 9) to (N, 5): a branch that a single number scales (ReZero)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 11, 3, padding=1), nn.Linear(11, 5)
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head((x + torch.tanh(self.branch(x)) * self.alpha).mean((2, 3)))


def test_a_block_is_known_by_its_layers() -> None:
    """An ONNX file does not tell a parameter of one number from an exporter's constant."""
    measured = sluice.profile(Scaled().eval(), tiny.inputs(), batch=tiny.BATCH, methods=("block",), progress=False)
    (drop,) = measured.options.drops.values()
    assert "branch.weight" in drop.params
