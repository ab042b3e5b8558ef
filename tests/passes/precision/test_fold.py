"""Folding batch norms changes no number, whatever makes the tensor that is normalised."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sluice.passes.precision.fold import fold_batch_norms
from sluice.runtime.base.compare import assert_close
from tests.exported import arrays, named, ops, random_feeds, run

NORM = "BatchNormalization"


def network(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    x: tuple[int, ...],
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def norm(source: str, target: str, channels: int, seed: int = 0) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    names = [f"{target}.{kind}" for kind in ("weight", "bias", "mean", "var")]
    values = [*rng.standard_normal((3, channels), dtype=np.float32), rng.uniform(0.2, 3, channels).astype(np.float32)]
    node = helper.make_node(NORM, [source, *names], [target], epsilon=1e-3)
    return node, dict(zip(names, values, strict=True))


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


LAYERS = {
    "conv": ("Conv", (3, 4, 9, 7), (5, 4, 3, 2), True, 5, {}),
    "conv without bias": ("Conv", (3, 4, 9, 7), (5, 4, 3, 2), False, 5, {}),
    "grouped": ("Conv", (2, 6, 5, 7), (4, 3, 3, 3), True, 4, {"group": 2}),
    "depthwise": ("Conv", (2, 6, 5, 7), (6, 1, 3, 3), False, 6, {"group": 6}),
    "one axis": ("Conv", (2, 4, 9), (5, 4, 3), True, 5, {}),
    "transposed": ("ConvTranspose", (2, 4, 5, 3), (4, 7, 2, 3), True, 7, {"strides": [2, 1]}),
    "transposed, grouped": ("ConvTranspose", (2, 6, 5, 3), (6, 5, 2, 3), False, 10, {"group": 2}),
    "gemm": ("Gemm", (3, 4), (4, 7), True, 7, {}),
    "gemm, transposed": ("Gemm", (3, 4), (7, 4), True, 7, {"transB": 1}),
    "gemm, scaled": ("Gemm", (3, 4), (7, 4), True, 7, {"transB": 1, "alpha": 0.7, "beta": 1.9}),
    "matmul": ("MatMul", (3, 4), (4, 7), False, 7, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    kind, x, shape, bias, channels, attributes = LAYERS[name]
    after, constants = norm("a", "b", channels)
    constants["w"] = weight(*shape)
    if bias:
        constants["bias"] = weight(channels)
    layer = helper.make_node(kind, ["x", "w", "bias"] if bias else ["x", "w"], ["a"], **attributes)
    model = network([layer, after, helper.make_node("Relu", ["b"], ["y"])], constants, x)
    folded = fold_batch_norms(model)
    onnx.checker.check_model(folded, full_check=True)
    assert [n.op_type for n in folded.graph.node] == [kind, *(["Add"] if kind == "MatMul" else []), "Relu"]
    feeds = random_feeds(model)
    assert_close(run(folded, feeds), run(model, feeds), 1e-6)
    assert ops(model)[NORM] == 1, "the argument was changed"


@pytest.mark.parametrize("name", ["plain", "squeeze_excite", "transposed", "volume", "in_place", "concat"])
def test_networks(name: str) -> None:
    model = named(name)
    assert ops(model)[NORM]
    folded = fold_batch_norms(model)
    onnx.checker.check_model(folded, full_check=True)
    assert not ops(folded)[NORM]
    feeds = random_feeds(model)
    assert_close(run(folded, feeds), run(model, feeds), 1e-5)


def test_arithmetic_is_double() -> None:
    """A tiny variance and a large mean cancel: float32 arithmetic would lose two digits of the shift."""
    constants = {
        "w": np.full((1, 1, 1, 1), 3.1, np.float32),
        "bias": np.array([1234.567], np.float32),
        "n": np.array([0.3], np.float32),
        "m": np.array([0.1], np.float32),
        "mean": np.array([1234.5], np.float32),
        "var": np.array([1e-4], np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"]),
        helper.make_node(NORM, ["a", "n", "m", "mean", "var"], ["y"], epsilon=0.0),
    ]
    folded = arrays(fold_batch_norms(network(nodes, constants, (1, 1, 2, 3))))
    v = {k: float(a.reshape(-1)[0]) for k, a in constants.items()}
    scale = v["n"] / np.sqrt(v["var"])
    assert folded["bias"] == np.float32((v["bias"] - v["mean"]) * scale + v["m"])
    assert folded["w"].reshape(-1) == np.float32(v["w"] * scale)


@pytest.mark.parametrize("bias", [True, False])
def test_a_shared_weight_is_copied(bias: bool) -> None:
    first, constants = norm("a", "b", 4)
    second, more = norm("c", "d", 4, seed=1)
    constants |= more | {"w": weight(4, 4, 3, 3), "bias": weight(4)}
    operands = ["w", "bias"] if bias else ["w"]
    nodes = [
        helper.make_node("Conv", ["x", *operands], ["a"], pads=[1, 1, 1, 1]),
        first,
        helper.make_node("Conv", ["b", *operands], ["c"], pads=[1, 1, 1, 1]),
        second,
        helper.make_node("Conv", ["d", *operands], ["y"]),
    ]
    model = network(nodes, constants, (2, 4, 7, 5))
    folded = fold_batch_norms(model)
    assert ops(folded) == {"Conv": 3}
    assert len({node.input[1] for node in folded.graph.node}) == 3
    feeds = random_feeds(model)
    assert_close(run(folded, feeds), run(model, feeds), 1e-5)


def test_a_norm_whose_input_others_read_stands_apart() -> None:
    after, constants = norm("a", "b", 5)
    constants["w"] = weight(5, 4, 3, 2)
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), after, helper.make_node("Mul", ["a", "b"], ["y"])]
    for outputs in (("y",), ("y", "a")):
        model = network(nodes, constants, (3, 4, 9, 7), outputs)
        folded = fold_batch_norms(model)
        assert ops(folded) == {"Conv": 1, "Mul": 2, "Add": 1}
        feeds = random_feeds(model)
        assert_close(run(folded, feeds), run(model, feeds), 1e-6)


def test_norms_in_a_row_and_in_front() -> None:
    (one, a), (two, b), (three, c) = norm("x", "p", 4), norm("q", "r", 5, 1), norm("r", "y", 5, 2)
    nodes = [one, helper.make_node("Conv", ["p", "w"], ["q"]), two, three]
    model = network(nodes, a | b | c | {"w": weight(5, 4, 3, 2)}, (3, 4, 9, 7))
    folded = fold_batch_norms(model)
    assert ops(folded) == {"Mul": 1, "Add": 1, "Conv": 1}
    feeds = random_feeds(model)
    assert_close(run(folded, feeds), run(model, feeds), 1e-5)


def test_channels_of_a_3d_product_are_its_middle_axis() -> None:
    after, constants = norm("a", "y", 5)
    model = network([helper.make_node("MatMul", ["x", "w"], ["a"]), after], constants | {"w": weight(4, 7)}, (3, 5, 4))
    folded = fold_batch_norms(model)
    assert ops(folded) == {"MatMul": 1, "Mul": 1, "Add": 1}
    feeds = random_feeds(model)
    assert_close(run(folded, feeds), run(model, feeds), 1e-6)


def test_a_norm_that_is_not_constant_stays() -> None:
    after, constants = norm("a", "y", 5)
    constants["w"] = weight(5, 4, 1, 1)
    del constants["y.mean"]
    mean = helper.make_node("ReduceMax", ["a", "axes"], ["y.mean"], keepdims=0)
    constants["axes"] = np.array([0, 2, 3])
    model = network([helper.make_node("Conv", ["x", "w"], ["a"]), mean, after], constants, (3, 4, 5, 6))
    assert ops(fold_batch_norms(model))[NORM] == 1


@given(groups=st.integers(1, 4), into=st.integers(1, 3), out=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_groups_of_transposed_convolutions(groups: int, into: int, out: int, seed: int) -> None:
    after, constants = norm("a", "y", groups * out, seed)
    constants["w"] = weight(groups * into, out, 2, 3)
    layer = helper.make_node("ConvTranspose", ["x", "w"], ["a"], group=groups)
    model = network([layer, after], constants, (2, groups * into, 3, 5))
    feeds = random_feeds(model)
    assert_close(run(fold_batch_norms(model), feeds), run(model, feeds), 1e-5)
