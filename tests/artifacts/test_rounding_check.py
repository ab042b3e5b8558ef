"""The file of the same network passes in every precision, the file of another one in none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser

from sluice.artifacts.deploy import deploy_onnx
from sluice.artifacts.rounding_check import EPS, RoundingCheck, compare_precisions, drawn
from sluice.core.errors import SluiceError
from sluice.core.plan import InputSpec
from tests.exported import deployed
from tests.networks import NETWORKS, build

FORMS = [("fp16", "ort-cpu"), ("bf16", "ort-cpu"), ("int8", "ort-cpu"), ("int8", "tensorrt")]


def specs_of(name: str) -> list[InputSpec]:
    return [InputSpec(tuple(x.shape), "float32") for x in build(name)[1]]


def narrowed(model: onnx.ModelProto, name: str, precision: str, target: str = "ort-cpu") -> onnx.ModelProto:
    return deploy_onnx(model, precision, [(build(name)[1], None)], target=target)


def likeness(name: str, precision: str, narrow: onnx.ModelProto) -> RoundingCheck:
    return compare_precisions(narrow, deployed(name), precision, specs_of(name))


def altered(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray], where: str = "") -> onnx.ModelProto:
    """A copy with the first initialiser of that type or name and of more than one axis changed."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    init = next(i for i in done.graph.initializer if len(i.dims) > 1 and where in i.name)
    array = numpy_helper.to_array(init)
    init.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), init.name))
    return done


