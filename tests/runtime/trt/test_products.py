"""Convolutions of a part that its engine computes as products, and copies: written on rows they compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import pytest

from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.trt.inspect import EngineLayer, Tensor, node_name
from sluice.runtime.trt.products import products_on_rows, without_copies
from tests.runtime.trt.test_borders import drawn, graph, node

N, C, H, W = 2, 7, 3, 5
LAYOUT = "NHWC"


def layer(name: str, nodes: Iterable[onnx.NodeProto], read: tuple[int, ...], made: tuple[int, ...]) -> EngineLayer:
    reads, writes = ((Tensor("", shape, "Half", LAYOUT),) for shape in (read, made))
    return EngineLayer(name, "kgen", tuple(node_name(own) for own in nodes), reads, writes)


def told(model: onnx.ModelProto, channels: int, copied: bool = True) -> list[EngineLayer]:
    """The layers of an engine that computes all convolutions of a part as products, and copies the last result."""
    found = [
        layer(f"fc {own.output[0]}", [own], (N, C, H * W), (N, channels, H * W))
        for own in model.graph.node
        if own.op_type == "Conv"
    ]
    return [*found, *([layer("copy", [], (N, channels, H * W), (N, channels, H, W))] if copied else [])]


def compared(model: onnx.ModelProto, rows: onnx.ModelProto) -> None:
    """Both compute the same, and ends that lie in rows hold the rows of the others' pixels."""
    onnx.checker.check_model(rows, full_check=True)
    feeds = {i.name: drawn(*(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in model.graph.input}
    flat = {i.name: len(i.type.tensor_type.shape.dim) == 2 for i in rows.graph.input}
    pixels = {name: x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) if flat[name] else x for name, x in feeds.items()}
    found = OrtRunner().build(rows).run(pixels)
    for name, value in OrtRunner().build(model).run(feeds).items():
        made = found[name]
        if made.ndim == 2:
            made = made.reshape(value.shape[0], *value.shape[2:], -1).transpose(0, 3, 1, 2)
        assert_close(made, value, what=name)


def residual() -> onnx.ModelProto:
    """A product with its residual, and an end of bounds."""
    nodes = [node("Conv", "x w b", "a"), node("Add", "a r", "s"), node("Clip", "s low high", "y")]
    return graph(nodes, [("x", (N, C, H, W)), ("r", (N, 6, H, W))], [("y", (N, 6, H, W))], w=drawn(6, C, 1, 1),
                 b=drawn(6), low=np.float32(-0.5), high=np.float32(0.5))  # fmt: skip


def behind_another() -> onnx.ModelProto:
    """A convolution of 3x3 whose result goes into a product, and out."""
    nodes = [node("Conv", "x v", "h", pads=[1, 1, 1, 1]), node("Relu", "h", "g"), node("Conv", "g w", "a"),
             node("Relu", "a", "y")]  # fmt: skip
    return graph(nodes, [("x", (N, C, H, W))], [("y", (N, 6, H, W)), ("g", (N, C, H, W))], v=drawn(C, C, 3, 3),
                 w=drawn(6, C, 1, 1))  # fmt: skip


def inner_reader() -> onnx.ModelProto:
    """A product that a pooling reads as well."""
    nodes = [node("Conv", "x w", "a"), node("Relu", "a", "y"), node("MaxPool", "y", "m", kernel_shape=[2, 2])]
    return graph(nodes, [("x", (N, C, H, W))], [("y", (N, 6, H, W)), ("m", (N, 6, H - 1, W - 1))], w=drawn(6, C, 1, 1))


@pytest.mark.parametrize(
    ("make", "kinds", "flat"),
    [
        (residual, ["MatMul", "Add", "Add", "Clip"], {"x", "r", "y"}),
        (behind_another, ["Conv", "Relu", "Transpose", "Reshape", "MatMul", "Relu"], {"y"}),
        (inner_reader, ["MatMul", "Relu", "Reshape", "Transpose", "MaxPool"], {"x", "y"}),
    ],
)
def test_what_is_copied_is_written_on_rows(
    make: Callable[[], onnx.ModelProto], kinds: list[str], flat: set[str]
) -> None:
    model = make()
    rows = products_on_rows(model, told(model, 6))
    assert [own.op_type for own in rows.graph.node] == kinds
    ends = (*rows.graph.input, *rows.graph.output)
    assert {info.name for info in ends if len(info.type.tensor_type.shape.dim) == 2} == flat
    assert [info.name for info in ends] == [info.name for info in (*model.graph.input, *model.graph.output)]
    compared(model, rows)


def test_a_plain_input_stays_an_image() -> None:
    model = residual()
    model.graph.input[1].doc_string = PLAIN
    rows = products_on_rows(model, told(model, 6))
    assert [len(info.type.tensor_type.shape.dim) for info in rows.graph.input] == [2, 4]
    compared(model, rows)


def test_an_output_that_is_plain_in_the_network_is_copied_there_too() -> None:
    model = residual()
    model.graph.output[0].doc_string = PLAIN
    assert products_on_rows(model, told(model, 6)) is model


def test_what_is_not_copied_stays_as_it_is() -> None:
    model = residual()
    assert products_on_rows(model, told(model, 6, copied=False)) is model
    other = [*told(model, 6, copied=False), layer("copy", [], (N, 5, H * W), (N, 5, H, W))]
    assert products_on_rows(model, other) is model, "of another tensor"


@pytest.mark.parametrize(
    ("weight", "attributes", "size"),
    [((6, C, 3, 3), {"pads": [1, 1, 1, 1]}, (H, W)), ((7, 1, 1, 1), {"group": 7}, (H, W)),
     ((6, C, 1, 1), {"strides": [2, 2]}, (2, 3))],
)  # fmt: skip
def test_other_convolutions_stay_as_they_are(
    weight: tuple[int, ...], attributes: dict[str, list[int]], size: tuple[int, int]
) -> None:
    made = (N, weight[0], *size)
    model = graph([node("Conv", "x w", "y", **attributes)], [("x", (N, C, H, W))], [("y", made)], w=drawn(*weight))
    kernel = layer("fc", model.graph.node, (N, C, H * W), (*made[:2], size[0] * size[1]))
    copy = layer("copy", [], (*made[:2], size[0] * size[1]), made)
    assert products_on_rows(model, [kernel, copy]) is model


def test_copies_are_no_kernels_of_the_network() -> None:
    model = residual()
    first, copy = told(model, 6)
    other = layer("laid out anew", [], (N, 6, H, W), (N, 6, H, W))
    assert without_copies([first, copy, other]) == [first, other]
