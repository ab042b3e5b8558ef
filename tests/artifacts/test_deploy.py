"""Deployment files in every precision: what is written, what they compute, what accuracy they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sluice
from sluice.artifacts.deploy import as_module, deploy_onnx, export
from sluice.core.errors import SluiceError
from sluice.models import resnet20_mnist
from sluice.models.mnist import accuracy, load_digits
from sluice.passes.cut.export import OPSET, finalize, to_onnx
from sluice.passes.graph.onnx_file import load_onnx, without_defaults
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests.exported import arrays, deployed, ops
from tests.networks import build

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2, "int8": 6e-2}


class Overflowing(nn.Module):
    """Beyond what fp16 can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 6e4 * 6e4


def test_export_refuses_another_network(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match=r"a\.onnx computes another network than the one in fp32.*choose another"):
        export(Overflowing(), tmp_path / "a.onnx", torch.randn(3, 5), precision="fp16")
    assert (tmp_path / "a.onnx").exists()
    export(Overflowing(), tmp_path / "b.onnx", torch.randn(3, 5), precision="bf16")


def test_export_writes_what_it_returns(tmp_path: Path) -> None:
    model, inputs = build("plain")
    done = sluice.export(model, tmp_path / "new" / "plain.onnx", inputs)
    assert onnx.load(tmp_path / "new" / "plain.onnx") == done
    assert "BatchNormalization" not in ops(done)
    assert done.opset_import[0].version == OPSET
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 8, 6)
        with torch.no_grad():
            assert_close(next(iter(OrtRunner().build(done).run({"x": x.numpy()}).values())), model(x))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_every_precision(precision: str, tmp_path: Path) -> None:
    model, (x,) = build("plain")
    done = export(model, tmp_path / "plain.onnx", x, precision=precision, calibration=[x])
    assert onnx.load(tmp_path / "plain.onnx") == done
    types = {array.dtype.name for name, array in arrays(done).items() if name.startswith("conv2.weight")}
    assert types == {
        "fp32": {"float32"}, "fp16": {"float16"}, "bf16": {"bfloat16"}, "int8": {"int8", "float32"},
    }[precision]  # fmt: skip
    with torch.no_grad():
        assert_close(as_module(done)(x), model(x), TOLERANCE[precision])
        assert as_module(done)(x[:1]).shape == (1, 4), "the batch stays free"


def test_int8_needs_calibration(tmp_path: Path) -> None:
    model, inputs = build("plain")
    with pytest.raises(SluiceError, match="int8 needs to know the ranges of activations; give calibration="):
        export(model, tmp_path / "x.onnx", inputs, precision="int8")
    with pytest.raises(SluiceError, match="there is no precision 'int4'"):
        export(model, tmp_path / "x.onnx", inputs, precision="int4")
    assert not list(tmp_path.iterdir())


def test_forms_of_int8() -> None:
    dense, (x,) = deployed("plain"), build("plain")[1]
    for target, kind in (("ort-cpu", np.uint8), ("tensorrt", np.int8)):
        done = deploy_onnx(dense, "int8", [x], target=target, exclude=("conv1.weight",))
        values = arrays(done)
        assert values["conv1.weight"].dtype == np.float32
        assert "conv2.weight" not in values
        zeros = [value for name, value in values.items() if name.endswith(":zero") and not value.ndim]
        assert {value.dtype for value in zeros} == {np.dtype(kind)}


