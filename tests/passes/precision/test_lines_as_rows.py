"""Operators on (N, C, L) become operators on one row where the rule says so, and outputs stay what they are."""

from __future__ import annotations

from collections.abc import Callable
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
from sluice.passes.precision.lines_as_rows import with_lines_as_rows
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.sources import source_model
from sluice.profiler.profile import profile_onnx
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.blocked_part import block_size, without_reorders
from tests.device import SeeingRunner, profile_on
from tests.exported import arrays, deployed, ops, optimised, random_feeds, run

TOL = 1e-6
Build = Callable[[], onnx.ModelProto]


class Lines:
    """A graph of one input (N, 5, 37) in the making; every weight is random."""

    def __init__(self, length: int | str = 37) -> None:
        self.rng = np.random.default_rng(0)
        self.length = length
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        self.weights.append(numpy_helper.from_array(self.rng.standard_normal(shape).astype(np.float32), name))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **settings: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **settings))
        return output

    def conv(self, into: str, name: str, shape: tuple[int, int, int], **settings: object) -> str:
        return self.add("Conv", [into, self.weight(f"{name}.weight", *shape)], name, **settings)

    def model(self, *outputs: str, opset: int = 20) -> onnx.ModelProto:
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5, self.length])
        told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "lines", [given], told, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def settings(length: int | str = 37, opset: int = 20) -> onnx.ModelProto:
    """Strides, dilations, uneven paddings, groups, pools, and a bias."""
    g = Lines(length)
    a = g.conv("x", "one", (6, 5, 4), pads=[2, 1], strides=[2])
    b = g.conv(g.add("Relu", [a], "a.relu"), "two", (9, 2, 3), group=3, dilations=[2], pads=[2, 3], kernel_shape=[3])
    c = g.add("MaxPool", [b], "max", kernel_shape=[3], strides=[2], pads=[1, 0])
    d = g.conv(c, "three", (9, 1, 5), group=9, auto_pad="SAME_UPPER", strides=[2])
    return g.model(g.add("AveragePool", [d], "mean", kernel_shape=[2], ceil_mode=1), opset=opset)


def branches() -> onnx.ModelProto:
    """Concatenated, padded, gated, added constants of every rank, normed, read out in the middle and at the end."""
    g = Lines()
    a = g.conv("x", "one", (7, 5, 3), pads=[1, 1])
    b = g.conv("x", "two", (4, 5, 1))
    c = g.add("Concat", [a, b], "both", axis=-2)
    names = [g.weight(f"norm.{k}", 11) for k in range(3)]
    g.weights.append(numpy_helper.from_array(np.linspace(0.5, 2, 11, dtype=np.float32), "norm.var"))
    d = g.add("BatchNormalization", [c, *names, "norm.var"], "normed")
    for k, shape in enumerate([(), (1,), (37,), (11, 1), (1, 11, 1), (1, 37)]):
        d = g.add("Add" if k % 2 else "Mul", [d, g.weight(f"constant{k}", *shape)], f"d{k}")
    e = g.add("Pad", [d, g.integers("sizes", [0, 0, 2, 0, 0, 3]), g.weight("value")], "padded")
    f = g.conv(e, "three", (11, 11, 6))
    pooled = g.add("GlobalAveragePool", [f], "pooled")
    gate = g.add("Sigmoid", [g.conv(pooled, "gate", (11, 11, 1))], "gated")
    z = g.add("Add", [g.add("Mul", [f, gate], "scaled"), d], "sum")
    g.add("Concat", [z, d], "ends", axis=2)
    g.add("ReduceMean", [z, g.integers("last", [-1])], "read", keepdims=0)
    return g.model("read", "ends", "sum")


def interrupted() -> onnx.ModelProto:
    """Two regions about a transpose."""
    g = Lines()
    a = g.add("Relu", [g.conv("x", "one", (7, 5, 3))], "a")
    b = g.add("Transpose", [g.add("Softmax", [a], "soft", axis=1)], "b", perm=[0, 1, 2])
    return g.model(g.conv(b, "two", (3, 7, 5)))


def shared(foreign: bool) -> onnx.ModelProto:
    """A weight with two readers, the second of them no member if ``foreign``."""
    g = Lines()
    a = g.add("Relu", [g.conv("x", "one", (5, 5, 3), pads=[1, 1])], "a")
    b = g.add("Conv", [a, "one.weight"], "b")
    if not foreign:
        return g.model(b)
    c = g.conv(b, "two", (4, 5, 3))
    return g.model(c, g.add("Neg", ["one.weight"], "negative"))


def alone(shape: tuple[int, int, int], **given: object) -> onnx.ModelProto:
    g = Lines()
    return g.model(g.add("Softmax", [g.conv("x", "one", shape, **given)], "y", axis=1))


def grouped_alone() -> onnx.ModelProto:
    g = Lines()
    both = g.add("Concat", ["x", "x"], "both", axis=1)
    return g.model(g.add("Softmax", [g.conv(both, "one", (10, 2, 3), group=5)], "y", axis=1))