def another(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same layers with other weights of the same size."""
    rng = np.random.default_rng(7)
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for init in done.graph.initializer:
        array = numpy_helper.to_array(init)
        if array.dtype == np.float32 and array.ndim > 1:
            values = array.std() * rng.standard_normal(array.shape)
            init.CopyFrom(numpy_helper.from_array(values.astype(np.float32), init.name))
    return done


@pytest.mark.parametrize(("precision", "target"), FORMS)
@pytest.mark.parametrize("name", ["plain", "tied", "tokens", "squeeze_excite", "transposed", "norms"])
def test_the_same_network(name: str, precision: str, target: str) -> None:
    found = likeness(name, precision, narrowed(deployed(name), name, precision, target))
    assert found.same
    assert 0 < found.error < found.tolerance / 2 <= found.by_chance / 4 <= 0.25, "as far from failing as from chance"
    assert found.as_run == found.error if precision != "int8" else found.as_run > 0


@pytest.mark.parametrize(("precision", "target"), FORMS)
@pytest.mark.parametrize("name", ["plain", "tied", "norms"])
def test_another_network(name: str, precision: str, target: str) -> None:
    other = another(deployed(name))
    found = likeness(name, precision, narrowed(other, name, precision, target))
    assert not found.same
    assert found.error > 2 * found.tolerance


@pytest.mark.parametrize("precision", EPS)
@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_a_large_offset_does_not_hide_another_network(precision: str, offset: float) -> None:
    """Relative to it, networks with one bias differ by little, and so do networks by chance."""

    def moved(model: onnx.ModelProto) -> onnx.ModelProto:
        done = onnx.ModelProto()
        done.CopyFrom(model)
        bias = next(init for init in done.graph.initializer if init.name == "fc2.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(offset), bias.name))
        return done

    dense, specs = moved(deployed("plain")), specs_of("plain")
    same = compare_precisions(narrowed(dense, "plain", precision), dense, precision, specs)
    other = compare_precisions(narrowed(another(dense), "plain", precision), dense, precision, specs)
    assert same.same
    assert not other.same
    assert other.by_chance < 4 / offset


@pytest.mark.parametrize(("precision", "target"), FORMS)
@pytest.mark.parametrize(
    "change",
    [lambda w: -w, np.zeros_like, lambda w: np.roll(w, 1, 0), lambda w: w // 2 if w.dtype == np.int8 else w / 2],
    ids=["sign", "zeros", "channels", "scale"],
)
def test_one_wrong_weight(change: Callable[[np.ndarray], np.ndarray], precision: str, target: str) -> None:
    narrow = narrowed(deployed("plain"), "plain", precision, target)
    assert not likeness("plain", precision, altered(narrow, change, "conv2.weight")).same


def test_numbers_that_are_none() -> None:
    """The worst error there is; and a network whose own outputs are none is not like itself."""
    narrow = narrowed(deployed("plain"), "plain", "fp16")
    found = likeness("plain", "fp16", altered(narrow, lambda w: w * np.inf, "fc1.weight"))
    assert found.error == float("inf") and not found.same


def test_a_network_by_chance_is_no_further_than_zeros() -> None:
    """Weights in another order may make numbers of any size, or none."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> test (float[N, 2] x) => (float[N, 1] y)
        { a = MatMul(x, w)  b = MatMul(a, v)  y = Exp(b) }"""
    )
    arrays = {"w": [[1.5, -9.0], [40.0, 0.0]], "v": [[0.0], [-1.0]]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in arrays.items()
    )
    found = compare_precisions(deploy_onnx(model, "fp16"), model, "fp16", [InputSpec((3, 2), "float32")])
    assert found.same and found.by_chance <= 1


def test_finer_formats_have_narrower_tolerances() -> None:
    """Where they are bounds on rounding; and none is above what a network has by chance."""
    found = {p: likeness("crepe", p, narrowed(deployed("crepe"), "crepe", p)) for p in EPS}
    assert 7.9 < found["bf16"].tolerance / found["fp16"].tolerance < 8.1
    assert found["fp16"].error < found["bf16"].error
    deep = {p: likeness("spatial", p, narrowed(deployed("spatial"), "spatial", p)) for p in EPS}
    assert deep["fp16"].tolerance < deep["bf16"].tolerance == deep["int8"].tolerance == deep["int8"].by_chance / 2


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_int8_runs_within_its_range(target: str) -> None:
    """Calibrated on inputs of a tenth of the usual size, of which normal numbers would saturate nearly all."""
    source = deployed("plain")
    batches = [0.1 * torch.randn(64, 3, 8, 6, generator=torch.Generator().manual_seed(2))]
    found = likeness("plain", "int8", deploy_onnx(source, "int8", batches, target=target))
    assert found.same and found.as_run < 0.2
    beyond = deploy_onnx(source, "int8", [0.01 * batches[0]], target=target)
    unread = altered(beyond, lambda w: w)
    pair = next(node for node in unread.graph.node if node.op_type == "QuantizeLinear")
    assert pair.input[0] == "x"
    scale = next(init for init in unread.graph.initializer if init.name == pair.input[1])
    scale.CopyFrom(numpy_helper.from_array(100 * numpy_helper.to_array(scale), scale.name))
    assert likeness("plain", "int8", unread).as_run > 2 * likeness("plain", "int8", beyond).as_run


def test_inputs() -> None:
    specs = [InputSpec((400, 5), "float32"), InputSpec((3,), "int64"), InputSpec((2, 7), "float32")]
    free, ones, other = drawn(specs, 3)
    assert [a.dtype.name for a in (free, ones, other)] == ["float32", "int64", "float32"]
    assert np.array_equal(ones, [1, 1, 1]) and not np.array_equal(free, drawn(specs, 4)[0])
    within = drawn(specs, 3, [(-0.5, 0.25), (-1.0, 1.0), None])
    assert within[0].min() == -0.5 and within[0].max() == 0.25
    assert within[0].std() == pytest.approx(0.5 / 3, rel=0.2)
    assert np.array_equal(within[1], ones) and np.array_equal(within[2], other)


def test_files_of_other_inputs_or_outputs() -> None:
    fp16 = deploy_onnx(deployed("tied"), "fp16")
    with pytest.raises(SluiceError, match=r"takes 2 inputs \['x', 'y'\], the plan knows 1"):
        compare_precisions(fp16, deployed("plain"), "fp16", specs_of("plain"))
    with pytest.raises(SluiceError, match="ONNX Runtime cannot run the model in memory on inputs"):
        compare_precisions(deploy_onnx(deployed("crepe"), "fp16"), deployed("plain"), "fp16", specs_of("plain"))
    wide = deployed("norms")
    spec = [InputSpec((2, 3, 9, 7), "float32")]
    with pytest.raises(SluiceError, match=r"has shape \(.*\), the reference \(2, 5\); compare tensors"):
        compare_precisions(deploy_onnx(deployed("spatial"), "fp16"), wide, "fp16", spec)


@pytest.mark.parametrize("names", [[*NETWORKS][::6], pytest.param([*NETWORKS], marks=pytest.mark.slow)])
def test_every_network_of_the_tests_is_itself_in_16_bits(names: list[str]) -> None:
    for name in names:
        for precision in ("fp16", "bf16"):
            found = likeness(name, precision, deploy_onnx(deployed(name), precision))
            assert found.same, (name, precision, found)
