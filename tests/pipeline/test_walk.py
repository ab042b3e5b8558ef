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
from sluice.pipeline.compress import sweep
from sluice.profiler.profile import profile_known
from sluice.profiler.table.latency_table import LatencyTable
from tests import tiny

BUDGETS = {"80%": 0.8, "70%": 0.7}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny.simulated_device():
        yield tiny.table_in(tmp_path_factory.mktemp("walk"), tiny.residual_table_bytes())


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
        gate_epochs=gate_epochs, epochs=1, rehearsal=10, progress=False,
    )  # fmt: skip
    assert done.report.met() and len(done.report.readings) > 1
    assert calls["parse"] == calls["Deployment"] == 1
    # The dense network is captured; that and the slim one are exported to ONNX, and the user's as plain export writes
    # it. A copy is no capture of its own.
    assert calls["torch.export"] <= 4 and calls["torch.onnx.export"] <= 3
    assert calls["capture"] <= 3


def test_one_sweep(tmp_path: Path, calls: Counter[str]) -> None:
    """A further budget costs its slim network's export, and the points that its plans use and no other did."""
    path, held = tmp_path / "new.db", []
    with tiny.simulated_device():
        for budget, done in sweep(
            tiny.residual(), tiny.inputs(), budgets=["80%", "70%"], data=tiny.data(), table=path, batch=tiny.BATCH,
            methods=("filter",), epochs=0, progress=False,
        ):  # fmt: skip
            assert done.report.met() and done.report.budget_ms == pytest.approx(BUDGETS[budget] * done.report.dense_ms)
            with LatencyTable.open(path) as opened:
                (network,) = opened.networks()
                held.append((len(opened), len(opened.engines(network))))
        complete = profile_known(tiny.residual_onnx(), path).coverage.complete
    # In a network of this size the best steps from two plans lead nearly everywhere.
    assert held[0][0] < 0.8 * complete and held[0][0] <= held[1][0] < complete
    assert 2 <= held[0][1] < held[1][1]  # the dense engine, and one at least of every budget
    assert calls["parse"] == 2 and calls["Deployment"] == 1
    assert calls["torch.export"] <= 7 and calls["torch.onnx.export"] <= 5  # one of them this test's
