"""An ONNX file as a module, and its training towards the outputs of the file that it was cut from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sluice.core.errors import SluiceError
from sluice.importance.output_distance import LOSSES, OutputDistance, outputs_of
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.read import OnnxFile
from sluice.passes.files.rows import Rows
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.runtime.base.compare import assert_close
from sluice.training.distill_onnx import distill_onnx
from sluice.training.file_module import FileModule
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def given(count: int = 64) -> tuple[OnnxFile, Rows]:
    return tiny.plain_file_and_rows(count)


def halved(file: OnnxFile) -> onnx.ModelProto:
    analysis = analyze_onnx(file.model)
    return rewrite_onnx(file.model, make_plan(analysis, {g.name: range(max(1, g.size // 2)) for g in analysis.groups}))


def test_a_module_computes_what_the_file_computes_at_any_batch() -> None:
    file, rows = given(5)
    module = FileModule(file.model)
    for count in (5, 2):
        part = rows.part(0, count)
        found = module({name: torch.from_numpy(value) for name, value in part.values.items()})
        want = outputs_of(file.model, part)
        assert_close([value.detach().numpy() for value in found.values()], list(want.values()), 1e-5)


def test_parameters_are_the_weights_by_name_and_statistics_stay() -> None:
    helper, shapes = onnx.helper, {"w": (4, 3, 1, 1), "scale": (4,), "shift": (4,), "mean": (4,), "var": (4,)}
    values = [numpy_helper.from_array(np.full(shape, 0.5, np.float32), name) for name, shape in shapes.items()]
    values.append(numpy_helper.from_array(np.array([0, 4], np.int64), "sizes"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Reshape", ["b", "sizes"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("x", 1, ["n", 3, 1, 1]), helper.make_tensor_value_info("y", 1, ["n", 4])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], values), opset_imports=[helper.make_opsetid("", 17)]
    )
    module = FileModule(model)
    assert set(module.weights()) == {"w", "scale", "shift"}
    module({"x": torch.ones(2, 3, 1, 1)})["y"].sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_training_brings_a_cut_file_nearer_on_inputs_that_it_has_not_seen(loss: str) -> None:
    file, rows = given()
    kept, held = rows.part(0, 48), rows.part(48, 64)
    slim = halved(file)
    made, rate = distill_onnx(slim, file.model, kept, 40, loss=loss)
    distance = OutputDistance(file.model, held, loss)
    assert distance.of(made) < 0.9 * distance.of(slim) and rate > 0
    before, after = (OnnxGraph(model).initializers for model in (slim, made))
    assert {name: tuple(i.dims) for name, i in before.items()} == {name: tuple(i.dims) for name, i in after.items()}
    assert slim.graph.node == made.graph.node


def test_the_same_seed_gives_the_same_file() -> None:
    file, rows = given(16)
    one, other, third = (distill_onnx(halved(file), file.model, rows, 4, seed=seed)[0] for seed in (1, 1, 2))
    assert one.SerializeToString() == other.SerializeToString() != third.SerializeToString()


def test_what_torch_cannot_compute_is_named() -> None:
    file, _ = given(4)
    odd = onnx.ModelProto()
    odd.CopyFrom(file.model)
    odd.graph.node.append(onnx.helper.make_node("NonZero", ["scores"], ["places"], name="nz"))
    with pytest.raises(SluiceError, match="NonZero 'nz' of the file has no counterpart in torch"):
        FileModule(odd)
