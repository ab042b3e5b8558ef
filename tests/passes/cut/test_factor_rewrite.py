"""Factorised networks: the torch and the ONNX rewriter against the dense network with truncated weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.artifacts import store
from sluice.artifacts.macs import count_macs
from sluice.core.errors import SluiceError
from sluice.core.plan import FORMS, Factorize
from sluice.models import enliven
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.cut.factor import factor_macs, factors, forms_of, max_rank, random_factors, truncations
from sluice.passes.cut.factor_onnx import factorize_onnx
from sluice.passes.cut.factor_torch import factorize_torch, truncate_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import MARK, capture
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.static_shapes import static_graph
from sluice.runtime.base.compare import assert_close
from sluice.runtime.targets import make_runner

TOL = 3e-5
# Even kernels with padding="same" are part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


class Kernels(nn.Module):
    """2-D: unequal kernels, strides, paddings and dilations, paddings in words, batch norms, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (5, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.conv = nn.Conv2d(8, 10, 3, stride=(1, 2), padding=1, bias=False)
        self.bn = nn.BatchNorm2d(10)
        self.same = nn.Conv2d(10, 9, (3, 5), padding="same", dilation=(2, 1))
        self.point = nn.Conv2d(9, 12, 1, stride=2)
        self.flat = nn.Conv2d(12, 7, (1, 3), padding="valid", stride=(2, 1))
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.tokens, self.plain = nn.Linear(7, 11), nn.Linear(11, 9, bias=False)
        self.head = nn.Linear(9, 6)
        self.turned, self.shift = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.last = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(F.relu(self.stem(x)))))
        x = F.gelu(self.point(F.relu(self.same(x))))
        x = self.flat(x + self.grouped(x)).flatten(2).transpose(1, 2)
        x = self.head(F.relu(self.plain(F.gelu(self.tokens(x)))).mean(1))
        return torch.addmm(self.shift, F.relu(x), self.turned) @ self.last


