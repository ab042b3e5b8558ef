"""A branch that data steers is a part of what it reads, its bodies included."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.passes.graph.onnx_graph import reads, rename_reads
from sluice.profiler.pieces.partition import build_piece, partition_graph
from sluice.runtime.ort.cpu import OrtRunner


def branching() -> onnx.ModelProto:
    """Two convolutions; between them an ``If`` whose bodies read the first one's output, and one a weight."""
    rng = np.random.default_rng(0)
    weights = {"first": (7, 3, 3, 3), "second": (5, 7, 1, 1), "scale": (7, 1, 1)}

    def body(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        out = nodes[-1].output[0]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)])

    scaled = body("scaled", helper.make_node("Mul", ["a", "scale"], ["b1"]), helper.make_node("Relu", ["b1"], ["b2"]))
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["c"], then_branch=scaled,
                         else_branch=body("plain", helper.make_node("Identity", ["a"], ["d"]))),
        helper.make_node("Conv", ["c", "second"], ["y"]),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    graph = helper.make_graph(
        nodes, "branching", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 6, 5])],
        [*tensors, numpy_helper.from_array(np.float32(0.0), "zero")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_pieces_of_a_branching_graph_load() -> None:
    partition = partition_graph(branching(), 2)
    assert partition.pieces
    for piece in partition.pieces:
        OrtRunner().build(build_piece(partition, piece, partition.dense))
    (holder,) = [p for p in partition.pieces if any(n.op_type == "If" for n in p.model.graph.node)]
    assert "a" in {info.name for info in holder.model.graph.input}  # that only the bodies read
    assert "scale" in {init.name for init in holder.model.graph.initializer}


def test_bodies_read_by_the_new_names_and_keep_their_own() -> None:
    (branch,) = [node for node in branching().graph.node if node.op_type == "If"]
    before = list(reads(branch))
    rename_reads(branch, lambda name: f"1/{name}")
    assert list(reads(branch)) == [name if name == "b1" else f"1/{name}" for name in before]
    assert before.count("b1") == 1 and "a" in before
