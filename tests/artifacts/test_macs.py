from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sluice.artifacts.macs import count_macs
from sluice.models import enliven, example_inputs, resnet20
from sluice.passes.cut.export import finalize, to_onnx
from tests.device import chain


def single(
    op: str, x: Sequence[int | str], weight: Sequence[int], y: Sequence[int | str], **attributes: object
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "single",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.ones(weight, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("op", "x", "weight", "y", "attributes", "macs"),
    [
        ("Conv", ("N", 3, 9, 7), (5, 3, 3, 2), ("N", 5, 7, 6), {}, 5 * 7 * 6 * 3 * 3 * 2),
        ("Conv", ("N", 6, 9, 7), (6, 1, 3, 3), ("N", 6, 7, 5), {"group": 6}, 6 * 7 * 5 * 9),
        ("Conv", ("N", 6, 9, 7), (4, 3, 3, 3), ("N", 4, 7, 5), {"group": 2}, 4 * 7 * 5 * 3 * 9),
        ("Conv", ("N", 3, 11), (5, 3, 4), ("N", 5, 8), {}, 5 * 8 * 3 * 4),
        ("Conv", (4, 3, 11), (5, 3, 4), (4, 5, 8), {}, 4 * 5 * 8 * 3 * 4),  # a fixed batch counts
        ("ConvTranspose", ("N", 3, 5, 4), (3, 6, 2, 2), ("N", 6, 10, 8), {"strides": [2, 2]}, 3 * 5 * 4 * 6 * 4),
        ("ConvTranspose", ("N", 4, 5), (4, 3, 2), ("N", 6, 10), {"strides": [2], "group": 2}, 4 * 5 * 3 * 2),
        ("Gemm", ("N", 7), (5, 7), ("N", 5), {"transB": 1}, 5 * 7),
        ("Gemm", (7, "N"), (7, 5), ("N", 5), {"transA": 1}, 5 * 7),
        ("MatMul", ("N", 6, 7), (7, 5), ("N", 6, 5), {}, 6 * 5 * 7),
        ("Add", ("N", 7), (7,), ("N", 7), {}, 0),
    ],
)
def test_formula(
    op: str,
    x: Sequence[int | str],
    weight: Sequence[int],
    y: Sequence[int | str],
    attributes: Mapping[str, object],
    macs: int,
) -> None:
    if attributes.get("transA"):
        x, y = (7, 1), (1, 5)  # the batch is not the first axis
    assert count_macs(single(op, x, weight, y, **attributes)) == macs


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers(layer: type[nn.Module], gates: int) -> None:
    """Two layers of 5, in both directions, on 7 steps of 3 features."""
    exported = to_onnx(layer(3, 5, 2, bidirectional=True, batch_first=True).eval(), torch.rand(2, 7, 3))
    first, second = gates * 5 * (3 + 5), gates * 5 * (2 * 5 + 5)
    assert count_macs(exported) == 7 * 2 * (first + second)


def test_a_chain_by_hand() -> None:
    first, second = 10 * 9 * 9 * 3 * 9, 7 * 9 * 9 * 10 * 9
    assert count_macs(chain([10, 7], batch="N")) == first + second + 7 * 5
    assert count_macs(chain([10, 7], batch=3)) == 3 * (first + second + 7 * 5)


def test_resnet20_before_and_after_folding() -> None:
    """16-32-64 channels on 28x28: stem, three stages of six 3x3 convolutions, 1x1 shortcuts where the width changes."""
    (x,) = example_inputs("resnet20", 2)
    exported = to_onnx(enliven(resnet20(), 0, (x,)), x)
    convolutions = {init.name: tuple(init.dims) for init in exported.graph.initializer if len(init.dims) == 4}
    sizes = {16: 28, 32: 14, 64: 7}
    by_hand = sum(o * i * h * w * sizes[o] ** 2 for o, i, h, w in convolutions.values())
    (head,) = [tuple(init.dims) for init in exported.graph.initializer if len(init.dims) == 2]
    assert count_macs(exported) == by_hand + head[0] * head[1]
    assert count_macs(finalize(exported)) == count_macs(exported)
