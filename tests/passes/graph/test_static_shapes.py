"""Shape arithmetic is folded where it can be evaluated."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.graph.static_shapes import static_graph
from tests.exported import ops, run


def folding(op: str, data: list[np.ndarray], outputs: int = 1, domain: str = "", **attributes: int) -> onnx.ModelProto:
    """``y = x +`` the joined outputs of an operator on constants."""
    given, names = [f"i{k}" for k in range(len(data))], [f"o{k}" for k in range(outputs)]
    nodes = [
        helper.make_node(op, given, names, "folded", domain=domain, **attributes),
        helper.make_node("Concat", names, ["s"], axis=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["n", 1, 1])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in zip(given, data, strict=True)]
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets, ir_version=10)


def test_all_outputs_are_folded() -> None:
    model = folding("Split", [np.arange(5)], outputs=2, num_outputs=2)
    static = static_graph(model, 2)
    assert ops(static) == {"Add": 1}
    np.testing.assert_array_equal(run(static, {"x": np.zeros((2, 1, 1), np.int64)})["y"][0, 0], np.arange(5))
