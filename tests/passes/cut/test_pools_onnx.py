"""Means over all positions are written as pools, and nothing else is."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnxruntime import InferenceSession
from torch import Tensor, nn

from sluice.core.plan import Factorize
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.factor_torch import factorize_torch
from sluice.passes.cut.pools_onnx import with_global_pools
from sluice.passes.graph.capture import capture, mark_as_cut
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner

HEAD = '<ir_version: 8, opset_import: ["" : 18]> g '


def operators(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


def parsed(text: str, **ints: list[int]) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    for name, values in ints.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: x for value, x in zip(session.get_inputs(), inputs, strict=True)})


@pytest.mark.parametrize(
    ("convolution", "pool", "shape"),
    [
        (nn.Conv1d, nn.AdaptiveAvgPool1d, (3, 19)),
        (nn.Conv2d, nn.AdaptiveAvgPool2d, (3, 9, 11)),
        (nn.Conv3d, nn.AdaptiveAvgPool3d, (3, 5, 6, 7)),
    ],
)
def test_a_pool_to_one_position_is_one_operator(
    convolution: type[nn.Module], pool: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(convolution(3, 7, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(7, 5)).eval()
    file = to_onnx(net, (torch.randn(4, *shape),))
    deployed = finalize(file)
    assert operators(deployed) == {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1}
    x = torch.randn(3, *shape)
    for model in (file, deployed):
        assert_close(run(model, x.numpy())[0], net(x).detach().numpy())
    # What the mean alone read is gone.
    read = {name for node in file.graph.node for name in node.input}
    assert {init.name for init in file.graph.initializer} <= read


ONE, TWO = "(float[N,6,5,7] x) => ", "(float[N,6,5,7] x, float[N,6,5,1] r) => "


@pytest.mark.parametrize(
    "text",
    [
        ONE + "(float[N,1,1,7] y) { y = ReduceMean <keepdims=1> (x, channels) }",
        ONE + "(float[N,6,5,1] y) { y = ReduceMean <keepdims=1> (x, last) }",
        ONE + "(float[N,6] y) { y = ReduceMean <keepdims=0> (x, both) }",
        ONE + "(float[1,1,1,1] y) { y = ReduceMean <keepdims=1> (x) }",
        "(float[N,6] x) => (float[N,1] y) { y = ReduceMean <keepdims=1> (x, last) }",
    ],
)
def test_other_means_stay(text: str) -> None:
    model = parsed(text, channels=[1, 2], last=[-1], both=[2, 3])
    after = onnx.ModelProto()
    after.CopyFrom(model)
    assert operators(with_global_pools(after)) == {"ReduceMean": 1}
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert_close(run(after, x)[0], run(model, x)[0])


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("u = Unsqueeze(x, a) m = ReduceMean(u, both) y = Squeeze(m, a) z = Relu(u)", ["Unsqueeze", "Squeeze"]),
        ("u = Unsqueeze(x, a) m = ReduceMean(u, both) y = Squeeze(m, a) z = Relu(m)", ["Unsqueeze", "Squeeze"]),
        ("u = Unsqueeze(x, a) m = ReduceMean(u, both) y = Squeeze(m, b) z = Relu(y)", ["Unsqueeze", "Squeeze"]),
        ("u = Unsqueeze(x, a) m = ReduceMean(u, both) y = Squeeze(m, a) z = Relu(y)", []),
    ],
)
def test_the_axis_between_stays_where_someone_else_reads_it(body: str, kept: list[str]) -> None:
    model = parsed(f"(float[N,6,7] x) => (float[N,6,1] y, z) {{ {body} }}", a=[2], b=[3], both=[-1, -2])
    del model.graph.output[1].type.tensor_type.shape.dim[:]
    after = onnx.ModelProto()
    after.CopyFrom(model)
    found = operators(with_global_pools(after))
    assert found == {"GlobalAveragePool": 1, "Relu": 1, **dict.fromkeys(kept, 1)}
    x = np.random.default_rng(0).standard_normal((2, 6, 7)).astype(np.float32)
    for one, other in zip(run(after, x), run(model, x), strict=True):
        assert_close(one, other)


class Squeezed(nn.Module):
    """A pool whose factors of rank one could pass for channels last."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.b = nn.Conv2d(16, 24, kernel)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.b(torch.relu(self.a(x))))).flatten(1))


@pytest.mark.parametrize(("kernel", "form"), [(3, "1x1-kxk"), (3, "kxk-1x1"), (3, "kx1-1xk"), (1, "kxk-1x1")])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_leave_no_operators_of_a_layout(kernel: int, form: str, rank: int) -> None:
    torch.manual_seed(0)
    net, x = Squeezed(kernel).eval(), torch.randn(4, 3, 9, 11)
    slim = capture(net, (x,))
    factorize_torch(slim, [Factorize("b.weight", form, rank)])
    mark_as_cut(slim)
    found = operators(finalize(to_onnx(slim, (x,))))
    assert found == {"Conv": 3, "Relu": 2, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1}


class PaddedPool(nn.Module):
    def __init__(self, before: nn.Module, value: float):
        super().__init__()
        self.conv, self.before, self.value = nn.Conv2d(3, 5, 3), before, value

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(self.before(self.conv(x)), (0, 1, 1, 0), value=self.value)
        return nn.functional.max_pool2d(padded, 2, 1)


@pytest.mark.parametrize(("before", "value", "named"), [
    (nn.SiLU(), 0.0, True), (nn.Identity(), 0.0, True), (nn.ReLU(), 0.0, False), (nn.SiLU(), -0.1, True)
])  # fmt: skip
@torch.no_grad()
def test_padding_before_a_largest_pool_counts_as_it_says(before: nn.Module, value: float, named: bool) -> None:
    torch.manual_seed(0)
    model, x = PaddedPool(before, value).eval(), torch.randn(2, 3, 7, 9)
    model.conv.bias.sub_(1.0)  # so that windows at the border are negative
    exported = to_onnx(model, x)
    assert_close(run(exported, x.numpy())[0], model(x), what="padded pool")
    (pad,) = [node for node in exported.graph.node if node.op_type == "Pad"]
    assert any(pad.input[3:]) == named
    onnx.checker.check_model(exported, full_check=True)


@pytest.mark.parametrize(("before", "value", "told"), [("Neg", 0.0, True), ("Relu", 0.0, False), ("Neg", -0.5, False)])
def test_what_the_runtime_makes_of_padding_is_told(before: str, value: float, told: bool) -> None:
    """Of a file of others, whose padding names no axes: where the runtime computes something else than is written."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
        g (float[N, 3, 7, 9] x) => (float[N, 5, a, b] y) {
            c = Conv(x, w)  s = Neg(c)
            p = Pad(s, pads, value)
            m = MaxPool<kernel_shape = [2, 2]>(p)
            y = Conv(m, v)
        }""")
    model.graph.node[1].op_type, model.graph.node[3].name = before, "largest"
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((4, 3, 3, 3), np.float32), "v": rng.standard_normal((5, 4, 1, 1), np.float32),
        "pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "value": np.array(value, np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    notes = {name: why for name, why in find_search_space(read_onnx(model)).left_alone.items() if "1.31" in why}
    assert [("MaxPool 'largest'" in why) for why in notes.values()] == ([True] if told else [])
    x = rng.standard_normal((2, 3, 7, 9)).astype(np.float32)
    written = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    found = OrtRunner().build(model).run({"x": x})["y"]
    assert (relative_error(found, written) > 1e-3) == told