def no_region(kind: str) -> onnx.ModelProto:
    g = Lines()
    if kind == "pool":
        return g.model(g.add("MaxPool", [g.add("Relu", ["x"], "a")], "y", kernel_shape=[2]))
    if kind == "computed weight":
        g.add("Neg", [g.weight("w", 7, 5, 3)], "negative")
        return g.model(g.add("Conv", ["x", "negative"], "y"))
    return settings(opset=12)


MADE: dict[str, tuple[Build, int, int]] = {
    "settings": (settings, 1, 1),
    "any length": (lambda: settings("L"), 1, 1),
    "opset 13": (lambda: settings(opset=13), 1, 1),
    "branches": (branches, 1, 2),
    "interrupted": (interrupted, 2, 2),
    "shared weight": (lambda: shared(False), 1, 1),
    "alone": (lambda: alone((7, 5, 3)), 1, 1),
}
LEFT: dict[str, Build] = {
    "one tap alone": lambda: alone((7, 5, 1)),
    "groups alone": grouped_alone,
    "pool": lambda: no_region("pool"),
    "computed weight": lambda: no_region("computed weight"),
    "opset 12": lambda: no_region("opset"),
}


@pytest.mark.parametrize("name", MADE)
def test_written(name: str) -> None:
    build, entries, exits = MADE[name]
    model = build()
    before = model.SerializeToString(deterministic=True)
    done = with_lines_as_rows(model)
    assert model.SerializeToString(deterministic=True) == before
    assert with_lines_as_rows(done) is done
    onnx.checker.check_model(done, full_check=True)
    assert (ops(done)["Unsqueeze"], ops(done)["Squeeze"]) == (entries, exits)
    weights, rows = arrays(model), arrays(done)
    kernels = [node.input[1] for node in done.graph.node if node.op_type == "Conv"]
    assert kernels and all(rows[k].shape == (*weights[k].shape[:2], 1, weights[k].shape[2]) for k in kernels)
    assert all(np.array_equal(weights[k].reshape(-1), rows[k].reshape(-1)) for k in weights.keys() & rows.keys())
    assert weights.keys() - rows.keys() <= {"sizes"}
    assert {init.name for init in done.graph.initializer} <= {n for node in done.graph.node for n in node.input}
    for batch in (1, 3):
        feeds = {"x": np.random.default_rng(batch).standard_normal((batch, 5, 37)).astype(np.float32)}
        assert_close(run(done, feeds), run(model, feeds), TOL)


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    model = LEFT[name]()
    assert with_lines_as_rows(model) is model


def test_a_weight_that_others_read_keeps_its_shape() -> None:
    model = shared(True)
    done = with_lines_as_rows(model)
    weights = arrays(done)
    assert weights["one.weight"].shape == (5, 5, 3) and weights["two.weight"].shape == (4, 5, 1, 3)
    feeds = {"x": np.random.default_rng(2).standard_normal((3, 5, 37)).astype(np.float32)}
    assert_close(run(done, feeds), run(model, feeds), TOL)


def test_a_padding_at_the_wrong_end_shows() -> None:
    model = settings()
    done = with_lines_as_rows(model)
    pads = next(a for a in done.graph.node[1].attribute if a.name == "pads")
    assert list(pads.ints) == [0, 2, 0, 1]
    pads.ints[:] = [0, 1, 0, 2]
    feeds = {"x": np.random.default_rng(2).standard_normal((3, 5, 37)).astype(np.float32)}
    assert relative_error(run(done, feeds), run(model, feeds)) > 0.1


@pytest.mark.parametrize("length", [37, "L"])
def test_the_runtime_computes_in_blocks(length: int | str, tmp_path: Path) -> None:
    """If this fails, ONNX Runtime has no blocked kernels for rows or has some for lines: the rewrite is in vain."""
    g = Lines(length)
    a = g.add("Relu", [g.conv("x", "one", (64, 5, 3), pads=[1, 1])], "a")
    model = g.model(g.conv(a, "two", (64, 64, 3)))
    assert optimised(model, tmp_path)["ReorderOutput"] == 0
    blocked = optimised(with_lines_as_rows(model), tmp_path)
    assert blocked["ReorderOutput"] == (block_size() > 1)
    assert blocked["Transpose"] == 0


def test_a_piece_has_rows_at_its_borders() -> None:
    g = Lines()
    a = g.conv("x", "one", (32, 5, 1))
    model = g.model(g.add("Relu", [a], "y"), a)
    done = with_lines_as_rows(model, part=True)
    assert ops(done) == {"Conv": 1, "Relu": 1}
    shapes = [[d.dim_value for d in info.type.tensor_type.shape.dim[1:]] for info in done.graph.input]
    assert shapes == [[5, 1, 37]]
    onnx.checker.check_model(done, full_check=True)
    feeds = {"x": np.random.default_rng(2).standard_normal((3, 5, 37)).astype(np.float32)}
    rows = run(done, {"x": feeds["x"][:, :, None]})
    assert_close({name: row[:, :, 0] for name, row in rows.items()}, run(model, feeds), TOL)
    assert ops(without_reorders(done)).keys() <= {"Conv", "Relu"}


