"""The engine of the same network passes on every runtime here, one that computes something else on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

from sluice.artifacts.deploy import as_module, deploy_onnx
from sluice.artifacts.engine_check import EngineCheck, check_engine
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.precision.emulation import emulated
from sluice.runtime.base.runner import Session
from sluice.runtime.targets import available_targets, make_runner
from tests.exported import deployed
from tests.networks import build

BATCH = 3
FAULT = ("sequence1d", "int8", "openvino")
NETWORKS = ["plain", "squeeze_excite", "tokens", "sequence1d"]


def made(name: str, precision: str, target: str = "ort-cpu") -> onnx.ModelProto:
    return deploy_onnx(deployed(name), precision, [(build(name)[1], None)], target=target)


def check(name: str, precision: str, session: Session, file: onnx.ModelProto, target: str = "ort-cpu") -> EngineCheck:
    return check_engine(session, file, deployed(name), precision, target=target, batch=BATCH)


class Faulty:
    """An engine whose outputs are changed."""

    clock = "wall"

    def __init__(self, own: Session, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.own, self.change = own, change

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: self.change(x) for name, x in self.own.run(feeds).items()}

    def sample(self, repeats: int) -> float:
        return 1.0


def altered(model: onnx.ModelProto) -> onnx.ModelProto:
    """One weight with its entries in another order."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    init = next(i for i in done.graph.initializer if len(i.dims) > 1 and "scale" not in i.name)
    init.CopyFrom(numpy_helper.from_array(np.flip(numpy_helper.to_array(init)).copy(), init.name))
    return done


def here(target: str) -> None:
    if reason := available_targets()[target]:
        pytest.skip(reason)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_engines_of_the_same_network_pass(network: str, precision: str, target: str) -> None:
    here(target)
    if (network, precision, target) == FAULT:
        pytest.skip("OpenVINO 2026.4 quantizes a maximum behind an average pool wrongly")
    file = made(network, precision, target)
    shown = emulated(file) if target == "ort-cpu" else file  # no bf16 there
    try:
        session = make_runner(target).build(shown, batch=BATCH)
    except SluiceError as error:  # a CPU without this type
        pytest.skip(str(error))
    if shown is not file:
        session = Narrow(session, file)
    assert check(network, precision, session, file, target).same


class Narrow(Faulty):
    """An emulated engine that takes the types of the file."""

    def __init__(self, own: Session, file: onnx.ModelProto) -> None:
        super().__init__(own, lambda x: x)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return super().run({n: x.astype("float32") if x.dtype.kind in "fV" else x for n, x in feeds.items()})


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engines_of_another_network_fail_and_the_runtime_is_to_blame(network: str, precision: str) -> None:
    file = made(network, precision)
    wrong = Narrow(make_runner("ort-cpu").build(emulated(altered(file)), batch=BATCH), file)
    found = check(network, precision, wrong, file)
    assert not found.same and found.runtime
    assert "take another version of the runtime" in str(found.refusal("a.engine"))


@pytest.mark.parametrize(
    "change",
    [np.zeros_like, lambda x: x * np.nan, lambda x: -x, lambda x: np.roll(x, 1, axis=-1)],
    ids=["zeros", "nan", "negative", "shifted"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_wrong_outputs_fail(precision: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = made("plain", precision)
    own = Narrow(make_runner("ort-cpu").build(emulated(file), batch=BATCH), file)
    assert check("plain", precision, own, file).same
    assert not check("plain", precision, Faulty(own, change), file).same


@pytest.mark.parametrize("network", NETWORKS)
def test_an_fp32_engine_that_sums_in_16_bits_fails_on_a_cpu(network: str) -> None:
    """TF32 on a GPU has as many bits, and is allowed there."""
    file = deployed(network)
    halves = Narrow(make_runner("ort-cpu").build(emulated(made(network, "fp16")), batch=BATCH), file)
    found = check(network, "fp32", halves, file)
    assert not found.same and found.runtime
    assert check(network, "fp32", halves, file, "tensorrt").same


def test_a_file_that_underflows_is_not_the_runtimes_fault() -> None:
    """Products of 1e-8 are zero in fp16, and another network than in fp32."""
    wide = parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        small (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, float s = {1e-8},
        float b = {1e8}> { a = Mul(x, s)
        m = MatMul(a, w)
        y = Mul(m, b) }""")
    file = deploy_onnx(wide, "fp16")
    session = Narrow(make_runner("ort-cpu").build(emulated(file), batch=BATCH), file)
    found = check_engine(session, file, wide, "fp16", target="ort-cpu", batch=BATCH)
    assert not found.same and not found.runtime
    assert "choose another precision" in str(found.refusal("a.engine"))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_an_engine_evaluates_any_number_of_inputs(batch: int, target: str) -> None:
    here(target)
    model, (x,) = build("plain")
    x = torch.randn(7, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    class Counting:
        def build(self, file: onnx.ModelProto, *, batch: int) -> Faulty:
            return Faulty(make_runner(target).build(file, batch=batch), lambda y: seen.append(len(y)) or y)

    module = as_module(deployed("plain"), runner=Counting(), batch=batch)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(module(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert seen == [batch] * -(-7 // batch)


def test_a_network_without_weights_is_no_other_one() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3.1 + 0.7

    wide = finalize(to_onnx(Scaled(), torch.randn(3, 5)))
    for precision in ("fp32", "fp16"):
        file = deploy_onnx(wide, precision)
        found = check_engine(
            make_runner("ort-cpu").build(file, batch=3), file, wide, precision, target="ort-cpu", batch=3
        )
        assert found.same and found.tolerance > 0.0
