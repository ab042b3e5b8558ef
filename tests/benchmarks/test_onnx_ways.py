"""The comparison of ways to make files faster: what is done again, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import onnx_ways, onnx_ways_norm
from benchmarks.onnx_ways import Row, Way, main, summary
from benchmarks.wild import save

DONE = Row("p/a.onnx", "75%", 0.74, 0.73, True, 90.0, 92.0, 95.0, by_norm_reason="onnxsim is not installed")


def test_rows_without_training_are_done_again_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run(way: Way, budget: str, cache: Path) -> Row:
        asked.append(budget)
        return replace(DONE, budget=budget, distilled=97.0)

    monkeypatch.setattr(onnx_ways, "WAYS", (Way("p/a.onnx", lambda count, rng: np.zeros(count)),))
    monkeypatch.setattr(onnx_ways, "run", run)
    save(tmp_path / "r.json", [DONE, replace(DONE, budget="50%", distilled=None)])
    assert main(["--result", str(tmp_path / "r.json")]) == 0
    assert asked == ["50%"]
    out = capsys.readouterr().out
    assert "95.00 trained" in out and "97.00 trained" in out and "onnxsim is not installed" in out
    assert json.loads(out.splitlines()[-1])["distilled"] == 96.0


def test_medians_are_of_the_rows_that_have_the_arm() -> None:
    rows = [DONE, replace(DONE, distilled=None, by_norm=50.0), Row("p/b.onnx", "50%", reason="no plan")]
    found = summary(rows)
    assert found["rows"] == 3 and found["distilled"] == 95.0 and found["by_norm"] == 50.0 and found["met"] == 1.0


def test_inputs_are_given_their_sizes_before_a_file_is_timed() -> None:
    helper = onnx.helper
    ends = [helper.make_tensor_value_info("x", 1, [-1, 3, "n"]), helper.make_tensor_value_info("y", 1, [-1, 3, "n"])]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sized = onnx_ways_norm._sized(model, {"x": np.zeros((1, 3, 7), np.float32)})
    assert [dim.dim_value for dim in sized.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 7]
    assert onnx_ways_norm._ratio(model, model, {"x": np.zeros((1, 3, 7), np.float32)}) > 0
