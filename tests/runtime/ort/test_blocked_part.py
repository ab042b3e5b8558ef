from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.inputs import Shapes
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.blocked_part import ADDED, PROVIDER, block_size, kernels, outputs_inside, without_reorders
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.ort.session import compute, load_session

N, H, W = 2, 5, 7
BLOCKS = pytest.mark.skipif(block_size() == 1, reason="this processor has no blocked layout")


def graph(nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], channels: dict[str, int]) -> onnx.ModelProto:
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [N, c, H, W]) for name, c in channels.items()}
    made = {name for node in nodes for name in node.output}
    inputs, outputs = [i for n, i in info.items() if n not in made], [i for n, i in info.items() if n in made]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    parts = helper.make_graph(list(nodes), "part", inputs, outputs, tensors)
    return helper.make_model(parts, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weight(out: int, into: int, kernel: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, into, kernel, kernel)).astype(np.float32)


def residual(into: int, out: int) -> onnx.ModelProto:
    """y = relu(conv3x3(x)) + conv1x1(x)."""
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    return graph(nodes, {"v": weight(out, into, 3), "w": weight(out, into, 1, 1)}, {"x": into, "y": out})


def in_blocks(value: np.ndarray) -> np.ndarray:
    size = block_size()
    padded = np.pad(value, ((0, 0), (0, -value.shape[1] % size), (0, 0), (0, 0)))
    grouped = padded.reshape(value.shape[0], -1, size, *value.shape[2:]).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(grouped).reshape(padded.shape)


def plain(value: np.ndarray, channels: int) -> np.ndarray:
    size = block_size()
    grouped = value.reshape(value.shape[0], -1, *value.shape[2:], size).transpose(0, 1, 4, 2, 3)
    return grouped.reshape(value.shape)[:, :channels]


def computed(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """What a part computes in place of the shapes that it gives out."""
    session = load_session(without_reorders(model), Shapes(), PROVIDER, optimize=False)
    return compute(session, "part", {"x": x})


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@BLOCKS
@settings(max_examples=15, deadline=None)
@given(st.integers(4, 12), st.integers(1, 41))
def test_computes_the_same_on_blocks(quarter: int, out: int) -> None:
    into = max(4 * quarter, block_size())  # narrower inputs are read plainly
    model = residual(into, out)
    x = np.random.default_rng(2).standard_normal((N, into, H, W)).astype(np.float32)
    wanted = OrtRunner().build(model).run({"x": x})
    found = computed(model, in_blocks(x))
    assert_close({"y": plain(found["y"], out)}, wanted)


@BLOCKS
def test_takes_the_reorders_off_the_borders() -> None:
    into = block_size() + 4
    bare = without_reorders(residual(into, 24))
    assert "Conv" in operators(bare)
    assert not {"ReorderInput", "ReorderOutput"} & set(operators(bare))
    assert bare.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 2 * block_size()


@BLOCKS
def test_keeps_the_reorders_inside_and_what_is_read_plainly() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),  # has no blocked form
        helper.make_node("Conv", ["b", "w"], ["y"]),
        helper.make_node("Erf", ["x"], ["z"]),
    ]
    weights = {"v": weight(24, 32), "w": weight(32, 24)}
    model = graph(nodes, weights, {"x": 32, "y": 32, "z": 32})
    bare = without_reorders(model)
    assert operators(bare).count("ReorderInput") == 2  # of x, which Erf reads too, and of b
    assert operators(bare).count("ReorderOutput") == 1  # of a
    x = np.random.default_rng(3).standard_normal((N, 32, H, W)).astype(np.float32)
    wanted = OrtRunner().build(model).run({"x": x})
    found = computed(model, x)
    assert_close({"y": plain(found["y"], 32), "z": found["z"]}, wanted)


@BLOCKS
def test_what_is_plain_inside_the_network_is_laid_out_in_the_part() -> None:
    model = residual(32, 24)
    model.graph.input[0].doc_string = PLAIN
    assert operators(without_reorders(model)).count("ReorderInput") == 1
    assert "ReorderOutput" not in operators(without_reorders(model))
    x = np.random.default_rng(3).standard_normal((N, 32, H, W)).astype(np.float32)
    found = computed(model, x)
    assert_close({"y": plain(found["y"], 24)}, OrtRunner().build(model).run({"x": x}))


@BLOCKS
def test_an_output_that_is_read_inside_is_given_as_it_is_read() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["y"]),
        helper.make_node("Conv", ["y", "w"], ["z"]),
    ]
    model = graph(nodes, {"v": weight(24, 32), "w": weight(17, 24)}, {"x": 32, "y": 24, "z": 17})
    bare = without_reorders(model)
    assert operators(bare) == ["Conv", "Conv"]
    x = np.random.default_rng(3).standard_normal((N, 32, H, W)).astype(np.float32)
    wanted = OrtRunner().build(model).run({"x": x})
    found = computed(model, in_blocks(x))
    assert_close({"y": plain(found["y"], 24), "z": plain(found["z"], 17)}, wanted)