class Axes(nn.Module):
    """1-D and 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 7, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2))
        self.series = nn.Conv1d(7, 6, 5, stride=2, padding=3, dilation=2)
        self.words = nn.Conv1d(6, 5, 4, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.words(F.relu(self.series(F.relu(self.volume(x)).flatten(2))))


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 3)
        self.scale = nn.Parameter(torch.randn(5, 1, 1))
        self.point = nn.Conv2d(5, 3, 1)
        self.clash = nn.Conv2d(3, 2, 1)
        self.clash.weight_u = nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.grouped(x))))
        return self.clash(self.point(self.up(x) * self.scale)) * self.clash.weight_u


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "kernels": (Kernels, (3, 19, 17)),
    "axes": (Axes, (2, 4, 5, 3)),
    "one": (lambda: nn.Conv2d(5, 7, 3, stride=(1, 2), padding=1), (5, 11, 8)),
    "refused": (Refused, (4, 7, 5)),
}


@functools.cache
def network(name: str) -> tuple[fx.GraphModule, Tensor, onnx.ModelProto]:
    """Captured, its input and its export."""
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x = factory(), torch.randn(3, *shape)
    gm = capture(enliven(model, 0, (x,)), (x,))
    return gm, x, to_onnx(gm, x)


@pytest.fixture(params=["kernels", "axes"])
def dense(request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Tensor, onnx.ModelProto]:
    return network(request.param)


def layers(gm: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(p.shape) for name, p in gm.named_parameters()}
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and not name.startswith("grouped")}


def slim_of(gm: fx.GraphModule, edits: list[Factorize], **options: object) -> fx.GraphModule:
    """As at the end of ``rewrite_torch``."""
    slim = copy.deepcopy(gm)
    factorize_torch(slim, edits, **options)  # type: ignore[arg-type]
    slim.meta.pop(MARK)
    for node in slim.graph.nodes:
        node.meta.pop("val", None)
    return slim


def run_onnx(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    session = make_runner("ort-cpu", 1).build(model)
    (out,) = session.run({model.graph.input[0].name: x.numpy()}).values()
    return out


def edits_of(gm: fx.GraphModule, kind: str, rank: int | None) -> list[Factorize]:
    """Every layer that has the form, the others in their first one."""
    return [
        Factorize(name, form := kind if kind in forms_of(shape) else forms_of(shape)[0], rank or max_rank(shape, form))
        for name, shape in layers(gm).items()
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, None])
def test_both_rewriters_compute_the_truncated_network(
    dense: tuple[fx.GraphModule, Tensor, onnx.ModelProto], form: str, rank: int | None
) -> None:
    gm, x, model = dense
    edits = edits_of(gm, form, rank)
    closed = copy.deepcopy(gm)
    truncate_torch(closed, edits)
    reference = (gm if rank is None else closed)(x)
    assert_close(closed(x), reference, TOL)
    slim = slim_of(gm, edits)
    assert_close(slim(x), reference, TOL, "torch")
    before = model.SerializeToString()
    factorised = factorize_onnx(model, edits)
    assert model.SerializeToString() == before
    assert_close(run_onnx(factorised, x), reference, TOL, "ONNX")
    tensors = {init.name: numpy_helper.to_array(init) for init in factorised.graph.initializer}
    state = {name: tensor for name, tensor in slim.state_dict().items() if name in tensors}
    assert_close({name: tensors[name] for name in state}, state, 1e-6, "the same tensors by name")
    assert {e.param + end for e in edits for end in ("_v", "_u")} <= set(state)
    assert not {e.param for e in edits} & (set(tensors) | set(slim.state_dict()))


def test_the_export_of_the_cut_is_the_cut_of_the_export() -> None:
    """Each layer in another form; what is deployed computes the same."""
    gm, x, model = network("kernels")
    edits = [
        Factorize(name, forms_of(shape)[k % len(forms_of(shape))], 2 + k % 2)
        for k, (name, shape) in enumerate(layers(gm).items())
    ]
    assert {e.form for e in edits} == set(FORMS)
    factorised, exported = factorize_onnx(model, edits), to_onnx(slim_of(gm, edits), x)
    reference = run_onnx(factorised, x)
    assert_close(run_onnx(exported, x), reference, TOL)
    assert count_macs(exported) == count_macs(factorised)
    assert_close(run_onnx(finalize(factorised), x), reference, TOL)


def test_the_onnx_frame_stays(dense: tuple[fx.GraphModule, Tensor, onnx.ModelProto]) -> None:
    gm, _, source = dense
    model = onnx.ModelProto()
    model.CopyFrom(source)
    model.metadata_props.add(key="origin", value="test")
    for node in model.graph.node:
        node.metadata_props.add(key="scope", value=node.name)
    edits = edits_of(gm, "kxk-1x1", 2)
    done = factorize_onnx(model, edits)
    assert (done.ir_version, list(done.opset_import)) == (model.ir_version, list(model.opset_import))
    assert list(done.metadata_props) == list(model.metadata_props)
    assert all(node.metadata_props for node in done.graph.node)
    names = [node.name for node in done.graph.node]
    assert len(set(names)) == len(names)
    known = {info.name: info for info in done.graph.value_info}
    left = {name for node in done.graph.node for name in node.output} - {o.name for o in done.graph.output}
    assert left <= set(known) <= left | {init.name for init in done.graph.initializer}
    same = [info for info in model.graph.value_info if info.name in left]
    assert same and all(known[info.name].type == info.type for info in same)
    assert list(done.graph.output) == list(model.graph.output)
    onnx.shape_inference.infer_shapes(done, check_type=True, strict_mode=True, data_prop=True)
    # Of a static graph and with cheap factors, as for timing.
    cheap = factorize_onnx(static_graph(model, 2), edits, split=random_factors)
    assert count_macs(cheap) == 2 * count_macs(done)


@pytest.mark.parametrize("form", FORMS)
def test_macs_are_those_of_the_formula(form: str) -> None:
    layer = nn.Conv2d(5, 7, (5, 3), stride=(2, 3), padding=(2, 1))
    x = torch.randn(2, 5, 18, 14)
    gm = capture(layer, x)
    model = to_onnx(gm, x)
    slim = factorize_onnx(model, [Factorize("weight", form, 3)])
    height, width = layer(x).shape[2:]
    areas = {"out_area": height * width, "in_area": 18 * 14, "mid_area": height * 14}
    assert count_macs(slim) == factor_macs((7, 5, 5, 3), form, 3, **areas)


def test_analysis_reads_the_result(dense: tuple[fx.GraphModule, Tensor, onnx.ModelProto]) -> None:
    gm, x, model = dense
    edits = edits_of(gm, "kx1-1xk", 2)
    slim = capture(slim_of(gm, edits), x)
    for analysis in (analyze(slim), analyze_onnx(factorize_onnx(model, edits))):
        ranks = [group for group in analysis.groups if group.size == 2]
        assert {ref.param for group in ranks for ref in group.refs} >= {e.param + "_v" for e in edits[:2]}


def test_trains_and_is_stored(tmp_path: Path) -> None:
    factory, shape = NETWORKS["kernels"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, x = factory(), torch.randn(3, *shape)
    enliven(model, 0, (x,))
    gm = capture(model, x)
    gm.get_parameter("stem.weight").requires_grad_(False)
    edits = edits_of(gm, "1x1-kxk", 3)
    slim = slim_of(gm, edits).train()
    slim(x).square().mean().backward()
    for edit in edits:
        for name in (edit.param + "_v", edit.param + "_u"):
            parameter = slim.get_parameter(name)
            assert parameter.dtype == torch.float32 and parameter.is_contiguous()
            if edit.param == "stem.weight":
                assert not parameter.requires_grad and parameter.grad is None
            else:
                assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    with torch.no_grad():
        for parameter in slim.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    store.save_weights(slim, tmp_path / "slim.safetensors")
    tensors = store.read_tensors(tmp_path / "slim.safetensors")
    other = slim_of(capture(factory(), x), edits, split=random_factors)
    other.load_state_dict(tensors)
    assert_close(other.eval()(x), slim.eval()(x), 1e-6)
    assert all(not name.endswith(tuple(e.param for e in edits)) for name in tensors)


def test_a_trained_factor_is_not_truncated_again(dense: tuple[fx.GraphModule, Tensor, onnx.ModelProto]) -> None:
    gm, _, model = dense
    edit = edits_of(gm, "kxk-1x1", 2)[0]
    slim = slim_of(gm, [edit])
    with pytest.raises(SluiceError, match="no such dense weight"):
        factorize_torch(slim, [edit])
    with pytest.raises(SluiceError, match="no such dense weight"):
        factorize_onnx(model, [edit, edit])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 9, 7, dtype=dtype)
    gm = capture(nn.Conv2d(4, 6, 3, dtype=dtype), x)
    edits = [Factorize("weight", "kx1-1xk", 4)]
    closed = copy.deepcopy(gm)
    truncate_torch(closed, edits)
    slim = slim_of(gm, edits)
    assert {p.dtype for p in [*slim.parameters(), *closed.parameters()]} == {dtype}
    assert_close(slim(x), closed(x), 3e-2 if dtype == torch.bfloat16 else 1e-12)


def fewer(weight: np.ndarray, form: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    return factors(weight, form, rank - 1)


def swapped(weight: np.ndarray, form: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    return factors(weight.swapaxes(-1, -2), form, rank)


def flipped(weight: np.ndarray, form: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = factors(weight, form, rank)
    return first[:, ::-1], second


@pytest.mark.parametrize("fault", [fewer, swapped, flipped])
@pytest.mark.parametrize("form", FORMS)
def test_faults_are_seen(fault: Callable, form: str) -> None:
    gm, x, model = network("one")
    edits = [Factorize("weight", form, 3)]
    truncate_torch(closed := copy.deepcopy(gm), edits)
    for made in (run_onnx(factorize_onnx(model, edits, split=fault), x), slim_of(gm, edits, split=fault)(x)):
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(made, closed(x), 1e-2)


def test_gemm_and_matmul_in_every_orientation() -> None:
    rng = np.random.default_rng(0)
    weight, other, bias = rng.standard_normal((5, 7)), rng.standard_normal((6, 5)), rng.standard_normal(7)
    third = rng.standard_normal((9, 7))
    tensors = {"w": weight, "o": other, "b": bias, "t": third}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["p"], transA=1, alpha=0.5, beta=2.0, name="first"),
        helper.make_node("Transpose", ["t"], ["turned"]),
        helper.make_node("Gemm", ["p", "turned"], ["q"], name="second"),
        helper.make_node("Transpose", ["q"], ["r"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "o"], ["s"], transA=1, transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "N"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("r", "s")],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    slim = factorize_onnx(model, [Factorize(name, "kxk-1x1", 2) for name in "wto"])
    x = rng.standard_normal((5, 3)).astype(np.float32)

    def short(w: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(w)
        return (u[:, :2] * s[:2]) @ vt[:2]

    p = 0.5 * x.T @ short(weight) + 2.0 * bias
    expected = {"r": (p @ short(third).T).T, "s": x.T @ short(other).T}
    assert_close(make_runner("ort-cpu", 1).build(slim).run({"x": x}), expected, 1e-5)
    shapes = {init.name: tuple(init.dims) for init in slim.graph.initializer}
    assert (shapes["w_v"], shapes["w_u"]) == ((5, 2), (2, 7))  # stored the way the weight was
    assert (shapes["t_v"], shapes["t_u"]) == ((2, 7), (9, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pads": [0, 2, 1, 3], "strides": [1, 2], "dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 1]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
        {"auto_pad": "VALID", "strides": [1, 2]},
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_every_padding_of_onnx(options: dict[str, object], form: str) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4, 4, 3)).astype(np.float32)

    def model(values: np.ndarray) -> onnx.ModelProto:
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], **options)],
            "conv",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 9, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(values, "w")],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    slim = factorize_onnx(model(weight), [Factorize("w", form, 3)])
    assert_close(run_onnx(slim, x), run_onnx(model(truncations(weight, form)(3)), x), TOL)


@pytest.mark.parametrize(
    ("param", "form", "reason"),
    [
        ("absent.weight", "kxk-1x1", "no such dense weight"),
        ("grouped.weight", "kxk-1x1", "groups?=2"),
        ("twice.weight", "kxk-1x1", "exactly one"),
        ("up.weight", "kxk-1x1", "ConvTranspose|conv_transpose2d"),
        ("scale", "kxk-1x1", "Mul|mul"),
        ("twice.bias", "kxk-1x1", "exactly one"),
        ("point.bias", "kxk-1x1", "does not use it as the weight"),
        ("point.weight", "1x1-kxk", r"\(3, 5, 1, 1\).*\['kxk-1x1'\]"),
        ("clash.weight", "kxk-1x1", "in use"),
    ],
)
def test_refusals_name_the_weight(param: str, form: str, reason: str) -> None:
    gm, _, model = network("refused")
    edit = Factorize(param, form, 2)
    for refused in (lambda: factorize_torch(gm, [edit]), lambda: factorize_onnx(model, [edit])):
        with pytest.raises(SluiceError, match=reason) as caught:
            refused()
        assert repr(param) in str(caught.value)
    with pytest.raises(SluiceError, match="no such dense weight"):
        truncate_torch(gm, [Factorize("absent", "kxk-1x1", 2)])
    with pytest.raises(SluiceError, match="has"):
        truncate_torch(gm, [Factorize("point.weight", "kx1-1xk", 2)])
