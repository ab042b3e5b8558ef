"""What one `compress` does once: the budget is parsed, the network captured and exported to ONNX, and handed on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sluice
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.passes.graph.capture import capture
from tests import tiny


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("walk") / "t.db"
    with tiny.simulated_device():
        sluice.profile(tiny.residual(), tiny.inputs(), path, batch=tiny.BATCH, progress=False)
        yield path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls by name, wherever a module of sluice's has the function by that name."""
    seen: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            return real(*args, **options)

        return counting

    monkeypatch.setattr(torch.export, "export", counted("torch.export", torch.export.export))
    monkeypatch.setattr(torch.onnx, "export", counted("torch.onnx.export", torch.onnx.export))
    monkeypatch.setattr(BudgetSpec, "parse", counted("parse", BudgetSpec.parse))
    monkeypatch.setattr(Deployment, "__post_init__", counted("Deployment", Deployment.__post_init__))
    holders = [m for name, m in sys.modules.items() if name.startswith("sluice") and vars(m).get("capture") is capture]
    assert len(holders) > 3
    for module in holders:
        monkeypatch.setattr(module, "capture", counted("capture", capture))
    return seen


@pytest.mark.parametrize("gate_epochs", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_compress(gate_epochs: int, table: Path, calls: Counter[str]) -> None:
    done = sluice.compress(
        tiny.residual(), tiny.inputs(), budget="60%", data=tiny.data(), table=table, batch=tiny.BATCH,
        gate_epochs=gate_epochs, epochs=1, rehearsal=2, progress=False,
    )  # fmt: skip
    assert done.report.met() and len(done.report.readings) > 1
    assert calls["parse"] == calls["Deployment"] == 1
    # The dense network is captured; that and the slim one are exported to ONNX. A copy is no capture of its own.
    assert calls["torch.export"] <= 3 and calls["torch.onnx.export"] <= 2
    assert calls["capture"] <= 3


def test_one_sweep(table: Path, calls: Counter[str]) -> None:
    """A further budget costs its slim network's export."""
    found = sluice.sweep(
        tiny.residual(), tiny.inputs(), budgets=["80%", "70%"], data=tiny.data(), table=table, batch=tiny.BATCH,
        methods=("filter",), epochs=0, progress=False,
    )  # fmt: skip
    assert [budget for budget, done in found if done.report.met()] == ["80%", "70%"]
    assert calls["parse"] == 2 and calls["Deployment"] == 1
    assert calls["torch.export"] <= 4 and calls["torch.onnx.export"] <= 3
