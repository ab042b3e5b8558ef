"""Parts on rows, and layouts of their borders."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.trt.borders import channels_last_already, on_rows, set_layouts
from sluice.runtime.trt.build import build_engine
from tests.fake_tensorrt import fake_tensorrt

RNG = np.random.default_rng(3)
Sized = tuple[str, tuple[int, ...]]


def graph(
    nodes: Sequence[onnx.NodeProto], given: Sequence[Sized], made: Sequence[Sized], **weights: Any
) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in each]
        for each in (given, made)
    )
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    built = helper.make_graph(nodes, "part", inputs, outputs, held)
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def drawn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(kind: str, into: str, out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, into.split(), out.split(), name=f"{kind} {out}", **attributes)


def feed_forward() -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "a"), node("Add", "b a", "c"), node("Gelu", "c", "d"), node("Add", "d r", "s"),
             node("LayerNormalization", "s g", "y", axis=2)]  # fmt: skip
    given, made = [("x", (3, 5, 7)), ("r", (3, 5, 11))], [("y", (3, 5, 11)), ("s", (3, 5, 11))]
    return graph(nodes, given, made, w=drawn(7, 11), b=drawn(11), g=drawn(11))


def heads() -> onnx.ModelProto:
    """A product, a change to two heads and back, which works on no rows, and another product."""
    nodes = [node("MatMul", "x w", "a"), node("Reshape", "a to", "h"), node("Transpose", "h", "t", perm=[0, 2, 1, 3]),
             node("Transpose", "t", "u", perm=[0, 2, 1, 3]), node("Reshape", "u back", "c"),
             node("MatMul", "c v", "o"), node("Add", "o x", "y")]  # fmt: skip
    sizes = {"to": np.array([3, 5, 2, 4]), "back": np.array([3, 5, 8])}
    return graph(nodes, [("x", (3, 5, 7))], [("y", (3, 5, 7)), ("a", (3, 5, 8))], w=drawn(7, 8), v=drawn(8, 7), **sizes)


@pytest.mark.parametrize("make", [feed_forward, heads])
def test_a_part_on_rows_computes_the_same(make: Any) -> None:
    model = make()
    rows = on_rows(model)
    onnx.checker.check_model(rows, full_check=True)
    sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    ends = (*rows.graph.input, *rows.graph.output)
    assert [len(info.type.tensor_type.shape.dim) for info in ends] == [2] * len(ends)
    assert [info.name for info in ends] == [info.name for info in (*model.graph.input, *model.graph.output)]
    feeds = {name: drawn(*shape) for name, shape in sizes.items()}
    wanted = OrtRunner().build(model).run(feeds)
    found = OrtRunner().build(rows).run({name: value.reshape(-1, value.shape[-1]) for name, value in feeds.items()})
    for name, value in wanted.items():
        assert_close(found[name].reshape(value.shape), value, what=name)


def test_rows_in_the_other_order_compute_the_same() -> None:
    model = heads()
    rows = on_rows(model, positions_first=True)
    onnx.checker.check_model(rows, full_check=True)
    kinds = [n.op_type for n in rows.graph.node]
    assert kinds[1:3] == ["Reshape", "Transpose"] and kinds[-4:-2] == ["Transpose", "Reshape"]
    x = drawn(3, 5, 7)
    wanted = OrtRunner().build(model).run({"x": x})
    found = OrtRunner().build(rows).run({"x": x.transpose(1, 0, 2).reshape(15, 7)})
    for name, value in wanted.items():
        assert_close(found[name].reshape(5, 3, -1).transpose(1, 0, 2), value, what=name)
    alone = feed_forward()
    assert on_rows(alone, positions_first=True) is alone, "no region reads what others make"


def test_what_has_no_product_stays_as_it_is() -> None:
    lines = graph([node("Conv", "x w", "a"), node("Relu", "a", "y")], [("x", (3, 5, 9))], [("y", (3, 4, 7))],
                  w=drawn(4, 5, 3))  # fmt: skip
    norm = graph([node("LayerNormalization", "x g", "y")], [("x", (3, 5, 9))], [("y", (3, 5, 9))], g=drawn(9))
    product = graph([node("MatMul", "x z", "y")], [("x", (3, 5, 9)), ("z", (3, 9, 5))], [("y", (3, 5, 5))])
    table = graph([node("MatMul", "x w", "a"), node("Add", "a p", "y")], [("x", (3, 5, 9))], [("y", (3, 5, 4))],
                  w=drawn(9, 4), p=drawn(1, 5, 4))  # fmt: skip
    assert all(on_rows(model) is model for model in (lines, norm, product))
    # What is added to every example alike is added to no row alike: it reads lines.
    assert [n.op_type for n in on_rows(table).graph.node] == ["MatMul", "Reshape", "Add"]


def test_images_that_have_their_channels_last_are_told() -> None:
    nodes = [node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("LayerNormalization", "t g", "n"),
             node("MatMul", "n w", "m"), node("Transpose", "m", "y", perm=[0, 3, 1, 2]),
             node("Relu", "y", "z")]  # fmt: skip
    model = graph(nodes, [("x", (2, 5, 3, 4))], [("n", (2, 3, 4, 5)), ("m", (2, 3, 4, 6)), ("z", (2, 6, 3, 4))],
                  g=drawn(5), w=drawn(5, 6))  # fmt: skip
    told = channels_last_already(model)
    assert {"n", "m", "t"} <= told and not {"x", "y", "z"} & told
    assert on_rows(model) is model  # of four axes


@pytest.mark.parametrize(
    ("kind", "channels", "formats"),
    [("HALF", 16, {"HWC8"}), ("HALF", 4, {"HWC8", "HWC"}), ("FLOAT", 4, {"HWC"}), ("INT8", 3, {"HWC16"})],
)
def test_layouts_with_the_channels_last(kind: str, channels: int, formats: set[str]) -> None:
    names = ("HWC", "HWC8", "HWC16")
    trt = SimpleNamespace(TensorFormat=SimpleNamespace(**{name: k + 3 for k, name in enumerate(names)}))
    ports = [
        SimpleNamespace(name=name, dtype=SimpleNamespace(name=kind), shape=shape, allowed_formats=0)
        for name, shape in (("x", (2, channels, 3, 4)), ("plain", (2, channels, 3, 4)), ("lines", (2, 3, channels)))
    ]
    network = SimpleNamespace(num_inputs=3, num_outputs=0, get_input=ports.__getitem__)
    set_layouts(trt, network, {"plain"})
    wanted = sum(1 << (k + 3) for k, name in enumerate(names) if name in formats)
    assert [port.allowed_formats for port in ports] == [wanted, 0, 0]


def test_what_is_plain_in_the_network_has_no_layout() -> None:
    model = graph([node("Relu", "x", "y")], [("x", (2, 8, 3, 4))], [("y", (2, 8, 3, 4))])
    trt = fake_tensorrt()
    build_engine(trt, model, part=True)
    assert trt.calls["formats"].keys() == {"x", "y"}
    for ends in (model.graph.output, model.graph.input):
        ends[0].doc_string = PLAIN
        build_engine(trt, model, part=True)
        assert ends[0].name not in trt.calls["formats"]
    assert trt.calls["formats"] == {}