@pytest.mark.parametrize("patterns", [("0.weight",), ("0",), ("[01]",)])
@pytest.mark.parametrize("folded", [True, False])
def test_linear_layers_of_three_axes_have_their_names(patterns: tuple[str, ...], folded: bool) -> None:
    """The exporter writes the weight behind a transpose, and folding it would leave no name."""
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 4)).eval(),
        torch.randn(2, 5, 8),
    )
    dense = to_onnx(model, (x,))
    dense = finalize(dense) if folded else dense
    with torch.no_grad():
        assert_close(as_module(dense)(x), model(x))
    if folded:
        values = arrays(dense)
        assert "0.weight" not in values, "a plan would cut its wrong axis"
        assert_close(values["0.weight:transposed"], model[0].weight.T)
    values = arrays(deploy_onnx(dense, "int8", [x], exclude=patterns))
    assert values["0.weight:transposed"].dtype == np.float32 and "0.weight:transposed:int8:1" not in values
    assert values["2.weight:transposed:int8:1"].dtype == np.int8 and "2.weight:transposed" not in values


@pytest.mark.parametrize(("count", "told"), [(1, "1 input, too few"), (99, "99 inputs, too few"), (100, "")])
def test_too_few_calibration_inputs_are_told(count: int, told: str, caplog: pytest.LogCaptureFixture) -> None:
    dense, (x,) = deployed("plain"), build("plain")[1]
    deploy_onnx(dense, "int8", [x[:1].repeat(count, 1, 1, 1)])
    assert (told in caplog.text) if told else not caplog.text


def test_inputs_and_outputs_of_a_module() -> None:
    """In the order of the file, nested as they may be."""
    model, (x, y) = build("tied")
    reference = model(x, y)
    for precision in ("fp32", "bf16"):
        module = as_module(deploy_onnx(deployed("tied"), precision))
        for found in (module(x, y), module((x, y)), module(x, y=y)):
            assert isinstance(found, tuple)
            assert_close([t.numpy() for t in found], list(reference.values()), TOLERANCE[precision])
    with pytest.raises(SluiceError, match=r"the network takes 2 inputs \(x, y\), not 1"):
        module(x)


def test_keyword_arguments_by_their_names() -> None:
    model, (x, y) = build("tied")
    reference = list(model(x, y).values())
    module = as_module(deployed("tied"))
    for found in (module(y=y, x=x), module(x, y=y), module(y, x=x), module(None, {"a": x, "b": (True, y)}, scale=2)):
        assert_close([t.numpy() for t in found], reference)
    with pytest.raises(SluiceError, match=r"takes 2 inputs \(x, y\), not 3"):
        module(x, y, y=y)


def test_a_usual_evaluation_runs() -> None:
    """Data goes where the parameters are, and results are where the data is."""
    model, (x,) = build("plain")
    module = as_module(deployed("plain")).eval()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert not [p for p in module.parameters() if p.requires_grad or p.numel()]
    module.to("meta")
    assert next(module.parameters()).device.type == "meta"
    with torch.no_grad():
        assert_close(module(x), model(x))


