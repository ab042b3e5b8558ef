"""Graphs that one engine is made of have one structure, and no others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.pipeline.pairs import structure
from tests.device import chain


def two_branches(
    order: tuple[int, ...] = (0, 1, 2, 3, 4),
    prefix: str = "",
    scale: float = 1.0,
    pads: int = 1,
    shape: tuple[int, ...] = (2, -1),
    group: int | None = None,
    operator: str = "Relu",
    kind: int = TensorProto.FLOAT,
    twice: bool = False,
) -> onnx.ModelProto:
    """Two convolutions of one input, added and reshaped; what one branch computes is computed again if ``twice``."""
    weights = [
        numpy_helper.from_array(np.full((3, 3, 3, 3), scale, np.float32), prefix + "w"),
        numpy_helper.from_array(np.array(shape, np.int64), prefix + "shape"),
    ]
    given = {} if group is None else {"group": group}
    nodes = [
        helper.make_node("Conv", [prefix + "x", prefix + "w"], [prefix + "a"], pads=[pads] * 4, **given),
        helper.make_node("Conv", [prefix + "x", prefix + "w"], [prefix + "b"], pads=[1] * 4, dilations=[1, 1]),
        helper.make_node(operator, [prefix + "b"], [prefix + "c"]),
        helper.make_node("Add", [prefix + "a", prefix + ("a" if twice else "c")], [prefix + "d"]),
        helper.make_node("Reshape", [prefix + "d", prefix + "shape"], [prefix + "y"]),
    ]
    graph = helper.make_graph(
        [nodes[k] for k in order],
        "graph",
        [helper.make_tensor_value_info(prefix + "x", kind, ["N", 3, 5, 7])],
        [helper.make_tensor_value_info(prefix + "y", kind, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    "other",
    [
        {"prefix": "other."},
        {"scale": 7.0},
        {"group": 1},
        {"order": (1, 2, 0, 3, 4)},
        {"prefix": "z", "scale": 2.0, "group": 1, "order": (1, 0, 2, 3, 4)},
    ],
)
def test_names_values_defaults_and_order_do_not_count(other: dict[str, object]) -> None:
    assert structure(two_branches(**other)) == structure(two_branches())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        {"pads": 2},
        {"shape": (1, -1)},
        {"group": 3},
        {"operator": "Sigmoid"},
        {"kind": TensorProto.FLOAT16},
        {"twice": True},
    ],
)
def test_what_an_engine_computes_counts(other: dict[str, object]) -> None:
    assert structure(two_branches(**other)) != structure(two_branches())  # type: ignore[arg-type]


def test_widths_and_operators_that_nobody_reads_count() -> None:
    widths = {structure(chain([31, 18, k])) for k in (9, 10, 11)}
    assert len(widths) == 3
    longer = chain([31, 18, 9])
    longer.graph.node.append(helper.make_node("Relu", ["x"], ["unread"]))
    assert structure(longer) not in widths
