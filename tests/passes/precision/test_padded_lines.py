"""Paddings along lines are written as operators where the rule says so, and outputs stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.deployment import Deployment
from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.precision.padded_lines import with_padded_lines
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.profile import profile_onnx
from sluice.runtime.base.compare import assert_close, relative_error
from tests.device import SeeingRunner, profile_on
from tests.exported import ops, optimised, run

TOL = 1e-6


def conv(
    size: Sequence[int] = (40, 1),
    kernel: Sequence[int] = (9, 1),
    pads: Sequence[int] = (4, 0, 4, 0),
    *,
    before: Sequence[int] = (),
    value: float = 0.0,
    channels: tuple[int, int] = (5, 7),
    opset: int = 20,
    twice: bool = False,
    **settings: object,
) -> onnx.ModelProto:
    """A convolution of a map of this ``size``, behind a padding by ``before`` if that is given."""
    rng = np.random.default_rng(0)
    into, out = channels
    shape = (out, into // int(str(settings.get("group", 1))), *kernel)
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), "w")]
    nodes = [helper.make_node("Relu", ["x"], ["a"])]
    if before:
        weights.append(numpy_helper.from_array(np.array([0, 0, *before[:2], 0, 0, *before[2:]], np.int64), "sizes"))
        weights.append(numpy_helper.from_array(np.array(value, np.float32), "value"))
        nodes.append(helper.make_node("Pad", ["a", "sizes", "value"], ["b"]))
    nodes.append(helper.make_node("Conv", ["b" if before else "a", "w"], ["y"], pads=pads, **settings))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, list("nchw"))]
    if twice:
        nodes.append(helper.make_node("Neg", ["b"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, list("nczw")))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", into, *size])]
    graph = helper.make_graph(nodes, "line", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    dims = [d.dim_value or 3 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(1).standard_normal(dims).astype(np.float32)}


def paddings(model: onnx.ModelProto) -> int:
    return ops(model)["Pad"]


WRITTEN = {
    "column": conv(),
    "uneven": conv(kernel=(12, 1), pads=(5, 0, 6, 0)),
    "one side": conv(pads=(8, 0, 0, 0)),
    "of the width of the map": conv((40, 6), (9, 6)),
    "sixteen outputs": conv((16, 1)),
    "one half of the taps": conv((32, 1), (63, 1), (31, 0, 31, 0)),
    "first layer": conv(channels=(1, 7)),
    "row": conv((1, 40), (1, 25), (0, 12, 0, 12)),
    "row with strides": conv((1, 60), (1, 25), (0, 12, 0, 12), strides=[1, 2]),
    "row with dilations": conv((1, 60), (1, 9), (0, 16, 0, 16), dilations=[1, 4]),
    "behind a padding": conv(pads=(0, 0, 0, 0), before=(4, 0, 4, 0)),
    "two paddings": conv(pads=(1, 0, 2, 0), before=(3, 0, 2, 0)),
    "opset 13": conv(opset=13),
}
LEFT = {
    "no padding": conv(pads=(0, 0, 0, 0)),
    "map": conv((20, 20), (3, 3), (1, 1, 1, 1)),
    "uneven map": conv((20, 20), (4, 4), (1, 1, 2, 2)),
    "wider than the kernel": conv((40, 2)),
    "padded across": conv((40, 1), (9, 3), (4, 1, 4, 1)),
    "strides": conv(strides=[2, 1]),
    "dilations": conv(pads=(8, 0, 8, 0), dilations=[2, 1]),
    "groups": conv(channels=(6, 6), group=6),
    "fifteen outputs": conv((15, 1)),
    "fewer than half of the taps": conv((31, 1), (63, 1), (31, 0, 31, 0)),
    "row with few outputs at the border": conv((1, 40), (1, 9), (0, 4, 0, 4)),
    "opset 10": conv(opset=10),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written(name: str) -> None:
    model = WRITTEN[name]
    before = model.SerializeToString(deterministic=True)
    done = with_padded_lines(model)
    assert model.SerializeToString(deterministic=True) == before
    assert with_padded_lines(done) is done
    onnx.checker.check_model(done, full_check=True)
    assert ops(done) == {"Relu": 1, "Pad": 1, "Conv": 1}
    assert not any(a.name == "pads" for a in done.graph.node[-1].attribute)
    read = {name for node in done.graph.node for name in node.input}
    assert {init.name for init in done.graph.initializer} <= read
    assert_close(run(done, feeds(model)), run(model, feeds(model)), TOL)


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    assert with_padded_lines(LEFT[name]) is LEFT[name]


@pytest.mark.parametrize(
    "given",
    [
        {"value": 1.5},
        {"twice": True},
        {"before": (-1, 0, 5, 0)},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_paddings_that_are_no_zeros_of_this_convolution_alone(given: dict[str, object]) -> None:
    model = conv(**{"pads": (0, 0, 0, 0), "before": (4, 0, 4, 0), **given})  # type: ignore[arg-type]
    if "auto_pad" in given:
        del model.graph.node[-1].attribute[:]
        model.graph.node[-1].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    assert_close(run(with_padded_lines(model), feeds(model)), run(model, feeds(model)), TOL)
    assert with_padded_lines(model) is model


@pytest.mark.parametrize("shift", [1, -1])
def test_a_padding_at_the_wrong_place_shows(shift: int) -> None:
    model = WRITTEN["uneven"]
    done = with_padded_lines(model)
    sizes = next(init for init in done.graph.initializer if init.name.endswith("pads"))
    wrong = numpy_helper.to_array(sizes) + np.array([0, 0, shift, 0, 0, 0, -shift, 0])
    sizes.CopyFrom(numpy_helper.from_array(wrong, sizes.name))
    assert relative_error(run(done, feeds(model)), run(model, feeds(model))) > 0.1


@pytest.mark.parametrize("opset", [11, 13, 18, 20, 21])
def test_the_runtime_keeps_them(opset: int, tmp_path: Path) -> None:
    """If this fails, ONNX Runtime folds the padding in this form too, and the rewrite is in vain."""
    assert optimised(with_padded_lines(conv(opset=opset)), tmp_path)["Pad"] == 1
    assert optimised(conv(before=(4, 0, 4, 0), opset=opset), tmp_path)["Pad"] == 0


class Pitch(nn.Module):
    """Columns: padded unevenly, halved, padded by the convolution, and read out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 11, (12, 1)), nn.BatchNorm2d(11)
        self.two = nn.Conv2d(11, 13, (9, 1), padding=(4, 0))
        self.out = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x[:, None, :, None], (0, 0, 5, 6))
        x = F.max_pool2d(self.norm(F.relu(self.one(x))), (2, 1))
        return self.out(F.relu(self.two(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def pitch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return enliven(Pitch(), seed=0).eval(), torch.randn(3, 70)


def test_only_one_thread_of_onnx_runtime_in_fp32(pitch: tuple[nn.Module, Tensor]) -> None:
    model = finalize(to_onnx(*pitch[:1], pitch[1:]))
    assert paddings(model) == 0
    assert paddings(to_precision(model, "fp32")) == 2
    assert paddings(to_precision(model, "fp32", threads=2)) == 0
    for target in ("openvino", "tensorrt", "ort-cuda", "torch-cuda"):
        assert paddings(to_precision(model, "fp32", target=target)) == 0
    assert paddings(to_precision(model, "fp16")) == 0


def test_cut_through(pitch: tuple[nn.Module, Tensor]) -> None:
    """The padded file of the cut graph computes what the cut network does, and the padded file is read as the plain."""
    model, x = pitch
    exported = to_onnx(model, (x,))
    plan = make_plan(analyze(capture(model, (x,))), {"one": [1, 4, 10], "two": [0, 2]})
    slim = rewrite_torch(model, plan, (x,))
    deployed = to_precision(finalize(rewrite_onnx(exported, plan)), "fp32")
    assert paddings(deployed) == 2
    (found,) = run(deployed, {deployed.graph.input[0].name: x.numpy()}).values()
    assert_close(found, slim(x).detach().numpy())
    plain, padded = (analyze_onnx(form) for form in (finalize(exported), to_precision(finalize(exported), "fp32")))
    groups = [[(g.name, g.size, [(r.param, r.axis) for r in g.refs]) for g in form.groups] for form in (plain, padded)]
    assert groups[0] == groups[1]
    assert [size for _, size, _ in groups[0]] == [11, 13]
    assert padded.frozen == plain.frozen


def test_what_is_timed_is_what_is_deployed(pitch: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, and the engines that calibrate them, have the paddings of the file."""
    runner = SeeingRunner()
    profile_on(lambda target, threads=1: runner, monkeypatch)
    dense = to_onnx(pitch[0], pitch[1:])
    profile = profile_onnx(dense, deployment=Deployment(batch=2), progress=False)
    lines = [
        node
        for model in runner.seen
        for node in model.graph.node
        if node.input[1:2] in (["one.weight"], ["two.weight"])
    ]
    inside = [node for node in lines if any(any(a.ints) for a in node.attribute if a.name == "pads")]
    whole = [model for model in runner.seen if ops(model)["Conv"] == 2 and ops(model)["Gemm"] == 1]
    assert lines and not inside
    assert whole and all(paddings(model) == 2 for model in whole)
    assert paddings(profile.engine(finalize(dense))) == 2