class OnAccelerator(torch.Tensor):
    """A tensor of a device that is not here: what is taken to it is on "meta"."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def test_results_go_to_the_device_of_the_inputs() -> None:
    module = as_module(deployed("tied"))
    x, y = build("tied")[1]
    assert {t.device.type for t in module(x, y)} == {"cpu"}
    assert {t.device.type for t in module(x.as_subclass(OnAccelerator), y)} == {"meta"}
    assert {t.device.type for t in module(y=y, x=x.as_subclass(OnAccelerator))} == {"meta"}


@pytest.mark.parametrize(
    ("network", "like"),
    [
        ("plain", (0,)), ("plain", {"logits": 0}), ("plain", [[0]]), ("plain", 0), ("tied", {"a": 0, "b": [0]}),
        ("tied", (0, 0)),
    ],
)  # fmt: skip
def test_the_structure_of_results(network: str, like: Any) -> None:
    module = as_module(deployed(network), pytree.tree_structure(like))
    inputs = build(network)[1]
    found, plain = module(*inputs), as_module(deployed(network))(*inputs)
    assert pytree.tree_structure(found) == pytree.tree_structure(like)
    assert pytree.tree_structure(as_module(deployed(network), found)(*inputs)) == pytree.tree_structure(like)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(plain), strict=True):
        assert torch.equal(a, b)


def test_results_that_are_no_tensors() -> None:
    x = build("plain")[1][0]
    found = as_module(deployed("plain"), {"loss": None, "logits": (torch.ones(1), 7)})(x)
    assert list(found) == ["loss", "logits"]
    assert found["loss"] is None
    assert found["logits"][1] == 7
    assert torch.equal(found["logits"][0], as_module(deployed("plain"))(x))


def test_a_structure_of_another_size() -> None:
    with pytest.raises(SluiceError, match=r"the file has 2 outputs \(.*\), but like= holds 3 tensors; give"):
        as_module(deployed("tied"), pytree.tree_structure([0, 0, 0]))


def test_a_misspelt_target() -> None:
    x = build("plain")[1][0]
    for precision in ("int8", "fp16", "fp32"):
        with pytest.raises(SluiceError, match=r"no target 'TensorRT'; choose one of ort-cpu, .*rt$"):
            deploy_onnx(deployed("plain"), precision, [x], target="TensorRT")


def test_initialisers_that_are_inputs(tmp_path: Path) -> None:
    """As files of old versions have them: constants, once they are loaded."""
    dense, (x,) = deployed("plain"), build("plain")[1]
    old = deployed("plain")
    old.ir_version = 3
    for init in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, init.dims))
    onnx.save(old, tmp_path / "old.onnx")
    loaded = load_onnx(tmp_path / "old.onnx")
    assert [info.name for info in loaded.graph.input] == ["x"]
    onnx.checker.check_model(loaded, full_check=True)
    for precision, tolerance in TOLERANCE.items():
        done = deploy_onnx(old, precision, [x])
        assert [info.name for info in done.graph.input] == ["x"]
        assert_close(as_module(done)(x), as_module(dense)(x), tolerance)
    assert without_defaults(dense) is dense


def test_integers_pass_through_the_emulation() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> test (int64[3] i, float[5] x) => (float[3] y, int64[3] j)
        { y = Gather(x, i)  j = Add(i, i) }"""
    model = onnx.parser.parse_model(text)
    x = torch.tensor([0.1, 1 / 3, 1000.1, -7.7, 2.0])
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        y, j = as_module(deploy_onnx(model, precision))(torch.tensor([2, 0, 3]), x)
        assert j.tolist() == [4, 0, 6]
        assert torch.equal(y, x[[2, 0, 3]].to(dtype).float())


def test_every_result_is_rounded() -> None:
    """In fp32 the small number would come back, in 16 bits it is lost in the sum."""
    text = """<ir_version: 10, opset_import: ["": 20]> test (float[2] x) => (float[2] y)
        <float one = {1.0}> { a = Add(x, one)  y = Sub(a, one) }"""
    model, x = onnx.parser.parse_model(text), torch.tensor([1e-4, 0.5])
    assert as_module(model)(x).tolist() == pytest.approx([1e-4, 0.5], rel=1e-2)
    for precision in ("fp16", "bf16"):
        assert as_module(deploy_onnx(model, precision))(x).tolist() == [0, 0.5]


def test_narrow_borders_are_widened() -> None:
    """A part, whose borders are 16 bits, runs on float32 as well."""
    from sluice.passes.precision.to_precision import to_precision

    model, (x,) = build("plain")
    part = to_precision(deployed("plain"), "bf16", part=True)
    assert part.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    with torch.no_grad():
        assert_close(as_module(part)(x), model(x), TOLERANCE["bf16"])


def test_accuracy_in_every_precision() -> None:
    digits = load_digits()
    dense = finalize(to_onnx(resnet20_mnist(), digits.train_x[:2]))
    x, y = digits.test_x[::2], digits.test_y[::2]
    calibration = list(digits.train_x[::16].split(50))
    before = accuracy(as_module(dense), x, y)
    assert before > 98
    for precision in ("fp16", "bf16", "int8"):
        found = accuracy(as_module(deploy_onnx(dense, precision, calibration)), x, y)
        assert abs(found - before) <= 0.6, precision
