"""A device whose milliseconds are computed from the graph, and hand-made graphs for it.

An engine's time is the sum of its operators' times, so what is measured of pieces must add up exactly to what is
measured of the whole. What tests check with it is what is done with times, not how they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.passes.graph.static_shapes import static_graph
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.timing.reference_engine import reference_model
from sluice.runtime.base.runner import Clock
from sluice.runtime.ort.cpu import OrtRunner

if TYPE_CHECKING:
    import pytest

__all__ = [
    "FINGERPRINT",
    "REFERENCE_MS",
    "FakeRunner",
    "FakeSession",
    "SeeingRunner",
    "chain",
    "line",
    "operator_ms",
    "profile_on",
    "staircase",
]

REFERENCE_MS = 0.4
FINGERPRINT = Fingerprint("a fake device", "fake", "0", 1, "fp32", 2, "thread_cpu")
# (in channels, out channels, everything else that multiplies) -> milliseconds of a convolution or matrix product
Cost = Callable[[int, int, float], float]


def line(into: int, out: int, rest: float) -> float:
    return 1e-6 * into * out * rest


def staircase(step: int, penalty: float = 1.0) -> Cost:
    """Channels are computed in blocks of ``step``; a width not divisible by 4 costs ``penalty`` times as much."""

    def blocks(width: int) -> float:
        return step * math.ceil(width / step) * (penalty if width % 4 and width > 3 else 1.0)

    return lambda into, out, rest: 1e-6 * blocks(into) * blocks(out) * rest


def operator_ms(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]], cost: Cost) -> float:
    """Milliseconds of one operator; what is no convolution or matrix product costs 1 ns per element."""
    out = shapes[node.output[0]]
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        weight = shapes[node.input[1]]
        kernel = math.prod(weight[2:]) if node.op_type == "Conv" else 1
        return cost(shapes[node.input[0]][1], out[1], out[0] * math.prod(out[2:]) * kernel)
    return 1e-6 * math.prod(out)


class FakeSession:
    """An engine that takes ``ms``, and computes what ``model`` says."""

    clock: Clock = "thread_cpu"

    def __init__(self, ms: float, model: onnx.ModelProto | None = None) -> None:
        self.ms, self.model = ms, model

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return OrtRunner().build(self.model).run(feeds)

    def sample(self, repeats: int) -> float:
        return self.ms


class FakeRunner:
    """Builds engines that take the sum of their operators' times, ``slower`` times as long.

    ``built`` counts them (the reference apart); the one numbered ``fail_at`` cannot be built.
    """

    clock: Clock = "thread_cpu"
    device = FINGERPRINT.device
    version = FINGERPRINT.runtime_version

    def __init__(self, cost: Cost = line, slower: Callable[[float], float] = float, fail_at: int | None = None) -> None:
        self.cost, self.slower, self.fail_at, self.built = cost, slower, fail_at, 0

    def ms(self, model: onnx.ModelProto, batch: int = 2) -> float:
        graph = static_graph(model, batch).graph
        shapes: dict[str, Sequence[int]] = {init.name: list(init.dims) for init in graph.initializer}
        for info in [*graph.input, *graph.value_info, *graph.output]:
            shapes[info.name] = [d.dim_value for d in info.type.tensor_type.shape.dim]
        return self.slower(sum(operator_ms(node, shapes, self.cost) for node in graph.node))

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        if model.graph.name == reference_model().graph.name:
            return FakeSession(REFERENCE_MS)
        if self.built == self.fail_at:
            raise KeyboardInterrupt("killed")
        self.built += 1
        return FakeSession(self.ms(model, batch or 2), model)


def chain(
    widths: Sequence[int],
    *,
    batch: int | str = 2,
    size: int = 9,
    kernel: int = 3,
    stride: int = 1,
    pads: int = 1,
    activation: str = "Relu",
    prefix: str = "",
) -> onnx.ModelProto:
    """Convolutions 3 -> widths, each with an activation, then the mean over space and a matrix product to 5."""
    rng = np.random.default_rng(len(widths))
    nodes, weights = [], []
    into, x = 3, "x"

    def weight(name: str, *shape: int) -> str:
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(values, prefix + name))
        return prefix + name

    for k, out in enumerate(widths):
        operands = [x, weight(f"conv{k}.weight", out, into, kernel, kernel), weight(f"conv{k}.bias", out)]
        nodes.append(helper.make_node("Conv", operands, [f"{prefix}c{k}"], pads=[pads] * 4, strides=[stride] * 2))
        nodes.append(helper.make_node(activation, [f"{prefix}c{k}"], [f"{prefix}a{k}"]))
        into, x = out, f"{prefix}a{k}"
    nodes.append(helper.make_node("GlobalAveragePool", [x], [f"{prefix}p"]))
    nodes.append(helper.make_node("Flatten", [f"{prefix}p"], [f"{prefix}f"]))
    nodes.append(
        helper.make_node("Gemm", [f"{prefix}f", weight("fc.weight", 5, into), weight("fc.bias", 5)], ["y"], transB=1)
    )
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class SeeingRunner(FakeRunner):
    """Keeps every model that it builds an engine of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[onnx.ModelProto] = []

    def build(self, model: onnx.ModelProto, **shapes: object) -> FakeSession:  # type: ignore[override]
        self.seen.append(model)
        return super().build(model, **shapes)  # type: ignore[arg-type]


def profile_on(runner: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    """Profiles are made on what ``runner(target, threads)`` makes, and measure there."""
    from sluice.profiler import profile, view

    for module in (profile, view):
        patch.setattr(module, "make_runner", runner)