def test_what_is_plain_stays_plain() -> None:
    model = graph([helper.make_node("Erf", ["x"], ["y"])], {}, {"x": 3, "y": 3})
    assert operators(without_reorders(model)) == ["Erf"]
    x = np.random.default_rng(4).standard_normal((N, 3, H, W)).astype(np.float32)
    assert_close(computed(model, x), OrtRunner().build(model).run({"x": x}))


def test_a_transpose_that_is_fused_into_the_change_of_layout_stays() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "v"], ["c"]),
        helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 1]),
    ]
    model = graph(nodes, {"v": weight(24, 32)}, {"x": 32, "y": 24})
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [N, H, W, 32]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [N, H, W, 24]))
    x = np.random.default_rng(5).standard_normal((N, H, W, 32)).astype(np.float32)
    assert_close(computed(model, x), OrtRunner().build(model).run({"x": x}))


def test_kernels_are_told_apart_by_what_they_compute_and_not_by_names() -> None:
    one = helper.make_node("Conv", ["x", "v"], ["y"], name="a")
    same = helper.make_node("Conv", ["x", "v"], ["z"], name="b")
    padded = helper.make_node("Conv", ["x", "v"], ["y"], pads=[1, 1, 0, 0])
    model = graph([one], {"v": weight(24, 32)}, {"x": 32, "y": 24})
    both = graph([one, same], {"v": weight(24, 32)}, {"x": 32, "y": 24, "z": 24})
    others = [
        graph([one], {"v": weight(72, 32)}, {"x": 32, "y": 72}),
        graph([padded], {"v": weight(24, 32)}, {"x": 32, "y": 24}),
        graph([helper.make_node("Erf", ["x"], ["y"])], {}, {"x": 3, "y": 3}),
    ]
    found = kernels(without_reorders(model))
    assert found.total() == 1
    assert kernels(without_reorders(both)) == found + found
    assert OrtRunner().build_part(model).kernels == found
    assert OrtRunner().build(model).kernels is None
    assert all(kernels(without_reorders(other)) != found for other in others)


@pytest.mark.parametrize("into", [3, 40])
def test_a_part_gives_out_the_shapes_of_its_outputs(into: int) -> None:
    """So the convolution that adds to its sum may write over it, as in the network."""
    nodes = [*residual(into, 24).graph.node, helper.make_node("Erf", ["x"], ["z"])]
    model = graph(nodes, {"v": weight(24, into, 3), "w": weight(24, into)}, {"x": into, "y": 24, "z": into})
    session = OrtRunner().build_part(model)
    assert session.kernels == kernels(without_reorders(model))
    found = session.run({"x": np.ones((N, into, H, W), np.float32)})
    sizes = {name: value[[0, 2, 3]].tolist() for name, value in found.items()}
    assert sizes == {"y:shape": [N, H, W], "z:shape": [N, H, W]}
    before = operators(without_reorders(model))
    assert operators(outputs_inside(without_reorders(model))) == [*before, "Shape", "Shape"]


@BLOCKS
@pytest.mark.parametrize("order", [("y", "z"), ("z", "y")])
def test_what_is_added_to_is_not_needed_any_more(order: tuple[str, str], tmp_path: Path) -> None:
    """ONNX Runtime computes the addition z = conv(u) + t behind all others that read t, whichever comes first."""
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["t"]),
        helper.make_node("Conv", ["t", "w"], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["u"]),
        helper.make_node("Add", ["u", "t"], ["z"]),
    ]
    model = graph(nodes, {"v": weight(32, 32), "w": weight(32, 32, 1, 1)}, {"x": 32, "y": 32, "z": 32})
    outputs = {info.name: info for info in model.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(outputs[name] for name in order)
    inside = outputs_inside(without_reorders(model))
    (addition,) = (node.name for node in inside.graph.node if node.op_type == "Conv" and len(node.input) > ADDED)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(inside.SerializeToString(), options, providers=[PROVIDER])
    session.run(None, {"x": np.ones((N, 32, H, W), np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    run = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    convolutions = [node.name for node in inside.graph.node if node.op_type == "Conv"]
    assert [name for name in run if name in convolutions][-1] == addition


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_are_timed_like_engines(threads: int) -> None:
    session = OrtRunner(threads).build_part(residual(20, 24))
    assert session.clock == OrtRunner(threads).clock
    assert session.sample(2) > 0


def test_a_part_that_cannot_be_loaded() -> None:
    broken = graph([helper.make_node("Nonsense", ["x"], ["y"])], {}, {"x": 3, "y": 3})
    with pytest.raises(SluiceError, match="ONNX Runtime cannot load the model in memory"):
        OrtRunner().build_part(broken)
