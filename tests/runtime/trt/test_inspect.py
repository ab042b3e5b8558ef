"""Engine layers back to pieces: hand-written samples of both layouts of the inspector's JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.partition import partition_graph
from sluice.runtime.trt.inspect import EngineLayer, Tensor, node_name, owners, place_pieces, read_layers
from tests.device import chain

BETWEEN = {"10": "\x1e", "11": "\x1f"}


def tensor(layout: str, name: str, channels: int) -> dict[str, Any]:
    common = {"Name": name, "Dimensions": [2, channels, 9, 9]}
    if layout == "10":
        return common | {"Format/Datatype": "Half"}
    return common | {"Strides": [1, 1, 1, 1], "Datatype": "Half", "Format": "(NHWC) Channel major format"}


def information(layout: str) -> str:
    """A reformat, a fused convolution, one that lies across two pieces, and a layer made of one node twice."""
    x, a0, y = tensor(layout, "x", 3), tensor(layout, "a0", 5), tensor(layout, "y", 7)
    between = BETWEEN[layout]
    layers = [
        {"Name": "Reformatting CopyNode for x", "LayerType": "Reformat", "Inputs": [x], "Outputs": [x]},
        {"Name": "c0 + a0", "LayerType": "CaskConvolution", "Inputs": [x], "Outputs": [a0], "TacticName": "sm90_xmma",
         "StreamId": 0, "Metadata": f"[ONNX Layer: node_of_c0]{between}[ONNX Layer: node_of_a0]"},
        {"Name": "{ForeignNode[c1...p]}", "LayerType": "Myelin", "Inputs": [a0], "Outputs": [y],
         "Metadata": f"[ONNX Layer: node_of_c1]{between}[ONNX Layer: node_of_p]{between}[ONNX Layer: node_of_y]"},
        {"Name": "twice", "LayerType": "kgen", "Inputs": [y], "Outputs": [y],
         "Metadata": "[ONNX Layer: node_of_y] [ONNX Layer: node_of_y][ONNX Layer: elsewhere]"},
    ]  # fmt: skip
    own = {"Bindings": ["x", "y"]} if layout == "10" else {"I/O Tensors": [{"Name": "x", "IOMode": "Input"}]}
    return json.dumps({"Layers": layers, **own})


@pytest.mark.parametrize("layout", BETWEEN)
def test_layers_of_both_layouts(layout: str) -> None:
    copy, conv, foreign, twice = read_layers(information(layout))
    place = "" if layout == "10" else "(NHWC) Channel major format"
    shape = (2, 3, 9, 9)
    assert copy == EngineLayer(
        "Reformatting CopyNode for x",
        "Reformat",
        (),
        (Tensor("x", shape, "Half", place),),
        (Tensor("x", shape, "Half", place),),
    )
    assert (conv.kind, conv.tactic, conv.nodes) == ("CaskConvolution", "sm90_xmma", ("node_of_c0", "node_of_a0"))
    assert conv.outputs == (Tensor("a0", (2, 5, 9, 9), "Half", place),)
    assert foreign.nodes == ("node_of_c1", "node_of_p", "node_of_y")
    assert twice.nodes == ("node_of_y", "elsewhere")


@pytest.mark.parametrize("layout", BETWEEN)
def test_pieces_and_the_layers_that_hold_them(layout: str) -> None:
    owner = {
        "node_of_c0": "conv0",
        "node_of_a0": "conv0",
        "node_of_c1": "conv1",
        "node_of_p": "conv1",
        "node_of_y": "fc",
    }
    placed = place_pieces(read_layers(information(layout)), {**owner, "node_of_z": "lost"})
    assert placed.pieces == {
        "conv0": ("c0 + a0",),
        "conv1": ("{ForeignNode[c1...p]}",),
        "fc": ("{ForeignNode[c1...p]}", "twice"),
        "lost": (),
    }
    assert placed.shared == {"{ForeignNode[c1...p]}": ("conv1", "fc")}
    assert placed.own == ("Reformatting CopyNode for x",)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "Layers:\nName: x", '{"Bindings": []}'])
def test_what_is_not_the_inspectors_json_is_refused(text: str) -> None:
    with pytest.raises(SluiceError, match="ask it for the format JSON"):
        read_layers(text)


def test_an_engine_without_descriptions_is_refused() -> None:
    with pytest.raises(SluiceError, match="DETAILED"):
        read_layers(json.dumps({"Layers": ["conv0", "conv1"], "Bindings": ["x"]}))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_nodes_of_the_deployed_model_find_their_piece(precision: str) -> None:
    """Casts and quantizers go with what they serve; the convolutions keep their weights' names."""
    found = partition_graph(chain([5, 7, 11], prefix="n."), 2)
    deployed = to_precision(finalize(found.model), precision, target="tensorrt")
    owner = owners(deployed.graph, {piece.name: piece.model.graph for piece in found.pieces})
    assert list(owner) and set(owner) == {node_name(node) for node in deployed.graph.node}
    convolutions = [node for node in deployed.graph.node if node.op_type == "Conv"]
    assert [owner[node_name(node)] for node in convolutions] == ["n.conv0", "n.conv1", "n.conv2"]
    relus = [node for node in deployed.graph.node if node.op_type == "Relu"]
    assert [owner[node_name(node)] for node in relus] == ["n.conv0", "n.conv1", "n.conv2"]
    (gemm,) = [node for node in deployed.graph.node if node.op_type == "Gemm"]
    assert owner[node_name(gemm)] == "n.fc"


def graph(*nodes: onnx.NodeProto, weights: str = "") -> onnx.GraphProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    tensors = [numpy_helper.from_array(np.ones(1, np.float32), name) for name in weights.split()]
    return helper.make_graph(nodes, "g", [value], [value], tensors)


def test_where_the_names_are_gone_tensors_and_neighbours_decide() -> None:
    pieces = {
        "one": graph(helper.make_node("Conv", ["x", "w1", "s"], ["t1"], "first"), weights="w1 s"),
        "two": graph(helper.make_node("Conv", ["t1", "w2", "s"], ["t2"], "second"), weights="w2 s"),
    }
    deployed = graph(
        helper.make_node("Cast", ["x"], ["x16"]),  # of what reads it
        helper.make_node("Cast", ["s"], ["s16"], "shared"),  # a weight of both: of what reads it
        helper.make_node("Conv", ["x16", "w1"], ["renamed"], "fused"),  # by its weight
        helper.make_node("Relu", ["renamed"], ["middle"], "inserted"),  # of what it reads
        helper.make_node("Conv", ["middle", "new", "s16"], ["t2"], "other"),  # by its output
        helper.make_node("Neg", ["t2"], ["end"], "first"),  # its name wins
        helper.make_node("Constant", [], ["nobody"], "alone"),
    )
    assert owners(deployed, pieces) == {
        "node_of_x16": "one",
        "shared": "two",
        "fused": "one",
        "inserted": "one",
        "other": "two",
        "first": "one",
    }
