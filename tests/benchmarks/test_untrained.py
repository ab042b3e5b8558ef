"""The comparison of networks that are not trained: what is done again, and what is summed up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from benchmarks import untrained
from benchmarks.onnx_ways_norm import NormCut
from benchmarks.untrained import Row, main, summary
from sluice.passes.cut.export import finalize, to_onnx

DONE = Row(
    "ds-cnn", "75%", 98.0, 0.73, cut=40.0, refitted=90.0, onnxsim_share=0.72, onnxsim=30.0, onnxsim_refitted=50.0
)


def test_ours_is_compared_with_the_better_of_both_others() -> None:
    alone = replace(DONE, cut=88.0, onnxsim=None, onnxsim_refitted=None, onnxsim_reason="slower")
    found = summary([DONE, alone, Row("other", "50%", 98.0, reason="cannot be met")])
    assert (found["points"], found["beside_onnxsim"]) == (2, 1)
    assert (found["refit_gain_min"], found["refit_gain_median"]) == (2.0, 26.0)
    assert found["ours_minus_onnxsim_min"] == 40.0
    assert summary([replace(DONE, onnxsim=60.0)])["ours_minus_onnxsim_min"] == 30.0
    assert summary([])["ours_minus_onnxsim_min"] is None


def test_finished_rows_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run(job: Any, budget: str, folder: Path) -> Row:
        asked.append(budget)
        return replace(DONE, budget=budget, refitted=70.0, onnxsim=None, onnxsim_reason="slower than ours")

    monkeypatch.setattr(untrained, "run", run)
    monkeypatch.setattr("benchmarks.methods_jobs.JOBS", {"ds-cnn": lambda folder: SimpleNamespace()})
    result = tmp_path / "r.json"
    result.write_text(json.dumps({"rows": [asdict(DONE)]}))
    options = ["--result", str(result), "--folder", str(tmp_path), "--job", "ds-cnn"]
    assert main(options) == main(options) == 0
    assert asked == ["50%"]
    out = capsys.readouterr().out
    assert "refitted 90.00" in out and "onnxsim: slower than ours" in out
    assert json.loads(out.splitlines()[-1])["refit_gain_min"] == 30.0 and main([*options, "--job", "none"]) == 1


def test_a_file_of_a_fixed_batch_is_judged_on_any_number_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    file = finalize(to_onnx(net, x[:4]))
    dense = net(x).detach()

    def near(made: nn.Module) -> float:
        return float((made(x) - dense).abs().max())

    job: Any = SimpleNamespace(batch=4, evaluate=near, example=x[:4], data=lambda seed: [(x, None)])
    assert untrained._judged(job, file) < 1e-5

    def not_there(dense: onnx.ModelProto, example: Any, share: float) -> NormCut:
        return NormCut(None, 0.9, "slower than ours with 95% of the channels removed")

    monkeypatch.setattr(untrained, "cut_by_norm", not_there)
    row = untrained._by_norm(DONE, job, file)
    assert row.onnxsim_share == 0.9 and row.onnxsim_reason.startswith("slower")