def test_a_source_makes_no_region_of_a_piece() -> None:
    """The addition behind a matrix product stays, though its other operand has a source; the source alone is a row."""
    g = Lines()
    made = g.add("MatMul", ["x", g.weight("w", 37, 37)], "made")
    source = g.conv("x", "source", (5, 1, 1), group=5)
    model = g.model(g.add("Add", [made, source], "y"))
    assert with_lines_as_rows(model, part=True) is model
    assert ops(with_lines_as_rows(source_model((3, 5, 37)), part=True)) == {"Conv": 1}
    assert len(with_lines_as_rows(source_model((3, 5, 37)), part=True).graph.initializer[0].dims) == 4


class Listener(nn.Module):
    """Residual, strided, depthwise, pooled, and read out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv1d(3, 11, 7, 2, padding=3), nn.BatchNorm1d(11)
        self.two, self.back = nn.Conv1d(11, 13, 5, padding=2), nn.Conv1d(13, 11, 1)
        self.each, self.last = nn.Conv1d(11, 11, 3, groups=11), nn.Conv1d(11, 9, 1)
        self.out = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)))
        x = F.max_pool1d(F.relu(x + self.back(F.relu(self.two(x)))), 2)
        return self.out(F.relu(self.last(F.relu(self.each(x)))).mean(2))


@pytest.fixture(scope="module")
def listener() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return enliven(Listener(), seed=0).eval(), torch.randn(3, 3, 71)


def test_only_one_thread_of_onnx_runtime_in_fp32(listener: tuple[nn.Module, Tensor]) -> None:
    model = finalize(to_onnx(listener[0], listener[1:]))
    assert ops(to_precision(model, "fp32"))["Unsqueeze"] == 1
    assert ops(to_precision(model, "fp32", threads=2))["Unsqueeze"] == 0
    for target in ("openvino", "tensorrt", "ort-cuda", "torch-cuda"):
        assert ops(to_precision(model, "fp32", target=target))["Unsqueeze"] == 0
    for precision in ("fp16", "int8"):
        assert ops(to_precision(model, precision))["Unsqueeze"] == 0


def test_the_reference_network() -> None:
    model = deployed("resnet1d")
    done = to_precision(model, "fp32")
    assert (ops(done)["Unsqueeze"], ops(done)["Squeeze"]) == (1, 1)
    assert arrays(done).keys() >= arrays(model).keys()
    feeds = random_feeds(model)
    assert_close(run(done, feeds), run(model, feeds))  # 16 layers deep, either file is 1.6e-6 and more off float64


def test_cut_through(listener: tuple[nn.Module, Tensor]) -> None:
    """The file of rows of the cut graph computes what the cut network does, and is read as the plain file is."""
    model, x = listener
    exported = to_onnx(model, (x,))
    plan = make_plan(analyze(capture(model, (x,))), {"one": [1, 4, 10], "two": [0, 2], "last": [3]})
    slim = rewrite_torch(model, plan, (x,))
    done = to_precision(finalize(rewrite_onnx(exported, plan)), "fp32")
    assert ops(done)["Unsqueeze"] == 1
    (found,) = run(done, {done.graph.input[0].name: x.numpy()}).values()
    assert_close(found, slim(x).detach().numpy())
    forms = [analyze_onnx(form) for form in (finalize(exported), to_precision(finalize(exported), "fp32"))]
    groups = [[(g.name, g.size, [(r.param, r.axis) for r in g.refs]) for g in form.groups] for form in forms]
    assert groups[0] == groups[1]
    assert [size for _, size, _ in groups[0]] == [11, 13, 9]


def test_what_is_timed_is_what_is_deployed(listener: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, and the engines that calibrate them, have rows; only engines change the shape."""
    runner = SeeingRunner()
    profile_on(lambda target, threads=1: runner, monkeypatch)
    dense = to_onnx(listener[0], listener[1:])
    profile = profile_onnx(dense, deployment=Deployment(batch=2), progress=False)
    whole = [model for model in runner.seen if ops(model)["Conv"] == 5 and ops(model)["Gemm"] == 1]
    parts = [model for model in runner.seen if ops(model)["Conv"] and not ops(model)["Gemm"]]
    assert whole and all(ops(model)["Unsqueeze"] == 1 for model in whole)
    assert parts and not any(ops(model)["Unsqueeze"] for model in parts)
    weights = [init for model in runner.seen for init in model.graph.initializer if init.name.endswith("one.weight")]
    assert weights and all(len(init.dims) == 4 for init in weights)
    assert ops(profile.engine(finalize(dense)))["Unsqueeze"] == 1
