"""Ranges are those of the network's own tensors, over all batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import nn

from sluice.artifacts.calibration_ranges import PERCENTILE, ROWS, activation_ranges
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.precision.quantize import tensors_to_calibrate
from tests.exported import deployed
from tests.networks import build

WEIGHTS = {"w": [[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]], "v": [[1.0], [-1.0]]}


def model(rows: str = "N") -> onnx.ModelProto:
    done = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> test (float[{rows}, 3] x) => (float[{rows}, 1] y)
        {{ a = MatMul(x, w)  b = Relu(a)  c = Identity(b)  y = MatMul(c, v) }}"""
    )
    arrays = {name: np.array(value, np.float32) for name, value in WEIGHTS.items()}
    done.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in arrays.items())
    return done


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(4 + k, 3, generator=generator) for k in range(count)]


def hidden(x: torch.Tensor) -> torch.Tensor:
    return (x @ torch.tensor(WEIGHTS["w"])).relu()


def test_the_maximum_over_all_batches() -> None:
    found = activation_ranges(model(), batches(), percentile=100)
    assert set(found) == {"x", "b"} == set(tensors_to_calibrate(model()))
    assert found["x"] == pytest.approx(max(float(x.abs().max()) for x in batches()))
    assert found["b"] == pytest.approx(max(float(hidden(x).max()) for x in batches()))


def test_percentiles() -> None:
    x = torch.arange(30000, dtype=torch.float32).reshape(-1, 3) / 30000
    x[17, 1] = -90.0
    static = model("10000")
    assert activation_ranges(static, [x], percentile=100)["x"] == 90
    assert activation_ranges(static, [x], percentile=50)["x"] == pytest.approx(0.5, abs=1e-3)
    # Four places behind the largest of 30,000: the lone value has only a share in it.
    assert 0.9 < activation_ranges(static, [x], percentile=99.99)["x"] < 1.1
    assert PERCENTILE > 99.99
    for wrong in (0.0, 100.5, float("nan")):
        with pytest.raises(SluiceError, match=r"cannot take percentile .* of activations; give one above 0"):
            activation_ranges(model(), [x], percentile=wrong)


@pytest.mark.parametrize("percentile", [50, 90, 100])
def test_batches_are_run_in_slices(percentile: float) -> None:
    x = torch.randn(2 * ROWS + 5, 3, generator=torch.Generator().manual_seed(3)).cumsum(0)
    found = activation_ranges(model(), [x], percentile=percentile)
    slices = [x[:ROWS], x[ROWS : 2 * ROWS], x[2 * ROWS :]]
    for name, values in (("x", slices), ("b", [hidden(part) for part in slices])):
        each = [float(np.percentile(value.abs().numpy(), percentile)) for value in values]
        assert found[name] == pytest.approx(max(each))
    assert found == activation_ranges(model(), slices, percentile=percentile)


def test_no_slices_without_a_common_batch() -> None:
    """Of inputs that do not share their first axis none is cut."""

    def ranges(axes: tuple[str, str], rows: tuple[int, int]) -> dict[str, float]:
        network = parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 20]> test (float[{axes[0]}, 3] x, float[{axes[1]}, 3] z)
            => (float[M, 2] y, float[K, 2] u) {{ y = MatMul(x, w)  u = MatMul(z, w) }}"""
        )
        network.graph.initializer.append(numpy_helper.from_array(np.array(WEIGHTS["w"], np.float32), "w"))
        batch = tuple(torch.arange(float(3 * n)).reshape(n, 3) for n in rows)
        return activation_ranges(network, [(batch, None)], percentile=50)

    long = 3 * ROWS
    for axes, rows in ((("N", "M"), (long, 5)), (("N", "5"), (long, 5)), (("N", "M"), (long, long))):
        assert ranges(axes, rows)["x"] == pytest.approx((3 * long - 1) / 2), axes
    assert ranges(("N", "N"), (long, long))["x"] > 2 * ROWS * 3, "the median of the last slice"


def test_what_is_no_tensor_is_no_input() -> None:
    plain = activation_ranges(model(), batches())
    assert activation_ranges(model(), [((x, None, True), torch.zeros(len(x))) for x in batches()]) == plain


def test_labels_and_several_inputs() -> None:
    with_labels = activation_ranges(model(), ((x, torch.zeros(len(x))) for x in batches()))
    assert with_labels == activation_ranges(model(), batches())
    network = deployed("tied")
    x, y = torch.randn(3, 5), 100 * torch.randn(3, 5)
    found = activation_ranges(network, [((x, y), None)], percentile=100)
    assert found["x"] == pytest.approx(float(x.abs().max()))
    assert found["y"] == pytest.approx(float(y.abs().max()))


class TakesMapping(nn.Module):
    """Two inputs of one shape, in a mapping that is the only argument."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        return self.network(batch["x"], batch["y"])


