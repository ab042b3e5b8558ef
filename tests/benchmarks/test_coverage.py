"""The benchmark of architectures: what a row says of a network, and what is said of rows."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks import coverage_one
from benchmarks.coverage import load, save
from benchmarks.coverage_networks import KINDS, NETWORKS, Network
from benchmarks.coverage_one import measure
from benchmarks.coverage_results import document, lines, summary
from benchmarks.coverage_row import Row
from sluice.core.plan import Plan

ROWS = (
    Row("timm:a", "text", captured=True, share=1.0, seconds={"capture": 1.0, "export": 2.0}),
    Row("timm:b", "text", captured=True, share=0.5, silent=["b.weight"], failed="cut", reason="a | b"),
    Row("timm:c", "detection", captured=True, share=0.9, left_alone={"picks rows": [0.1, "c.weight"]}),
    Row("timm:d", "detection", failed="capture", reason="no"),
)


class Partly(nn.Module):
    """No rule reads a sort, so what it feeds lies on no group; one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)
        self.never = nn.Linear(50, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).relu()).sort(dim=1).values)


def partly() -> nn.Module:
    return Partly()


def network(name: str) -> Network:
    return Network(f"tests.benchmarks.test_coverage:{name}", "text", (5,))


def test_a_row_tells_shares_and_parity() -> None:
    row = measure(network("partly"))
    assert (row.failed, row.captured, row.groups, row.batch_free) == ("", True, 1, True)
    assert row.share == row.share_torch == pytest.approx((35 + 42) / (35 + 42 + 24))
    assert row.torch_error is not None and row.torch_error < 1e-6 and max(row.onnx_errors) < 1e-6
    assert len(row.onnx_errors) == 2 and row.silent == []
    ((why, (held, name)),) = row.left_alone.items()
    assert why == "is an output of the model" and name == "three.weight" and held == pytest.approx(24 / 101, abs=1e-4)


def test_a_wrong_cut_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut file takes other channels than the slim network."""
    real = coverage_one.rewrite_onnx

    def wrong(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
        cut = real(model, plan)
        bias = next(init for init in cut.graph.initializer if init.name == "one.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1].copy(), bias.name))
        return cut

    monkeypatch.setattr(coverage_one, "rewrite_onnx", wrong)
    row = measure(network("partly"))
    assert row.failed == "onnx" and row.captured


def test_a_failure_is_a_row() -> None:
    row = measure(network("none"))
    assert row.failed == "make" and "has no factory 'none'" in row.reason and not row.captured


def test_figures_of_rows(tmp_path: Path) -> None:
    assert summary(ROWS) == {"n": 4, "captured": 3, "cut_with_parity": 2, "median_share": 0.7, "silent": 1}
    said = lines(ROWS, ("text", "detection"))
    assert said[1].split() == ["text", "2", "2", "1", "0.750", "0.500", "1", "1.5"]
    assert said[-2:] == ["timm:b: cut: a | b", "timm:d: capture: no"]
    page = document(ROWS, ("text", "detection"), 5)
    assert "Of 5 networks that are listed, 4 have been run" in page
    assert "| `timm:b` | cut | a \\| b |" in page and "| `timm:c` | 0.900 | 10.0%: picks rows (c.weight) |" in page
    path = tmp_path / "rows.json"
    rows = [Row(network.spec, network.kind, share=0.5) for network in NETWORKS[:2]]
    save(path, [*rows, Row("listed no more", "text")])
    assert list(load(path).values()) == rows and load(tmp_path / "none") == {}


def test_the_list() -> None:
    assert len({network.spec for network in NETWORKS}) == len(NETWORKS) >= 160
    assert len(KINDS) == 6


def test_the_page_tells_commits_of_rows() -> None:
    rows = [Row(f"timm:{k}", "text", state=state) for k, state in enumerate(("abc", "", "abc"))]
    assert "measured: 2 of abc, 1 of no commit that was noted." in document(rows, ["text"], 3)
