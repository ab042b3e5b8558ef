"""The benchmark of files of the wild tells a wrong cut, a silent matrix and a file that the runtime does not run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import wild_one
from benchmarks.wild import RESULTS, lines, load, save, summary
from benchmarks.wild_files import FILES, WildFile
from benchmarks.wild_masked import masked
from benchmarks.wild_one import measure
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.onnx_axes import analyze_onnx

WILD = WildFile("tiny", "1.0", "tiny/model.onnx")


def write(path: Path, *nodes: onnx.NodeProto, **shapes: tuple[int, ...]) -> Path:
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "tiny", [x], [y], tensors)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def linear(path: Path) -> Path:
    return write(
        path, helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("LayerNormalization", ["h", "s"], ["n"]),
        helper.make_node("MatMul", ["n", "b"], ["y"]), a=(5, 8), s=(8,), b=(8, 3),
    )  # fmt: skip


def test_a_row(tmp_path: Path) -> None:
    row = measure(WILD, linear(tmp_path / "model.onnx"))
    assert (row.failed, row.reason, row.groups, row.channels, row.silent) == ("", "", 1, 8, [])
    assert row.errors.keys() == row.read_errors.keys() == {"batch 2", "batch 5"}
    save(tmp_path / "rows.json", [row])
    assert summary([row]) == {"files": 1, "read": 1.0, "exact": 1.0, "silent": 0}
    assert any("tiny/model.onnx" in line for line in lines([row]))


def test_a_wrong_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wild_one.rewrite_onnx

    def wrong(*args: object) -> onnx.ModelProto:
        slim = real(*args)  # type: ignore[arg-type]
        weight = next(init for init in slim.graph.initializer if init.name == "b")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), "b"))
        return slim

    monkeypatch.setattr(wild_one, "rewrite_onnx", wrong)
    row = measure(WILD, linear(tmp_path / "model.onnx"))
    assert row.failed == "compare" and summary([row])["exact"] == 0.0


def test_a_silent_matrix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wild_one.find_search_space
    monkeypatch.setattr(wild_one, "find_search_space", lambda reading: replace(real(reading), left_alone={}))
    path = write(tmp_path / "model.onnx", helper.make_node("MatMul", ["x", "a"], ["y"]), a=(5, 8))
    row = measure(WILD, path)
    assert row.failed == "cut" and row.silent == ["a"] and not row.left


def test_the_reference_is_no_cut_of_the_rewriter(tmp_path: Path) -> None:
    """Rows that make a removed channel stay, columns that read it are zero, and norms count the kept."""
    model = onnx.load(linear(tmp_path / "model.onnx"))
    analysis = analyze_onnx(model)
    (group,) = analysis.groups
    done = masked(model, analysis, keep_masks(analysis, {group.name: [0, 1, 2, 5]}))
    tensors = {init.name: numpy_helper.to_array(init) for init in done.graph.initializer}
    before = {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}
    assert (tensors["a"] == before["a"]).all() and not tensors["b"][[3, 4, 6, 7]].any()
    assert (tensors["b"][[0, 1, 2, 5]] == before["b"][[0, 1, 2, 5]]).all()
    assert "LayerNormalization" not in {node.op_type for node in done.graph.node}


def test_a_quantised_file_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"]))
    row = measure(WILD, path)
    assert row.quantised and summary([row])["files"] == 0


def test_the_committed_rows() -> None:
    rows = load(RESULTS)
    assert len(rows) >= 25 and len({wild.name for wild in FILES}) == len(FILES)
    found = summary(list(rows.values()))
    assert found["read"] >= 0.95 and found["exact"] >= 0.9 and found["silent"] == 0
    assert all(max(row.errors.values()) <= wild_one.TOLERANCE for row in rows.values() if not row.failed)
    assert json.loads(RESULTS.read_text())["rows"]
