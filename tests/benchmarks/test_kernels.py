"""The device of kernels: its list is read whole, and its times follow from tensors and products alone."""

from __future__ import annotations

import math

import pytest

from benchmarks import kernels as benchmark
from benchmarks.kernels_networks import CASES
from benchmarks.roofline_device import (
    BANDWIDTH,
    LAUNCH,
    RATE,
    RooflineRunner,
    kernels_in,
    milliseconds,
)  # fmt: skip
from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.trt import build
from tests.device import chain
from tests.fake_tensorrt import fake_tensorrt
from tests.rtx import INSTALLED
from tests.runtime.trt.test_borders import drawn, graph, node


def tensor(name: str, dims: str, kind: str = "Half") -> str:
    """As the builder writes it."""
    strides = "[1], StrideOrder: [0]"
    return (
        f"{{ Name: {name}, Dimensions: [{dims}], Strides: {strides}, Datatype: {kind}, Format: (NHWC) major format }}"
    )


def line(name: str, kind: str, reads: str, constants: str, writes: str, nodes: str) -> str:
    sections = {"Inputs": reads, "Constants": constants, "Outputs": writes}
    told = ", ".join(f"{key}: [ {value}]" for key, value in sections.items() if value)
    return f"Name: {name}, LayerType: {kind}, {told}, TacticName: T_{name}, StreamId: 0, Metadata: {nodes}"


X, Y, Z = tensor("x", "2,3,9,9", "Float"), tensor("y", "2,3,9,9"), tensor("z", "2,5,9,9")
WEIGHTS = f"{tensor('w', '5,3,3,3')}, {tensor('one', '1', 'Float')}"
TOLD = "\n".join([
    "Layers:",
    line("cast", "kgen", X, "", Y, "[ONNX Layer: node_of_c0]"),
    line("conv", "correlation", Y, WEIGHTS, Z, "[ONNX Layer: node_of_c0][ONNX Layer: node_of_a0]"),
    line("end", "kgen", Z, "", tensor("s", ""), ""),
])  # fmt: skip


def test_the_list_is_read_whole() -> None:
    cast, conv, end = kernels_in(TOLD)
    assert cast.reads == (((2, 3, 9, 9), "Float"),) and cast.writes == (((2, 3, 9, 9), "Half"),)
    assert conv.reads == (((2, 3, 9, 9), "Half"), ((5, 3, 3, 3), "Half"), ((1,), "Float"))
    assert (conv.kind, conv.tactic, conv.nodes) == ("correlation", "T_conv", ("node_of_c0", "node_of_a0"))
    assert end.writes == (((), "Half"),) and end.nodes == ()
    assert conv.bytes == 2 * (2 * 3 * 81 + 5 * 27 + 2 * 5 * 81) + 4
    assert kernels_in("Layers:\n") == []


def test_times_follow_from_products_and_bytes() -> None:
    kernels, model = kernels_in(TOLD), chain([5])
    memory = [kernel.bytes / BANDWIDTH for kernel in kernels]
    macs = 2 * 5 * 81 * 27 * (8 / 5) * (8 / 3)  # in blocks of 8 channels
    assert milliseconds(kernels, model) == pytest.approx(
        3 * LAUNCH + memory[0] + max(memory[1], macs / RATE[2]) + memory[2]
    )
    assert milliseconds([], model) == 0


def test_without_rtx_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.roofline_device.find_tensorrt", fake_tensorrt)
    with pytest.raises(SluiceError, match="this needs TensorRT-RTX"):
        RooflineRunner()


@pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")
def test_an_engine_is_known_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RooflineRunner()
    monkeypatch.setattr(build.listener(runner.trt), "notes", runner.notes)
    whole = runner.build(chain([16, 24], batch="N"), batch=4)
    assert runner.build(chain([16, 24], batch="N"), batch=4) is whole and runner.builds == 1
    assert whole.list and whole.sample(3) == whole.ms > len(whole.list) * LAUNCH
    assert math.isclose(sum(whole.kernels.values()), len(whole.list))
    wider = runner.build(chain([512, 512], batch="N"), batch=4)
    assert wider.ms > whole.ms
    part = runner.build_part(chain([16, 24], batch=4))
    assert part is not whole and runner.builds == 3


@pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")
def test_a_product_that_a_part_would_copy_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RooflineRunner()
    monkeypatch.setattr(build.listener(runner.trt), "notes", runner.notes)
    nodes = [node("Conv", "x w b", "a"), node("Relu", "a", "y")]
    part = to_precision(
        graph(nodes, [("x", (8, 1024, 14, 14))], [("y", (8, 256, 14, 14))], w=drawn(256, 1024, 1, 1),
              b=drawn(256)),
        "fp16", part=True, target="tensorrt",
    )  # fmt: skip
    product, copy = runner._built(part, part=True).list
    assert product.writes == (((8, 256, 196), "Half"),) == copy.reads and copy.writes == (((8, 256, 14, 14), "Half"),)
    found = runner.build_part(part)
    (kernel,) = found.list
    assert (kernel.kind, kernel.writes) == (product.kind, (((1568, 256), "Half"),))
    assert found.kernels == {product.identity: 1} and found.ms < runner._built(part, part=True).ms
    assert runner.build_part(part) is found


def test_the_committed_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--show"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(f'"{name}"' in last for name in ("worst_ratio", "median_ratio", "median_abs_err", "p95_abs_err"))


def test_the_networks_are_those_that_are_asked_for() -> None:
    assert set(benchmark.CHOSEN) <= set(CASES)
    for name in ("convnext_atto", "vit_tiny", "bert_two_layers"):
        case = CASES[name]
        assert case.make().eval()(case.example(2)).shape[0] == 2
