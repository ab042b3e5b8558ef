"""Every operator of the ONNX table is cut in a small graph, or freezes it with a reason.

Graphs are written by hand, ``Conv -> operator -> Conv``: no exporter decides what is tested. In all of them the
operator leaves channels apart, so the slim graph must compute what the dense one computes when the columns that the
second layer loses are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.onnx_axes import RULES, analyze_onnx
from sluice.passes.graph.onnx_graph import with_batch
from sluice.passes.graph.static_shapes import stand_in_batch
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner

INT = np.int64
# From (batch, channels, 4, 3) to (positions, batch, channels), and back to images.
IN = "a = ReduceMean<keepdims=0>(y, t)  i = Transpose<perm=[2, 0, 1]>(a)"
OUT = "o = Squeeze(r, u)  p = Transpose<perm=[1, 2, 0]>(o)  z = Unsqueeze(p, t)"


@dataclass(frozen=True)
class Case:
    """``nodes``: text of the graph between values ``y`` and ``z``; ``tensors``: its initialisers."""

    name: str
    nodes: str
    tensors: dict[str, Any]
    columns: int = 6
    frozen: str = ""
    rows: bool = False  # y is (batch, 6) instead of (batch, 6, 4, 3)
    opset: int = 20


def case(
    name: str, nodes: str, columns: int = 6, frozen: str = "", rows: bool = False, opset: int = 20, **tensors: Any
) -> Case:
    return Case(name, nodes, tensors, columns, frozen, rows, opset)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).uniform(0.2, 1.1, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, INT)


UNARY = [
    "Relu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Celu",
    "Softplus",
    "Mish",
    "Gelu",
    "Neg",
    "Abs",
    "Exp",
    "Erf",
    "Sin",
    "Cos",
    "Tan",
    "Atan",
    "Sinh",
    "Asinh",
    "Cosh",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Identity",
    "Dropout",
    "Softsign",
    "ThresholdedRelu",
    "Shrink",
]
REDUCE = [
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceL2",
    "ReduceL1",
    "ReduceProd",
    "ReduceSumSquare",
    "ReduceLogSumExp",
]
CASES = [
    *(case(op, f"z = {op}(y)") for op in UNARY),
    *(case(op, f"a = Abs(y)  z = {op}(a)") for op in ("Log", "Sqrt", "Reciprocal")),
    *(case(op, f"a = Tanh(y)  z = {op}(a)") for op in ("Asin", "Acos", "Atanh")),
    case("Acosh", "a = Cosh(y)  z = Acosh(a)"),
    case("IsInf", "a = Reciprocal(y)  b = IsInf(a)  z = Where(b, c, y)", c=np.float32(0.3)),
    *(case(op, f"a = Greater(y, c)  b = Less(y, c)  e = {op}(a, b)  z = Where(e, y, d)", c=np.float32(0.3),
           d=weight(6, 1, 1)) for op in ("And", "Or", "Xor")),
    case("Mean", "z = Mean(y, c)", c=weight(6, 1, 1)),
    case("Swish", "z = Swish(y)", opset=24),
    case("Clip", "z = Clip(y, low, high)", low=np.float32(0.1), high=np.float32(0.9)),
    case("Cast", "a = Cast<to=11>(y)  z = CastLike(a, y)"),
    case("Not", "a = Greater(y, k)  b = Not(a)  z = Cast<to=1>(b)", k=np.float32(0.4)),
    *(case(op, f"z = {op}(y, c)", c=weight(6, 1, 1)) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu", "Sum")),  # noqa: E501
    case("Pow", "z = Pow(y, c)", c=np.float32(2.0)),
    case("Mod", "a = Abs(y)  z = Mod<fmod=1>(a, c)", c=np.float32(0.4)),
    *(case(op, f"a = {op}(y, c)  z = Where(a, y, d)", c=np.float32(0.3), d=weight(6, 1, 1)) for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")),  # noqa: E501
    case("Equal", "a = Round(y)  b = Equal(a, c)  z = Where(b, y, d)", c=np.float32(0.0), d=weight(1, 6, 1, 1)),
    case("Add along another axis", "z = Add(y, c)", c=weight(4, 1)),
    case("Conv", "z = Conv(y, w, b)", columns=5, w=weight(5, 6, 1, 1), b=weight(5)),
    case("Conv depthwise", "z = Conv<group=6>(y, w)", w=weight(6, 1, 2, 2)),
    case("Conv depthwise, multiplier", "z = Conv<group=6>(y, w, b)", columns=12, w=weight(12, 1, 2, 2), b=weight(12)),
    case("Conv grouped", "z = Conv<group=2>(y, w, b)", columns=8, w=weight(8, 3, 1, 1), b=weight(8)),
    case("ConvTranspose", "z = ConvTranspose(y, w)", columns=5, w=weight(6, 5, 2, 2)),
    case("BatchNormalization", "z = BatchNormalization(y, s, b, m, v)", s=weight(6), b=weight(6) + 1, m=weight(6) + 2,
         v=weight(6) + 3),
    case("BatchNormalization, computed", "t = Neg(s)  z = BatchNormalization(y, t, s, s, s)", s=weight(6)),
    case("InstanceNormalization", "z = InstanceNormalization(y, s, b)", s=weight(6), b=weight(6) + 1),
    case("Reshape", "a = Reshape(y, t)  z = Reshape(a, u)", t=ints(0, 6, 12), u=ints(0, 0, 3, 4)),
    case("Reshape, batch inferred", "a = Reshape(y, t)  z = Reshape(a, u)", t=ints(-1, 2, 3, 4, 3), u=ints(-1, 6, 4, 3)),  # noqa: E501
    case("Reshape, channels inferred", "z = Reshape(y, t)", t=ints(0, -1, 4, 3)),
    case("Flatten", "a = Flatten(y)  z = Reshape(a, t)", t=ints(0, 6, 4, 3)),
    case("Squeeze", "a = Unsqueeze(y, t)  z = Squeeze(a, t)", t=ints(2)),
    case("AveragePool", "z = AveragePool<kernel_shape=[2, 2]>(y)"),
    case("MaxPool", "z = MaxPool<kernel_shape=[2, 2]>(y)"),
    case("LpPool", "z = LpPool<kernel_shape=[2, 2]>(y)"),
    case("GlobalLpPool", "z = GlobalLpPool(y)"),
    case("GridSample", "a = Conv(y, w)  b = Transpose<perm=[0, 2, 3, 1]>(a)  c = Tanh(b)  z = GridSample(y, c)",
         w=weight(2, 6, 1, 1) - 0.6),
    case("AveragePool beside", "a = Transpose<perm=[0, 2, 1, 3]>(y)  b = AveragePool<kernel_shape=[1, 2]>(a)  "
         "z = Transpose<perm=[0, 2, 1, 3]>(b)"),
    case("MaxPool of every other channel", "a = Transpose<perm=[0, 2, 1, 3]>(y)  "
         "b = MaxPool<kernel_shape=[1, 2], strides=[2, 1]>(a)  z = Transpose<perm=[0, 2, 1, 3]>(b)", columns=3,
         frozen="works along the labelled axis"),
    case("GlobalAveragePool", "z = GlobalAveragePool(y)"),
    case("GlobalMaxPool", "z = GlobalMaxPool(y)"),
    case("Resize by scales", "z = Resize(y, , s)", s=np.array([1, 1, 2, 2], np.float32)),
    case("Resize by sizes", "z = Resize(y, , , s)", s=ints(2, 6, 8, 3)),
    case("Upsample", "z = Upsample(y, s)", s=np.array([1, 1, 2, 2], np.float32), opset=9),
    *(case(op, f"z = {op}(y, t)", t=ints(2, 3)) for op in REDUCE),
    case("ReduceMax over the channels", "a = ReduceMax(y, t)  z = Add(a, c)", t=ints(1), c=weight(1, 6, 1, 1),
         frozen="reduces over the channels"),
    case("ReduceLogSum", "a = Abs(y)  z = ReduceLogSum(a, t)", t=ints(2, 3)),
    *(case(op, f"a = {op}<axis=2>(y)  z = Cast<to=1>(a)") for op in ("ArgMax", "ArgMin")),
    case("ArgMax over the channels", "a = ArgMax<axis=1>(y)  b = Cast<to=1>(a)  z = Add(b, c)", c=weight(6, 1, 1),
         frozen="reduces over the channels"),
    case("TopK", "a, b = TopK<axis=2>(y, k)  c = Cast<to=1>(b)  z = Add(a, c)", k=ints(2)),
    case("TopK of the channels", "z, b = TopK<axis=1>(y, k)", columns=2, k=ints(2),
         frozen="works along the labelled axis"),
    case("LpNormalization beside", "z = LpNormalization<axis=2>(y)"),
    case("Trilu", "z = Trilu<upper=0>(y)"),
    case("Trilu of the channels", "a = Transpose<perm=[0, 2, 1, 3]>(y)  b = Trilu(a)"
         "  z = Transpose<perm=[0, 2, 1, 3]>(b)", frozen="works along the labelled axis"),
    case("Softmax", "z = Softmax<axis=2>(y)"),
    case("LogSoftmax", "z = LogSoftmax(y)"),
    case("Softmax over the channels", "z = Softmax<axis=1>(y)", frozen="mixes the channels"),
    case("CumSum", "z = CumSum(y, t)", t=np.array(2)),
    case("LayerNormalization beside", "z = LayerNormalization<axis=2>(y, s)", s=weight(4, 3)),
    case("Concat", "a = Neg(y)  z = Concat<axis=1>(y, a)", columns=12),
    case("Split", "a, z = Split<axis=1>(y, t)", columns=4, t=ints(2, 4)),
    case("Split in parts", "z, b = Split<axis=1, num_outputs=2>(y)", columns=3),
    case("Slice", "z = Slice(y, s, e, a)", columns=4, s=ints(0, 1), e=ints(3, 5), a=ints(2, 1)),
    case("Slice from the end", "z = Slice(y, s, e, a)", columns=3, s=ints(-4), e=ints(-1), a=ints(-3)),
    case("Slice to the end", "z = Slice(y, s, e, a)", columns=3, s=ints(3), e=ints(2**63 - 1), a=ints(1)),
    case("Slice with steps", "z = Slice(y, s, e, a, t)", columns=3, s=ints(0), e=ints(6), a=ints(1), t=ints(2)),
    case("Slice with steps from the end", "z = Slice(y, s, e, a, t)", columns=2, s=ints(-5, 0), e=ints(-1, 3),
         a=ints(1, 2), t=ints(2, 1)),
    case("Slice from behind", "z = Slice(y, s, e, a, t)", s=ints(-1), e=ints(-(2**63)), a=ints(2), t=ints(-1)),
    case("Slice the channels from behind", "z = Slice(y, s, e, a, t)", s=ints(-1), e=ints(-(2**63)), a=ints(1),
         t=ints(-1), frozen="reverses the channels"),
    case("Transpose", "a = Transpose<perm=[0, 2, 3, 1]>(y)  b = Relu(a)  z = Transpose<perm=[0, 3, 1, 2]>(b)"),
    case("Expand", "a = ReduceMax(y, t)  z = Expand(a, s)", t=ints(2, 3), s=ints(1, 6, 4, 3)),
    case("Expand over the batch", "a = ReduceMax(y, t)  n = Shape<end=1>(y)"
         "  s = Concat<axis=0>(n, k)  z = Expand(a, s)", t=ints(0, 2, 3), k=ints(6, 4, 3)),
    case("Expand over the batch, one number", "a = ReduceMax(y, t)  n = Shape<end=1>(y)  h = Shape<start=2>(y)"
         "  s = Concat<axis=0>(n, k, h)  z = Expand(a, s)", t=ints(0, 2, 3), k=ints(6)),
    case("Expand over the batch, all computed", "a = ReduceMax(y, t)  s = Shape(y)  u = Mul(s, k)  z = Expand(a, u)",
         t=ints(0, 2, 3), k=ints(1, 1, 1, 1)),
    case("Expand over the batch, last axis", "a = ReduceMax(y, t)  s = Shape(y)  u = Mul(s, k)  z = Expand(a, u)",
         rows=True, t=ints(0), k=ints(1, 1)),
    case("Expand a number", "s = Shape(y)  r = Expand(k, s)  z = Add(y, r)", k=np.float32(0.5)),
    case("Gather a position", "a = Gather<axis=-1>(y, k)  z = Unsqueeze(a, t)", k=np.array(1), t=ints(2)),
    case("Gather a position in front", "a = Transpose<perm=[2, 0, 1, 3]>(y)  b = Gather(a, k)  z = Unsqueeze(b, t)",
         k=np.array(-2), t=ints(2)),
    case("Gather some positions", "z = Gather<axis=3>(y, k)", k=ints(2, 0)),
    case("Gather a channel", "a = Gather<axis=1>(y, k)  z = Unsqueeze(a, t)", columns=1, k=np.array(3), t=ints(1),
         frozen="reduces over the channels"),
    case("Gather channels", "z = Gather<axis=1>(y, k)", columns=2, k=ints(3, 0), frozen="picks channels"),
    case("Gather by a table", "a = Gather<axis=3>(y, k)  z = ReduceSum<keepdims=0>(a, t)", t=ints(4),
         k=np.array([[0, 2], [1, 1]])),
    case("an open size", "m = ReduceMax<keepdims=0>(x)  i = Cast<to=7>(m)  j = Unsqueeze(i, a)  z = Slice(y, a, j, t)",
         a=ints(0), t=ints(2), frozen="works on a size that is not known"),
    case("Pad", "z = Pad(y, p)", p=ints(0, 0, 1, 0, 0, 0, 0, 2)),
    case("Pad the channels", "z = Pad(y, p)", columns=7, p=ints(0, 1, 0, 0, 0, 0, 0, 0)),
    case("Pad the channels, an axis given", "z = Pad(y, p, , a)", columns=9, p=ints(1, 2), a=ints(1)),
    case("Pad by reflection", 'z = Pad<mode="reflect">(y, p)', columns=7, p=ints(0, 1, 0, 0, 0, 0, 0, 0),
         frozen="works along the labelled axis"),
    case("Tile", "z = Tile(y, t)", columns=12, t=ints(1, 2, 1, 1)),
    case("IsNaN", "a = Sqrt(y)  b = IsNaN(a)  z = Where(b, c, y)", c=np.float32(0.3)),
    case("RMSNormalization beside", "z = RMSNormalization<axis=2>(y, s)", s=weight(4, 3), opset=23),
    case("DepthToSpace CRD", 'a = Conv(y, w)  z = DepthToSpace<blocksize=2, mode="CRD">(a)', columns=3,
         w=weight(12, 6, 1, 1)),
    case("DepthToSpace DCR", "a = Concat<axis=1>(y, y)  z = DepthToSpace<blocksize=2>(a)", columns=3),
    case("SpaceToDepth", "p = Pad(y, q)  z = SpaceToDepth<blocksize=2>(p)", columns=24, q=ints(0, 0, 0, 0, 0, 0, 0, 1)),
    case("SpaceToDepth and back", "p = Pad(y, q)  a = SpaceToDepth<blocksize=2>(p)  b = Relu(a)"
         "  z = DepthToSpace<blocksize=2>(b)", q=ints(0, 0, 0, 0, 0, 0, 0, 1)),
    case("Gemm", "z = Gemm<transB=1>(y, w, b)", columns=5, rows=True, w=weight(5, 6), b=weight(5)),
    case("Gemm, not transposed", "z = Gemm(y, w, b)", columns=5, rows=True, w=weight(6, 5), b=weight(5)),
    case("Gemm, scaled", "z = Gemm<alpha=0.5>(y, w)", columns=5, rows=True, w=weight(6, 5)),
    case("MatMul", "z = MatMul(y, w)", columns=5, rows=True, w=weight(6, 5)),
    case("MatMul, transposed weight", "t = Transpose(w)  z = MatMul(y, t)", columns=5, rows=True, w=weight(5, 6)),
    case("Shape", "s = Shape(y)  r = ConstantOfShape(s)  z = Add(y, r)"),
    case("ConstantOfShape", "n = Shape<end=1>(y)  s = Concat<axis=0>(n, k)  r = ConstantOfShape(s)"
         "  z = Concat<axis=3>(y, r)", k=ints(6, 4, 2)),
    case("GatherND", "a = Transpose<perm=[2, 0, 1, 3]>(y)  b = GatherND(a, k)  z = Transpose<perm=[1, 2, 0, 3]>(b)",
         k=np.array([[3], [1]])),
    case("GatherND, several axes", "a = GatherND<batch_dims=1>(y, k)  z = Unsqueeze(a, t)", columns=4, t=ints(2),
         k=np.array([[2]] * 2), frozen="unknown operator GatherND"),
    case("Einsum", 'z = Einsum<equation="nchw,oc->nohw">(y, w)', columns=5, w=weight(5, 6)),
    case("Einsum of a diagonal", 'b = Slice(y, k, s, u)  a = Einsum<equation="ncii->nci">(b)  z = Unsqueeze(a, t)',
         t=ints(2), k=ints(0), s=ints(3), u=ints(2), frozen="unknown operator Einsum"),
    case("Attention", "z = Attention(y, y, y)", opset=23),
    case("Attention, scores too", "z, , , q = Attention(y, y, y)", opset=23, frozen="unknown operator Attention"),
    *(case(op, f"{IN}  r = {op}<hidden_size=5>(i, w, k, d)  {OUT}", columns=5, w=weight(1, 5 * n, 6), k=weight(1, 5 * n, 5),  # noqa: E501
           d=weight(1, 10 * n), t=ints(3), u=ints(1)) for op, n in (("LSTM", 4), ("GRU", 3), ("RNN", 1))),
    case("LSTM, other activations", f"{IN}  r = LSTM<hidden_size=5, clip=3.0>(i, w, k)  {OUT}", columns=5,
         w=weight(1, 20, 6), k=weight(1, 20, 5), t=ints(3), u=ints(1), frozen="unknown operator LSTM"),
    case("Size", "s = Size(y)  t = Cast<to=1>(s)  z = Div(y, t)", frozen="unknown operator Size"),
    case("Constant", "c = Constant<value_float=2.0>()  z = Mul(y, c)"),
    case("Range", "r = Range(i, j, k)  z = Add(y, r)", i=np.float32(0), j=np.float32(3), k=np.float32(1)),
    case("no rule", "z = Hardmax<axis=1>(y)", frozen="unknown operator Hardmax"),
    case("no rule for one of two", "a = NonZero(y)  z = Neg(y)", frozen="unknown operator NonZero"),
]  # fmt: skip


def graph(c: Case) -> onnx.ModelProto:
    layer = "y = Gemm(x, first, first_bias)" if c.rows else "y = Conv(x, first, first_bias)"
    last = "out = MatMul(z, last)" if c.rows else "out = Conv(z, last)"
    nodes = "  ".join((layer, c.nodes, last))
    shape = "N, 2" if c.rows else "N, 2, 4, 3"
    rank = "N, 3" if c.rows else "N, 3, H, W"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {c.opset}]> toy (float[{shape}] x) => (float[{rank}] out) {{ {nodes} }}'
    )
    first, last_shape = ((2, 6), (c.columns, 3)) if c.rows else ((6, 2, 1, 1), (3, c.columns, 1, 1))
    rng = np.random.default_rng(5)
    named = {
        "first": rng.standard_normal(first).astype(np.float32),
        "first_bias": rng.uniform(0.3, 0.7, 6).astype(np.float32),
        "last": rng.standard_normal(last_shape).astype(np.float32),
        **c.tensors,
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in named.items())
    return model


def run(model: onnx.ModelProto, batch: int = 2) -> np.ndarray:
    shape = [d.dim_value or batch for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return OrtRunner().build(model).run({"x": x})["out"]


def test_every_rule_is_covered() -> None:
    met = {node.op_type for c in CASES for node in graph(c).graph.node}
    met.add("SimplifiedLayerNormalization")  # an operator of ONNX Runtime's, under the name of ONNX
    assert not set(RULES) - met


@pytest.mark.parametrize("c", CASES, ids=[c.name for c in CASES])
def test_operator(c: Case) -> None:
    dense = graph(c)
    analysis = analyze_onnx(dense)
    if c.frozen:
        assert "first" not in [g.name for g in analysis.groups]
        assert c.frozen in analysis.frozen["first"]
        return
    assert analysis.groups[0].name == "first"
    changed = 0.0
    for first in (False, True):
        plan = make_plan(analysis, {g.name: list(range(g.size))[1 if first else -1 :] for g in analysis.groups})
        slim = rewrite_onnx(dense, plan)
        closed = onnx.ModelProto()
        closed.CopyFrom(dense)
        for axis_cut in plan.slices:  # what reads the first layer's channels sees zeros
            produced = (axis_cut.param, axis_cut.axis) == ("first", 1 if c.rows else 0)
            if produced or len(analysis.tensors[axis_cut.param]) == 1 or axis_cut.param in ("c", "d", "s"):
                continue
            if axis_cut.param == "w" and c.name.startswith("Conv depthwise"):
                continue
            tensor = next(i for i in closed.graph.initializer if i.name == axis_cut.param)
            values = numpy_helper.to_array(tensor).copy()
            gone = np.setdiff1d(np.arange(axis_cut.size), axis_cut.keep)
            values[(slice(None),) * axis_cut.axis + (gone,)] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, axis_cut.param))
        assert_close(run(slim), run(closed))
        changed = max(changed, relative_error(run(closed), run(dense)))
        sizes = {i.name: tuple(i.dims) for i in slim.graph.initializer}
        assert all(sizes[s.param][s.axis] == len(s.keep) for s in plan.slices if s.param in sizes)
        if c.name != "Resize by sizes":  # its sizes hold the batch
            assert run(slim, 3).shape[0] == 3
    assert changed > 1e-3


def test_layer_norm_over_the_channels() -> None:
    """Its statistics change when channels go, so only shapes and ties can be compared here."""
    dense = graph(case("layer norm", "z = LayerNormalization(y, s, b)", rows=True, s=weight(6), b=weight(6)))
    slim = rewrite_onnx(dense, make_plan(analyze_onnx(dense), {"first": [0, 2]}))
    assert np.isfinite(run(slim)).all()
    assert {i.name: i.dims[0] for i in slim.graph.initializer}["s"] == 2


def test_positions_of_samples_stay_whole() -> None:
    analysis = analyze_onnx(graph(next(c for c in CASES if c.name == "GridSample")))
    assert "reads it as positions" in analysis.frozen["w"]


def test_an_operator_of_another_domain_is_another_operator() -> None:
    dense = graph(case("relu", "z = Relu(y)"))
    dense.graph.node[1].domain = "elsewhere"
    dense.opset_import.add(domain="elsewhere", version=1)
    dense.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6, 4, 3]))
    assert "unknown operator elsewhere.Relu" in analyze_onnx(dense).frozen["first"]


def test_exclude() -> None:
    dense = graph(next(c for c in CASES if c.name == "Conv"))
    assert [g.name for g in analyze_onnx(dense).groups] == ["first", "w"]
    assert [g.name for g in analyze_onnx(dense, ["first"]).groups] == ["w"]
    with pytest.raises(SluiceError, match="'nothing' matches no layer"):
        analyze_onnx(dense, ["nothing"])


def test_graphs_that_are_not_well_typed() -> None:
    bad = graph(case("bad", "z = Relu(y)", columns=5, rows=True))
    with pytest.raises(SluiceError, match="the ONNX graph is not well typed"):
        with_batch(bad, 7)


def test_static_batch() -> None:
    dense = graph(next(c for c in CASES if c.name == "Flatten"))
    dense.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    dense.graph.output[0].CopyFrom(helper.make_tensor_value_info("out", TensorProto.FLOAT, None))
    analysis = analyze_onnx(dense)
    assert run(rewrite_onnx(dense, make_plan(analysis, {"first": [1, 4]}))).shape == (2, 3, 4, 3)


def test_a_weight_used_at_an_open_size_stays_whole() -> None:
    """The same weight where the sizes are known: the two uses must be cut alike, and one of them cannot be read."""
    nodes = "p = Conv(y, w)  z = Conv(p, v)  q = ReduceMax<keepdims=0>(x)  i = Cast<to=7>(q)  j = Unsqueeze(i, a)"
    tensors = {"w": weight(6, 6, 1, 1), "v": weight(6, 6, 1, 1), "a": ints(0), "t": ints(2)}
    dense = graph(case("twice", f"{nodes}  s = Slice(x, a, j, t)", **tensors))
    assert [g.name for g in analyze_onnx(dense).groups] == ["first", "w", "v"]
    dense.graph.node.insert(len(dense.graph.node) - 1, helper.make_node("Conv", ["s", "first"], ["open"], "again"))
    analysis = analyze_onnx(dense)
    assert [g.name for g in analysis.groups] == ["w", "v"]
    assert analysis.frozen["first"] == "again works on a size that is not known"


def test_the_batch_divides_no_size() -> None:
    dense = graph(next(c for c in CASES if c.name == "Expand"))
    assert stand_in_batch(dense) == 97
    dense.graph.initializer.append(numpy_helper.from_array(weight(2 * 97, 101), "large"))
    assert stand_in_batch(dense) == 103
    analysis = analyze_onnx(dense)
    assert analysis.batch == 103 and analysis.shapes["y"] == (103, 6, 4, 3)
    dense.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert stand_in_batch(dense) is None and analyze_onnx(dense).batch is None
