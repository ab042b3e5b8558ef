"""Damaged ONNX files, branches and local functions: one sentence, or what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_file import load_onnx
from sluice.runtime.base.compare import assert_close
from sluice.runtime.targets import make_runner

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto] | None = None) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    w = numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [w])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])


def test_local_functions_are_written_out(tmp_path: Path) -> None:
    inner = [helper.make_node("MatMul", ["a", "b"], ["m"]), helper.make_node("Relu", ["m"], ["c"])]
    function = helper.make_function("own", "Layer", ["a", "b"], ["c"], inner, [helper.make_opsetid("", 18)])
    model = model_of([helper.make_node("Layer", ["x", "w"], ["y"], domain="own")], [function])
    onnx.save(model, tmp_path / "f.onnx")
    loaded = load_onnx(tmp_path / "f.onnx")
    assert [node.op_type for node in loaded.graph.node] == ["MatMul", "Relu"] and not loaded.functions
    found = make_runner("ort-cpu").build(loaded).run({"x": X})
    assert_close(found["y"], np.maximum(X @ np.ones((3, 3), np.float32), 0))


def test_branches_are_told(tmp_path: Path) -> None:
    then, other = (
        helper.make_graph(
            [helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT, [2, 3])]
        )
        for op in ("Relu", "Neg")
    )
    c = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    branch = helper.make_node("If", ["c"], ["y"], name="which", then_branch=then, else_branch=other)
    onnx.save(model_of([c, branch]), tmp_path / "if.onnx")
    with pytest.raises(SluiceError, match="holds If 'which', whose graph inside"):
        load_onnx(tmp_path / "if.onnx")


def test_damages_are_one_sentence(tmp_path: Path) -> None:
    for number, node in enumerate(
        (
            helper.make_node("Relu", ["nowhere"], ["y"]),
            helper.make_node("Nothing", ["x"], ["y"]),
            helper.make_node("Relu", ["x", "w", "w"], ["y"]),
            helper.make_node("Relu", ["x"], ["y"], domain="not.imported"),
        )
    ):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model_of([node]).SerializeToString())
        with pytest.raises(SluiceError, match="is not a sound ONNX file") as told:
            load_onnx(path)
        assert "\n" not in str(told.value)
