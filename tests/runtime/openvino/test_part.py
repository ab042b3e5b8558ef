"""Parts run the kernels that they have inside the network, as far as kind, implementation, types and layouts go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.joints import find_joints, joint_models
from sluice.profiler.pieces.partition import build_piece, partition_graph
from sluice.profiler.pieces.sources import add_sources, source_model
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.openvino.part import inside, with_sources_apart
from sluice.runtime.openvino.runner import OpenVinoRunner
from sluice.runtime.ort.cpu import OrtRunner
from tests.device import chain
from tests.exported import named
from tests.runtime.openvino.test_runner import ABILITIES

BATCH = 2
N, H, W = 2, 5, 7


def graph(nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], channels: dict[str, int]) -> onnx.ModelProto:
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [N, c, H, W]) for name, c in channels.items()}
    made = {name for node in nodes for name in node.output}
    inputs, outputs = [i for n, i in info.items() if n not in made], [i for n, i in info.items() if n in made]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    parts = helper.make_graph(list(nodes), "part", inputs, outputs, tensors)
    return helper.make_model(parts, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weight(out: int, into: int, kernel: int = 1) -> np.ndarray:
    return np.random.default_rng(out).standard_normal((out, into, kernel, kernel)).astype(np.float32)


def convolution(channels: int = 21) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    return graph([node], {"w": weight(9, channels, 3)}, {"x": channels, "y": 9})


def in_network(part: onnx.ModelProto) -> Counter[Hashable]:
    session = OpenVinoRunner().build_part(part)
    assert session.sample(1) > 0 and session.kernels is not None
    return session.kernels


def kinds(found: Counter[Hashable]) -> Counter[Hashable]:
    """Without sizes, since an addition may go into either of two convolutions; without what casts at the borders."""
    result: Counter[Hashable] = Counter()
    for kernel, count in found.items():
        assert isinstance(kernel, tuple)
        result[kernel[:-1]] += count
    return result


CHANNELS_LAST = pytest.mark.skipif(
    not any(kernel[0] == "Convolution" and "acdb" in kernel for kernel in kinds(in_network(convolution()))),  # type: ignore[index]
    reason="OpenVINO lays activations out in blocks on this processor",
)
BF16 = pytest.param("bf16", marks=pytest.mark.skipif("BF16" not in ABILITIES, reason="no products in bf16"))


def apart_and_whole(name: str, precision: str) -> tuple[Counter[Hashable], Counter[Hashable]]:
    """Kernels of all pieces without those of their sources; of the network."""
    partition = partition_graph(named(name), BATCH)
    apart: Counter[Hashable] = Counter()
    for piece in partition.pieces:
        model, shapes = add_sources(build_piece(partition, piece, {}), piece.bare)
        apart.update(kinds(in_network(to_precision(model, precision, part=True, target="openvino"))))
        for shape in shapes:
            source = to_precision(source_model(shape), precision, part=True, target="openvino")
            apart.subtract(kinds(in_network(source)))
    whole = to_precision(partition.model, precision, target="openvino", part=True)
    return apart, kinds(in_network(whole))


@CHANNELS_LAST
@pytest.mark.parametrize("precision", ["fp32", BF16])
@pytest.mark.parametrize("name", ["concat", "splits"])
def test_small_networks_run_the_kernels_of_their_pieces(name: str, precision: str) -> None:
    apart, whole = apart_and_whole(name, precision)
    assert +apart == whole


@CHANNELS_LAST
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", BF16, "int8"])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vgg16_bn", "densenet", "resnet1d"])
def test_networks_run_the_kernels_of_their_pieces(name: str, precision: str) -> None:
    if (name, precision) == ("densenet", "int8"):
        with pytest.raises(SluiceError, match=r"^OpenVINO crashes on parts of networks that concatenate in int8"):
            apart_and_whole(name, precision)
        return
    apart, whole = apart_and_whole(name, precision)
    assert +apart == whole


@CHANNELS_LAST
def test_nothing_moves_at_the_borders() -> None:
    (kernel,) = in_network(convolution())
    assert isinstance(kernel, tuple) and kernel[0] == "Convolution"
    plainly = OpenVinoRunner().build(convolution())._engine.get_runtime_model().get_ordered_ops()
    assert sum(node.get_rt_info()["layerType"].astype(str) == "Reorder" for node in plainly) == 2


def test_concatenated_inputs_are_like_others() -> None:
    marked = convolution()
    marked.graph.input[0].doc_string = PLAIN
    assert in_network(marked) == in_network(convolution())


def channels_last(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(value, 1, -1))


def test_a_part_computes_the_same() -> None:
    """One number of each output, from inputs with the channels last."""
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["z", "w"], ["b"]),
        helper.make_node("Add", ["b", "a"], ["y"]),
    ]
    model = graph(nodes, {"v": weight(13, 21, 3), "w": weight(13, 1)}, {"x": 21, "z": 1, "y": 13, "a": 13})
    rng = np.random.default_rng(3)
    x, z = (rng.standard_normal((N, c, H, W)).astype(np.float32) for c in (21, 1))
    wanted = OrtRunner().build(model).run({"x": x, "z": z})
    found = OpenVinoRunner().build(inside(with_sources_apart(model))).run({"x": channels_last(x), "z": z})
    assert_close(found, {f"{name}:number": wanted[name][:1, :1, :1, :1] for name in ("y", "a")}, 1e-5)


def test_an_input_that_is_read_plainly_stays_plain() -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 6, c]) for name, c in (("x", 5), ("y", 4))]
    weights = [numpy_helper.from_array(np.ones((5, 4), np.float32), "w")]
    product = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "part", info[:1], info[1:], weights)
    session = OpenVinoRunner().build_part(
        helper.make_model(product, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    assert session._shapes == {"x": (2, 6, 5)}
    assert session.kernels is not None and not any("Transpose" in str(kernel) for kernel in session.kernels)
    assert session.sample(2) > 0


def additions(found: Counter[Hashable]) -> dict[int, int]:
    """Input channels of convolutions with and without an addition: how many operands they have."""
    sizes = [kernel[-1] for kernel in found if isinstance(kernel, tuple) and kernel[0] == "Convolution"]
    return {taken[0][1]: len(taken) for taken in sizes}


@CHANNELS_LAST
@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_source_takes_an_addition_in(order: list[str], precision: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["z", "w"], ["b"]),
        helper.make_node("Add", order, ["y"]),
    ]
    model = graph(nodes, {"v": weight(16, 21, 3), "w": weight(16, 1)}, {"x": 21, "z": 1, "y": 16})
    found = additions(in_network(to_precision(model, precision, part=True, target="openvino")))
    assert found[21] == found[1] + 1


@CHANNELS_LAST
def test_a_source_beside_no_convolution_takes_nothing_in() -> None:
    nodes = [
        helper.make_node("Conv", ["z", "w"], ["b"]),
        helper.make_node("Mul", ["x", "g"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    model = graph(nodes, {"w": weight(16, 1)}, {"x": 16, "g": 16, "z": 1, "y": 16})
    assert additions(in_network(model)) == {1: 2}


def test_a_part_that_concatenates_in_int8_is_refused() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Concat", ["a", "z"], ["c"], axis=1),
        helper.make_node("Conv", ["c", "v"], ["y"]),
    ]
    model = graph(nodes, {"w": weight(4, 3), "v": weight(5, 6)}, {"x": 3, "z": 2, "y": 5})
    assert in_network(model)
    quantised = to_precision(model, "int8", part=True, target="openvino")
    reason = "^OpenVINO crashes on parts of networks that concatenate in int8, as at 'c.*'; choose another precision"
    with pytest.raises(SluiceError, match=reason):
        OpenVinoRunner().build_part(quantised)


def test_a_product_alone_is_taken_in_integers() -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, c]) for name, c in (("x", 8), ("y", 4))]
    weights = [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")]
    product = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"])], "part", info[:1], info[1:], weights)
    model = helper.make_model(product, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    quantised = to_precision(model, "int8", part=True, target="openvino")
    found = [k for k in in_network(quantised) if isinstance(k, tuple) and k[0] in ("FullyConnected", "MatMul")]
    assert [kernel[2] for kernel in found if isinstance(kernel, tuple)] == ["u8"]


@CHANNELS_LAST
def test_joined_convolutions_run_the_kernels_that_they_run_apart() -> None:
    """So their joint is known without timing it (`sluice.profiler.pieces.joints`, 3)."""
    partition = partition_graph(chain([20, 13, 18]), BATCH)
    joints = [joint for joint in find_joints(partition) if joint.pair][:2]
    assert len(joints) == 2
    for joint in joints:
        parts, whole, shapes = joint_models(partition, joint, partition.dense)
        assert not shapes
        assert sum(map(in_network, parts), Counter()) == in_network(whole)
