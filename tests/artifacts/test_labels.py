"""Names and origin of a file: as asked for, and the network stays the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import sluice
from sluice.artifacts.labels import labelled, provenance
from sluice.artifacts.report import Report
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests import tiny
from tests.tiny import compressed_in


def network() -> onnx.ModelProto:
    """(s77, 5) and (s77, 5) to (s77, 5) and (s77, 3): one node has a name that others would get, one is a branch."""
    then = helper.make_graph(
        [helper.make_node("Sub", ["x", "y"], ["less"])], "then", [], [helper.make_tensor_value_info("less", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Add", ["x", "y"], ["more"])], "else", [], [helper.make_tensor_value_info("more", 1, None)]
    )
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], name="node_1"),
        helper.make_node("If", ["yes"], ["a"], then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["sum", "w"], ["b"]),
    ]
    sides = [[(name, ["s77", width]) for name, width in side] for side in ((("x", 5), ("y", 5)), (("a", 5), ("b", 3)))]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side] for side in sides)
    weights = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    held = [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.array(True), "yes")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    feeds = {info.name: rng.normal(size=(4, 5)).astype(np.float32) for info in model.graph.input}
    return list(OrtRunner().build(model).run(feeds).values())


def test_names_are_as_asked_for_and_the_network_is_the_same() -> None:
    model = network()
    before = model.SerializeToString()
    done = labelled(model, {"version": "7", "plan": "abc"}, ("image", "sum_of_all"), ("x", "scores"))
    onnx.checker.check_model(done, full_check=True)
    assert [info.name for info in done.graph.input] == ["image", "sum_of_all"]
    assert [info.name for info in done.graph.output] == ["x", "scores"]
    infos = [*done.graph.input, *done.graph.output]
    assert {info.type.tensor_type.shape.dim[0].dim_param for info in infos} == {"batch"}
    assert [node.name for node in done.graph.node] == ["node_1", "node_0", "node_2"]
    assert {entry.key: entry.value for entry in done.metadata_props} == {"sluice.version": "7", "sluice.plan": "abc"}
    for have, want in zip(run(done), run(model), strict=True):
        assert_close(have, want, 1e-6)
    assert model.SerializeToString() == before
    again = labelled(done, {"version": "8"})
    assert [entry.value for entry in again.metadata_props if entry.key == "sluice.version"] == ["8"]
    assert [info.name for info in again.graph.input] == ["image", "sum_of_all"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        (("image",), (), "1 names for the 2 inputs \\(x, y\\)"),
        ((), ("p", "q", "r"), "3 names for the 2 outputs \\(a, b\\)"),
        (("p", "p"), (), "another value called 'p'"),
        (("a", "y2"), (), "another value called 'a'"),
        (("w", "y2"), (), "another value called 'w'"),
        ((), ("sum", "b"), "another value called 'sum'"),
        ((), ("less", "b"), "another value called 'less'"),
    ],
)
def test_names_that_are_taken_or_too_many(inputs: tuple[str, ...], outputs: tuple[str, ...], said: str) -> None:
    with pytest.raises(SluiceError, match=said):
        labelled(network(), {}, inputs, outputs)


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    report, model = Report.load(folder / "report.json"), onnx.load(folder / "slim.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props if entry.key.startswith("sluice.")}
    assert told["sluice.version"] == sluice.__version__
    assert told["sluice.plan"] == hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    assert float(told["sluice.promised_ms"]) == pytest.approx(report.promised_ms, rel=1e-5)
    assert float(told["sluice.measured_ms"]) == pytest.approx(report.measured_ms, rel=1e-5)
    assert float(told["sluice.budget_ms"]) == pytest.approx(report.budget_ms, rel=1e-5)
    assert json.loads(told["sluice.measured_on"]) == report.fingerprint
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert all(node.name for node in model.graph.node)


def test_export_takes_names_and_an_opset(tmp_path: Path) -> None:
    made = sluice.export(
        tiny.model(), tmp_path / "m.onnx", tiny.inputs(), opset=18, input_names=("image",), output_names=("scores",)
    )
    assert [made.graph.input[0].name, made.graph.output[0].name] == ["image", "scores"]
    assert (
        made.opset_import[0].version == 18
        and provenance().items()
        <= {entry.key.removeprefix("sluice."): entry.value for entry in made.metadata_props}.items()
    )
    for opset in (17, 99):
        with pytest.raises(SluiceError, match=f"opset {opset} is not written; give one from 18 to "):
            sluice.export(tiny.model(), tmp_path / "n.onnx", tiny.inputs(), opset=opset)
    assert not (tmp_path / "n.onnx").exists() and "plan" not in provenance() and "plan" in provenance(Plan({}))
