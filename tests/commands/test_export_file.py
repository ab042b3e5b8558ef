"""``sluice export MODEL.onnx``: a file of others in every precision, in its own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.cli import main
from sluice.passes.cut.resolve import make_plan
from sluice.passes.files.read import read_onnx_file
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.runtime.base.compare import relative_error
from tests.fake_tensorrt import fake_tensorrt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZES = "image=1,3,9,7"
Run = Callable[..., dict[str, Any]]


@cache
def content() -> bytes:
    """Two convolutions as an old exporter writes them: weights in Constant nodes, -1 for the batch, open positions."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 3, 3, 3), "b0": (6,), "w1": (4, 6, 3, 3)}
    values = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        *(helper.make_node("Constant", [], [n], value=numpy_helper.from_array(v)) for n, v in values.items()),
        helper.make_node("Conv", ["image", "w0", "b0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["scores"]),
    ]  # fmt: skip
    ends = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [-1, 3, "high", "wide"]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    model.metadata_props.add(key="owner", value="somebody")
    return bytes(model.SerializeToString())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.onnx").write_bytes(content())
    np.savez(tmp_path / "data.npz", image=pictures(8))

    def called(*parts: str, status: int = 0, error: str = "") -> dict[str, Any]:
        assert main(["export", "given.onnx", "-o", "out.onnx", "--input", SIZES, *parts, "--json"]) == status
        out, err = capsys.readouterr()
        assert error in err and bool(err) == bool(status)
        return json.loads(out) if out else {}

    return called


def pictures(count: int, high: int = 9) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, high, 7)).astype(np.float32)


def scores(path: str, high: int = 9) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": pictures(2, high)})[0])


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), ("fp16", 1e-2), ("int8", 0.1)])
def test_every_precision_keeps_names_open_axes_and_metadata(run: Run, precision: str, most: float) -> None:
    more = ["--calibration", "data.npz"] if precision == "int8" else []
    data = run("--precision", precision, *more)
    made, before = onnx.load("out.onnx"), onnx.load_model_from_string(content())
    assert [str(i) for i in made.graph.input] == [str(i) for i in before.graph.input]
    assert {e.key: e.value for e in made.metadata_props}["owner"] == "somebody"
    for high in (9, 12):
        error = relative_error([scores("out.onnx", high)], [scores("given.onnx", high)])
        assert error <= most and (error > 0 or precision == "fp32")
    kinds = {i.data_type for i in made.graph.initializer if len(i.dims) > 1}
    assert kinds == {"fp32": {TensorProto.FLOAT}, "fp16": {TensorProto.FLOAT16}, "int8": {TensorProto.INT8}}[precision]
    assert not data["batch_fixed"]
    if precision == "fp32":
        assert made.opset_import == before.opset_import
    else:
        assert 0 < data["error"] <= most
    if precision != "int8":
        assert "image:1x3x9x7" in data["trtexec"]


def test_a_plan_cuts_the_file(run: Run) -> None:
    file = read_onnx_file("given.onnx", {"image": pictures(1)})
    analysis = analyze_onnx(file.model)
    (group,) = analysis.groups
    make_plan(analysis, {group.name: range(4)}).save("plan.json")
    run("--plan", "plan.json", "--precision", "fp16")
    made = onnx.load("out.onnx")
    assert sorted(i.dims[0] for i in made.graph.initializer if len(i.dims) == 4) == [4, 4]
    assert "sluice.plan" in {entry.key for entry in made.metadata_props}


def test_an_engine_is_built_at_the_sizes_that_are_given(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[onnx.ModelProto] = []

    def built(trt: Any, model: onnx.ModelProto, **more: Any) -> Any:
        seen.append(model)
        return type("Built", (), {"plan": b"plan", "cache": b""})()

    monkeypatch.setattr("sluice.runtime.trt.build.find_tensorrt", fake_tensorrt)
    monkeypatch.setattr("sluice.runtime.trt.build.build_engine", built)
    run("--engine", "out.engine", "--precision", "fp16")
    (model,) = seen
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 9, 7] and not dims[0].HasField("dim_value")
    assert Path("out.engine").read_bytes() == b"plan"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--names", "an ONNX file has its names"),
        ("--opset 17", "an ONNX file keeps its own"),
        ("--input-names a", "an ONNX file keeps its names"),
        ("--shape 3,9,7", "an ONNX file has its own shapes"),
        ("--weights w.safetensors", "--weights is for a factory"),
        ("--precision int8", "int8 needs to know the ranges"),
    ],
)
def test_words_for_networks_are_refused(run: Run, words: str, sentence: str) -> None:
    run(*words.split(), status=1, error=sentence)
    assert not Path("out.onnx").exists()
