"""A model that names a file of the device is refused, wherever in it the name is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.runtime.base.inputs import Shapes
from sluice.runtime.ort.session import load_session
from sluice.runtime.remote.models import model_of
from tests.device import chain


def outside(name: str = "w", location: str = "secret.bin") -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def model(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    nodes = nodes or (helper.make_node("Add", ["x", "w"], ["y"]),)
    graph = helper.make_graph([*nodes], "g", info[:1], info[1:], [*weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def in_branch() -> onnx.ModelProto:
    branch = helper.make_graph([helper.make_node("Constant", [], ["z"], value=outside("z"))], "b", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    ])  # fmt: skip
    inner = helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)], "i", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    ])  # fmt: skip
    return model(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))


def sparse() -> onnx.ModelProto:
    found = model(helper.make_node("Identity", ["x"], ["y"]))
    found.graph.sparse_initializer.add().values.CopyFrom(outside())
    return found


def in_function() -> onnx.ModelProto:
    found = model(helper.make_node("F", ["x"], ["y"], domain="d"))
    node = helper.make_node("Constant", [], ["o"], value=outside())
    found.functions.append(helper.make_function("d", "F", ["i"], ["o"], [node], [helper.make_opsetid("", 17)]))
    return found


def only_named() -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.external_data.add(key="location", value="secret.bin")
    return model(weights=(tensor,))


@pytest.mark.parametrize(
    "found",
    [
        model(weights=(outside(),)),
        model(weights=(outside(location="/etc/passwd"),)),
        model(helper.make_node("Constant", [], ["y"], value=outside())),
        model(helper.make_node("Constant", [], ["y"], values=[outside()])),
        in_branch(),
        sparse(),
        in_function(),
        only_named(),
    ],
)
def test_data_beside_the_model(found: onnx.ModelProto) -> None:
    with pytest.raises(SluiceError, match="lies in a file beside the model, which the device does not read"):
        model_of(found.SerializeToString())


def test_the_runtime_itself_would_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is this check that keeps the files of the device from a client."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    session = load_session(model(weights=(outside(),)), Shapes(), "CPUExecutionProvider", optimize=False)
    assert session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [0, 1, 2, 3]


def test_compiled_networks() -> None:
    with pytest.raises(SluiceError, match="is an EPContext, which may name a file"):
        model_of(model(helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")).SerializeToString())


def test_settings_and_what_is_not_known_are_dropped() -> None:
    found = model(helper.make_node("Identity", ["x"], ["y"]))
    plain = found.SerializeToString()
    found.metadata_props.add(key="ort_config", value='{"session_options": {}}')
    unknown = b"\xfa\x3f\x03abc"  # field 1023
    assert model_of(found.SerializeToString() + unknown).SerializeToString() == plain


def test_a_whole_model_is_as_it_was() -> None:
    found = chain([4, 3])
    assert model_of(found.SerializeToString(deterministic=True)) == found


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_what_is_no_model(cut: int) -> None:
    content = chain([4, 3]).SerializeToString()
    for wrong in (content[:-cut], b"\xff" * cut):
        with pytest.raises(SluiceError, match="what was sent is no ONNX model"):
            model_of(wrong)
