"""The benchmark of analysis: what a row compares, and what is said of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import analysis
from sluice.core.errors import SluiceError


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def test_both_halve_the_same_network() -> None:
    pytest.importorskip("torch_pruning")
    row = analysis.compare("small", network(), (torch.randn(2, 3, 8, 8),), rounds=1)
    total, slim = 8 * 28 + 6 * 73 + 4 * 97, 4 * 28 + 3 * 37 + 4 * 49
    assert row["left"] == {"sluice": round(slim / total, 3), "Torch-Pruning": round(slim / total, 3)}
    assert row["faster"] > 0 and row["ours_s"] > 0


def test_a_cut_that_removes_nothing_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "theirs", lambda model, inputs: model)
    with pytest.raises(SluiceError, match="small: the cut by Torch-Pruning removes nothing"):
        analysis.compare("small", network(), (torch.randn(2, 3, 8, 8),), rounds=1)


def test_figures_of_rows() -> None:
    rows = [{"faster": 0.5}, {"faster": 4.0}, {"faster": 2.0}]
    assert analysis.summary(rows, {"vit_s": 0.2}) == {"networks": 3, "least": 0.5, "median": 2.0, "vit_s": 0.2}
