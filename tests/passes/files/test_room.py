"""Memory of a run follows the file: as many examples at once as its weights leave room for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sluice.passes.files import room
from sluice.passes.files.read import read_onnx_file
from sluice.passes.files.room import examples_at_once, room_of, values_in_memory
from sluice.passes.files.rows import BATCH, rows_of

FLOAT = onnx.TensorProto.FLOAT


def two_branches() -> onnx.ModelProto:
    """x (n, 5) -> a (n, 7) -> b (n, 3), and y = b beside the sum of a, which is read late."""
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Concat", ["c", "a"], ["y"], axis=1),
    ]  # fmt: skip
    weights = [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in (("v", (5, 7)), ("w", (7, 3)))]
    ends = [helper.make_tensor_value_info(n, FLOAT, ["n", size]) for n, size in (("x", 5), ("y", 10))]
    graph = helper.make_graph(nodes, "two branches", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_values_lie_in_memory_until_they_are_read_last() -> None:
    """At the last operator x, a, c and y do; b is gone."""
    assert values_in_memory(two_branches()) == 4 * (5 + 7 + 3 + 10)


def test_as_many_examples_run_at_once_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_branches()
    assert room_of(model) == room.LEAST
    monkeypatch.setattr(room, "LEAST", 0)
    assert room_of(model) == 4 * (5 * 7 + 7 * 3)
    assert examples_at_once(model, BATCH) == 224 // 100
    monkeypatch.setattr(room, "LEAST", 350)
    file, given = read_onnx_file(model), {"x": np.ones((8, 5), np.float32)}
    assert [len(feeds["x"]) for feeds in rows_of(file, given).batches()] == [3, 3, 2]
    monkeypatch.setattr(room, "LEAST", 1)
    assert examples_at_once(model, 1) == 1