class Encoded(UserDict[str, torch.Tensor]):
    """A mapping that is no dict, as tokenizers return them."""


def test_named_inputs_in_any_order() -> None:
    network = deployed("tied")
    x, y = torch.randn(3, 5), 100 * torch.randn(3, 5)
    want = activation_ranges(network, [((x, y), None)])
    assert want != activation_ranges(network, [((y, x), None)]), "the order of tensors without names counts"
    named = {"y": y, "x": x}
    for batch in (named, (named, None), Encoded(named), ((named,), None), ((x, {"y": y}), None), (({"y": y}, x), None)):
        assert activation_ranges(network, [batch]) == want
    assert activation_ranges(network, [{**named, "training": False, "mask": None}]) == want


def test_names_of_a_mapping_that_is_an_argument() -> None:
    source, (x, y) = build("tied")
    network = finalize(to_onnx(TakesMapping(source), ({"x": x, "y": y},)))
    assert [info.name for info in network.graph.input] == ["batch_x", "batch_y"]
    want = activation_ranges(network, [((x, 100 * y), None)])
    for named in ({"y": 100 * y, "x": x}, {"batch_y": 100 * y, "batch_x": x}, {"batch": {"y": 100 * y, "x": x}}):
        assert activation_ranges(network, [(named, None)]) == want
    with pytest.raises(SluiceError, match=r"lacks batch_x and has z, which the network does not take"):
        activation_ranges(network, [{"y": y, "z": x}])


def test_a_name_is_not_taken_for_another_that_ends_alike() -> None:
    network = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]> test (float[N, 3] old_x, float[N, 3] x)
        => (float[N, 2] y, float[N, 2] u) { y = MatMul(old_x, w)  u = MatMul(x, w) }"""
    )
    network.graph.initializer.append(numpy_helper.from_array(np.array(WEIGHTS["w"], np.float32), "w"))
    found = activation_ranges(network, [{"x": torch.ones(2, 3), "old_x": torch.full((2, 3), 5.0)}])
    assert (found["x"], found["old_x"]) == (1, 5)
    with pytest.raises(SluiceError, match="a calibration batch lacks old_x; name the inputs"):
        activation_ranges(network, [{"x": torch.ones(2, 3)}])


def test_names_that_do_not_fit() -> None:
    network, (x, y) = deployed("tied"), build("tied")[1]
    for batch, message in (
        ({"x": x}, r"a calibration batch lacks y; name the inputs \(x, y\), each once"),
        ({"x": x, "z": y}, "lacks y and has z, which the network does not take"),
        ({"x": x, "y": y, "labels": y}, "a calibration batch has labels, which the network does not take"),
        (((x, {"z": y}), None), "a calibration batch has z, which the network does not take"),
        (((x, y, {"y": y}), None), r"a calibration batch has 3 inputs, the network 2 \(x, y\)"),
    ):
        with pytest.raises(SluiceError, match=message):
            activation_ranges(network, [batch])


def test_excluded_layers_need_no_range() -> None:
    assert set(activation_ranges(model(), batches(), exclude=("w",))) == {"b"}
    assert activation_ranges(model(), [], exclude=("w", "v")) == {}


def test_bad_batches() -> None:
    with pytest.raises(SluiceError, match="there is no calibration batch; give at least one"):
        activation_ranges(model(), [])
    with pytest.raises(SluiceError, match=r"a calibration batch has 2 inputs, the network 1 \(x\)"):
        activation_ranges(model(), [((batches()[0], batches()[0]), None)])
    with pytest.raises(SluiceError, match="ONNX Runtime cannot run the model in memory on inputs"):
        activation_ranges(model(), [torch.ones(2, 5)])
    with pytest.raises(SluiceError, match="a batch of data is str"):
        activation_ranges(model(), ["x"])
    for value in (float("nan"), float("inf")):
        x = batches()[0]
        x[1, 2] = value
        with pytest.raises(SluiceError, match=r"tensor '[xb]' is not finite on a calibration batch"):
            activation_ranges(model(), [batches()[1], x])
