"""One reader of graphs: what makes, reads and names a value."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.precision.fold import fold_batch_norms


@pytest.fixture
def model() -> onnx.ModelProto:
    """A convolution, and a branch whose body reads its output and a tensor that nothing else reads."""
    text = """<ir_version: 10, opset_import: ["" : 20]> toy (float[N, 2, 4, 3] x) => (float[N, 3, H, W] out)
    {
        y = Conv(x, first)
        two = Constant<value_float=2.0>()
        c = Cast<to=9>(flag)
        z = If (c) <
            then_branch = yes () => (float[N, 6, 4, 3] t) { t = Add(y, kept) },
            else_branch = no () => (float[N, 6, 4, 3] e) { e = Neg(y) }
        >
        s = Add(y, y)
        out = Conv(z, last)
    }"""
    model = onnx.parser.parse_model(text)
    tensors = {
        "first": np.ones((6, 2, 1, 1), np.float32),
        "last": np.ones((3, 6, 1, 1), np.float32),
        "kept": np.ones((6, 1, 1), np.float32),
        "flag": np.array(1),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    return model


def test_what_it_tells(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, [6, 1, 1]))  # as old files do
    for graph in (OnnxGraph(model), OnnxGraph(model.graph)):
        assert list(graph.inputs) == ["x"] and list(graph.outputs) == ["out"]
        assert list(graph.initializers) == ["first", "last", "kept", "flag"]
        assert graph.producers["z"].op_type == "If" and "x" not in graph.producers
        assert [node.op_type for node in graph.readers["y"]] == ["If", "If", "Add", "Add"]
        assert [graph.uses(name) for name in ("y", "kept", "out", "s", "nothing")] == [4, 1, 1, 0, 0]
        assert graph.array("two") == 2.0 and graph.array("flag") == 1 and graph.array("y") is None
        assert set(graph.literals) == {"flag", "two"}
        assert graph.shapes == {"kept": (6, 1, 1)}


def test_names_that_are_free(model: onnx.ModelProto) -> None:
    graph = OnnxGraph(model)
    assert [graph.fresh(name) for name in ("new", "new", "first", "y", "x", "out")] == [
        "new", "new_", "first_", "y_", "x_", "out_",
    ]  # fmt: skip
    assert graph.is_taken("new_") and not graph.is_taken("other")


def test_a_body_of_control_flow_keeps_what_it_reads(model: onnx.ModelProto) -> None:
    assert "If" in analyze_onnx(model).frozen["first"]
    assert "kept" in {init.name for init in fold_batch_norms(model).graph.initializer}
