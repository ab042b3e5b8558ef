"""Images of parts with their channels last: they compute the same, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from benchmarks.roofline_device import RooflineRunner
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.trt import build
from sluice.runtime.trt.borders import averaged
from sluice.runtime.trt.images import TO_FIRST, TO_LAST, channels_last
from tests.rtx import INSTALLED
from tests.runtime.trt.test_borders import drawn, graph, node

N, C, H, W = 2, 6, 3, 5


def block(width: int = C, size: tuple[int, int, int] = (N, H, W), norm: bool = True) -> onnx.ModelProto:
    """The end of a block of ConvNeXt: a product, a factor by channel, the residual, and a norm of what follows."""
    n, h, w = size
    nodes = [node("MatMul", "x w", "a"), node("Transpose", "a", "t", perm=TO_FIRST), node("Mul", "g t", "m"),
             node("Add", "r m", "s")]  # fmt: skip
    made = [("s", (n, width, h, w))]
    if norm:
        nodes += [node("Transpose", "s", "u", perm=TO_LAST), node("LayerNormalization", "u b", "y", axis=-1)]
        made = [("y", (n, h, w, width))]
    given = [("x", (n, h, w, 4 * width)), ("r", (n, width, h, w))]
    weights = {"w": drawn(4 * width, width), "g": drawn(width, 1, 1)} | ({"b": drawn(width)} if norm else {})
    return graph(nodes, given, made, **weights)


def chained() -> onnx.ModelProto:
    """Two components, of which the second begins where a norm ends, and bounds that are scalars."""
    model = block()
    model.graph.node.extend([node("Transpose", "y", "v", perm=TO_FIRST), node("Clip", "v low", "c"),
                             node("Add", "c q", "z")])  # fmt: skip
    held = graph([], [("q", (N, C, H, W))], [("z", (N, C, H, W))], low=np.float32(-0.25))
    model.graph.input.extend(held.graph.input)
    model.graph.output.extend(held.graph.output)
    model.graph.initializer.extend(held.graph.initializer)
    return model


def last(value: np.ndarray) -> np.ndarray:
    return value.transpose(TO_LAST)


@pytest.mark.parametrize(
    ("make", "turned"),
    [(block, {"r"}), (lambda: block(norm=False), {"r", "s"}), (chained, {"r", "q", "z"})],
)
def test_components_compute_the_same(make: Callable[[], onnx.ModelProto], turned: set[str]) -> None:
    model = make()
    before = model.SerializeToString()
    found, told = channels_last(model)
    assert told == turned and model.SerializeToString() == before
    onnx.checker.check_model(found, full_check=True)
    assert "Transpose" not in {n.op_type for n in found.graph.node}
    assert [n.name for n in found.graph.node] == [n.name for n in model.graph.node if n.op_type != "Transpose"]
    feeds = {i.name: drawn(*(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in model.graph.input}
    wanted = OrtRunner().build(model).run(feeds)
    have = OrtRunner().build(found).run({name: last(x) if name in turned else x for name, x in feeds.items()})
    assert have.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(have[name], last(value) if name in turned else value, what=name)


def read_by_a_convolution() -> onnx.ModelProto:
    model = block()
    held = graph([], [], [("o", (N, 3, H, W))], k=drawn(3, C, 1, 1))
    model.graph.node.append(node("Conv", "s k", "o"))
    model.graph.output.extend(held.graph.output)
    model.graph.initializer.extend(held.graph.initializer)
    return model


def plain_in_the_network() -> onnx.ModelProto:
    model = block()
    model.graph.input[1].doc_string = PLAIN
    return model


def an_end_in_both_forms() -> onnx.ModelProto:
    model = block()
    model.graph.output.append(helper.make_tensor_value_info("t", 1, (N, C, H, W)))
    return model


def without_a_norm() -> onnx.ModelProto:
    """Four axes that are heads and positions, it may be."""
    nodes = [
        node("Transpose", "x", "t", perm=TO_FIRST),
        node("Add", "t r", "s"),
        node("Transpose", "s", "y", perm=TO_LAST),
    ]
    return graph(nodes, [("x", (N, H, W, C)), ("r", (N, C, H, W))], [("y", (N, H, W, C))])


def by_position() -> onnx.ModelProto:
    """A constant that differs by pixel is no factor of the last axis."""
    model = block()
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(drawn(1, 1, H, W), "g"))
    return model


@pytest.mark.parametrize(
    "make", [read_by_a_convolution, plain_in_the_network, an_end_in_both_forms, without_a_norm, by_position]
)
def test_what_needs_its_channels_elsewhere_stays(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    onnx.checker.check_model(model, full_check=True)
    found, told = channels_last(model)
    assert found is model and not told


@pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")
def test_a_large_norm_takes_the_residual_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the engine of a network; as the file has it, the addition is a kernel of its own."""
    runner = RooflineRunner()
    monkeypatch.setattr(build.listener(runner.trt), "notes", runner.notes)
    part = block(40, (8, 16, 16))
    assert len(runner.build(part).list) == 3
    assert len(runner.build_part(part).list) == 2


def squeezed(size: int, channels: int = 16) -> onnx.ModelProto:
    """A convolution that others read, and the mean over its pixels."""
    nodes = [node("Conv", "x w", "a"), node("Mul", "a f", "s"), node("GlobalAveragePool", "s", "m")]
    made = [("s", (8, channels, size, size)), ("m", (8, channels, 1, 1))]
    return graph(nodes, [("x", (8, channels, size, size))], made, w=drawn(channels, channels, 1, 1),
                 f=drawn(1, channels, 1, 1))  # fmt: skip


@pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("size", [7, 28])
def test_an_averaged_image_is_plain(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between others in a network it has the same kernels as in the part, and none that clears partial sums."""
    runner = RooflineRunner()
    monkeypatch.setattr(build.listener(runner.trt), "notes", runner.notes)
    part = squeezed(size)
    assert averaged(part) == {"s"}
    assert all(kernel.reads for kernel in runner.build_part(part).list)
    half = to_precision(part, "fp16", part=True, target="tensorrt")
    assert averaged(half) == set()
