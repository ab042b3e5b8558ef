"""INT8: pairs where the runtimes compute in integers, right scales along the right axis, borders of parts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, parser

from sluice.core.errors import SluiceError
from sluice.passes.precision.fold import fold_batch_norms
from sluice.passes.precision.qdq_placement import Pairs, dialect_of
from sluice.passes.precision.quantize import REDUCED_STEPS, STEPS, quantize, tensors_to_calibrate
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.saturation import sums_saturate
from tests.exported import arrays, deployed, named, ops, optimised, random_feeds, run

Q, DQ = "QuantizeLinear", "DequantizeLinear"
TARGETS = ("ort-cpu", "tensorrt")
INTEGER = {"ort-cpu": TensorProto.UINT8, "tensorrt": TensorProto.INT8}


def parsed(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> test {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


def weight(*shape: int) -> np.ndarray:
    """Channels of very different sizes along every axis, so that scales along a wrong one show."""
    rng = np.random.default_rng(sum(shape))
    values = rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        values = values * np.exp(rng.uniform(-2, 2, size)).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return values.astype(np.float32)


def maxima(model: onnx.ModelProto, feeds: dict[str, np.ndarray], target: str) -> dict[str, float]:
    names = tensors_to_calibrate(model, target=target)
    shown = fold_batch_norms(model)
    there = {info.name for info in [*shown.graph.input, *shown.graph.output]}
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in there)
    values = {**feeds, **run(shown, feeds)}
    return {name: float(np.abs(values[name]).max()) for name in names}


@cache
def residual() -> bytes:
    """Two convolutions around a shortcut, pooling, a linear layer."""
    return parsed(
        """(float[N, 3, 9, 7] x) => (float[N, 5] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu(a)
          b = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)  c = Clip(b, zero, six)
          d = Conv <pads = [1, 1, 1, 1]> (c, w3, b1)  e = Add(d, r)  f = Relu(e)
          g = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f)
          h = Conv(g, w4)  i = GlobalAveragePool(h)  j = Flatten(i)  y = Gemm <transB = 1> (j, w5, b5) }""",
        w1=weight(8, 3, 3, 3), b1=weight(8), w2=weight(12, 8, 3, 3), b2=weight(12), w3=weight(8, 12, 3, 3),
        w4=weight(7, 8, 1, 1), w5=weight(5, 7), b5=weight(5), zero=np.float32(0), six=np.float32(6),
    ).SerializeToString()  # fmt: skip


def model() -> onnx.ModelProto:
    return onnx.load_model_from_string(residual())


def pairs(done: onnx.ModelProto) -> dict[str, list[str]]:
    """Tensors with a pair, as they were called before -> who made them and who reads them."""
    made = {name: node.op_type for node in done.graph.node for name in node.output}
    found = {}
    for node in done.graph.node:
        if node.op_type == Q:
            dequantised = [n.output[0] for n in done.graph.node if n.op_type == DQ and n.input[0] == node.output[0]]
            readers = [n.op_type for n in done.graph.node if set(dequantised) & set(n.input)]
            name = node.input[1].removesuffix(":scale")
            assert name not in found, "two pairs of one tensor"
            assert len(dequantised) == 1
            found[name] = [made.get(node.input[0], "input"), *readers]
    return found


def test_pairs_for_onnx_runtime() -> None:
    assert pairs(quantize(model())) == {
        "x": ["input", "Conv"],
        "r": ["Relu", "Conv", "Add"],
        "c": ["Clip", "Conv"],
        "d": ["Conv", "Add"],
        "f": ["Relu", "MaxPool"],
        "g": ["MaxPool", "Conv"],
        "h": ["Conv", "GlobalAveragePool"],
        "i": ["GlobalAveragePool", "Flatten"],
        "j": ["Flatten", "Gemm"],
    }


def test_pairs_for_tensorrt() -> None:
    """No pair between the convolution and the addition that it takes in; the shortcut has one."""
    assert pairs(quantize(model(), target="tensorrt")) == {
        "x": ["input", "Conv"],
        "r": ["Relu", "Conv", "Add"],
        "c": ["Clip", "Conv"],
        "f": ["Relu", "MaxPool"],
        "g": ["MaxPool", "Conv"],
        "h": ["Conv", "GlobalAveragePool"],
        "i": ["GlobalAveragePool", "Flatten"],
        "j": ["Flatten", "Gemm"],
    }


def test_a_projected_shortcut_has_the_pair_for_tensorrt() -> None:
    two = parsed(
        """(float[2, 3, 5, 7] x) => (float[2, 4, 5, 7] y)
        { s = Conv(x, w1)  m = Conv(x, w2)  y = Add(m, s) }""",
        w1=weight(4, 3, 1, 1),
        w2=weight(4, 3, 1, 1) + 1,
    )
    assert set(pairs(quantize(two, target="tensorrt"))) == {"x", "s"}
    assert set(pairs(quantize(two))) == {"x", "s", "m"}


def test_what_onnx_runtime_makes_of_it(tmp_path: Path) -> None:
    """Every layer an integer kernel, every activation gone."""
    found = optimised(quantize(model()), tmp_path)
    assert {kind: found[kind] for kind in ("QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm")} == {
        "QLinearConv": 4, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1,
    }  # fmt: skip
    assert not {"Conv", "FusedConv", "Relu", "Clip", "Gemm", "Add"} & {kind for kind in found if kind != "Add"}


@pytest.mark.parametrize(
    ("name", "integer", "floating"),
    [
        ("squeeze_excite", {"QLinearConv": 5, "QLinearMul": 1, "QLinearSigmoid": 1}, {"Conv"}),
        ("concat", {"QLinearConv": 3}, {"Conv", "FusedConv"}),
        ("tokens", {"MatMulIntegerToFloat": 5, "QGemm": 1}, {"Gemm"}),
        ("plain", {"QLinearConv": 2, "QGemm": 2}, {"Conv", "Gemm"}),
    ],
)
def test_networks_in_onnx_runtime(name: str, integer: dict[str, int], floating: set[str], tmp_path: Path) -> None:
    dense = deployed(name)
    found = optimised(quantize(dense), tmp_path)
    assert {kind: found[kind] for kind in integer} == integer
    assert not floating & set(found)


def test_the_border_between_static_and_integer(tmp_path: Path) -> None:
    """At a static size ONNX Runtime would join product and bias, and then compute in fp32."""
    linear = parsed(
        "(float[2, 5, 6] x) => (float[2, 5, 7] y) { a = MatMul(x, w)  b = Add(a, c)  y = Gelu(b) }",
        w=weight(6, 7),
        c=weight(7),
    )
    found = optimised(quantize(linear), tmp_path)
    assert found["MatMulIntegerToFloat"] == 1
    assert not found["Gemm"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["plain", "spatial", "tokens", "transposed", "grouped", "concat", "in_place", "tied"])
def test_numbers(name: str, target: str) -> None:
    dense = deployed(name)
    feeds = random_feeds(dense, 5)
    done = quantize(dense, ranges=maxima(dense, feeds, target), target=target)
    assert_close(run(done, feeds, as_written=True), run(dense, feeds), 0.06)
    assert ops(done)[Q]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("moved", "shape"),
    [
        ("Flatten(x)", (4, 45)),
        ("Transpose <perm = [0, 1, 3, 2]> (x)", (4, 3, 5, 3)),
        ("Slice(x, last, first, width, back)", (4, 3, 3, 5)),
        ("Reshape(x, rows)", (4, 45)),
    ],
)
def test_an_input_that_is_moved_before_its_layer(moved: str, shape: tuple[int, ...], target: str) -> None:
    """As multilayer perceptrons and sequence models do."""
    *rows, width = shape
    dense = parsed(
        f"(float[4, 3, 3, 5] x) => (float{[*rows, 7]} y) {{ a = {moved}  b = MatMul(a, w)  y = Relu(b) }}",
        w=weight(width, 7),
        rows=np.array([-1, 45]),
        last=np.array([-1]),
        first=np.array([-99]),
        width=np.array([3]),
        back=np.array([-1]),
    )
    feeds = random_feeds(dense)
    done = quantize(dense, ranges=maxima(dense, feeds, target), target=target)
    assert set(pairs(done)) == {"x", "a"}
    assert_close(run(done, feeds, as_written=True), run(dense, feeds), 0.03)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("low", "high", "largest"),
    [(-8, 1, 8), (-1, 8, 8), (-8, -0.5, 8), (None, 0, np.inf), (-8, None, np.inf), (None, 1, np.inf), (0, 6, 6)],
)
def test_scales_behind_a_clip(low: float | None, high: float | None, largest: float, target: str) -> None:
    """The bound that is larger in size; without one of the two, the range."""
    bounds = {name: np.float32(x) for name, x in (("low", low), ("high", high)) if x is not None}
    operands = ", ".join(name if name in bounds else "" for name in ("low", "high"))
    dense = parsed(
        f"(float[20, 9] x) => (float[20, 5] y) {{ c = Clip(x, {operands})  y = MatMul(c, w) }}",
        w=weight(9, 5),
        **bounds,
    )
    feeds = {"x": 6 * random_feeds(dense)["x"]}
    range_ = 1.5 * maxima(dense, feeds, target)["c"]
    done = quantize(dense, ranges={"c": range_}, target=target)
    steps = 255 if low == 0 and target == "ort-cpu" else 127
    assert float(arrays(done)["c:scale"]) == pytest.approx(min(range_, largest) / steps, rel=1e-6)
    assert_close(run(done, feeds, as_written=True), run(dense, feeds), 0.03)


def test_what_is_not_negative_has_no_lower_bound() -> None:
    capped = parsed(
        "(float[2, 4] x) => (float[2, 3] y) { r = Relu(x)  c = Clip(r, , six)  y = MatMul(c, w) }",
        six=np.float32(6),
        w=weight(4, 3),
    )
    values = arrays(quantize(capped, ranges={"c": 9.0}, target="tensorrt"))
    assert float(values["c:scale"]) == pytest.approx(6 / 127, rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_between_an_activation_and_a_layer(target: str) -> None:
    """The norm becomes a product and a sum, whose numbers lie beside the scale of their result."""
    model = parsed(
        """(float[N, 3, 9, 7] x) => (float[N, 5, 5, 3] y)
        { a = Conv(x, w1)  r = Relu(a)  n = BatchNormalization(r, s, b, m, v)  y = Conv(n, w2) }""",
        w1=weight(4, 3, 3, 3), w2=weight(5, 4, 3, 3), s=weight(4), b=weight(4), m=weight(4), v=np.abs(weight(4)) + 0.1,
    )  # fmt: skip
    feeds = random_feeds(model)
    done = quantize(model, ranges=maxima(model, feeds, target), target=target)
    onnx.checker.check_model(done, full_check=True)
    assert relative_error(run(done, feeds, as_written=True), run(model, feeds)) < 0.05


@pytest.mark.parametrize("target", TARGETS)
def test_scales_do_not_vanish(target: str) -> None:
    tiny = parsed("(float[2, 4] x) => (float[2, 3] y) { y = MatMul(x, w) }", w=np.full((4, 3), 1e-44, np.float32))
    done = quantize(tiny, ranges={"x": 1e-44}, target=target)
    scales = [value for name, value in arrays(done).items() if name.endswith(":scale")]
    assert len(scales) == 2
    assert all((value >= np.finfo(np.float32).tiny).all() for value in scales)
    assert run(done, {"x": np.ones((2, 4), np.float32)}, as_written=True)["y"].tolist() == [[0.0] * 3] * 2


def test_coarse_ranges_show() -> None:
    """The comparison above would see scales that are wrong."""
    dense = deployed("plain")
    feeds = random_feeds(dense, 5)
    ranges = maxima(dense, feeds, "ort-cpu")
    exact = run(dense, feeds)
    for factor in (0.2, 30.0):
        wrong = quantize(dense, ranges={name: factor * value for name, value in ranges.items()})
        assert relative_error(run(wrong, feeds, as_written=True), exact) > 0.06


LAYERS = {
    "Conv": ("(float[2, 4, 9, 7] x) => (float[N, C, H, W] y) { y = Conv(x, w) }", (5, 4, 3, 2), 0),
    "Conv, grouped": (
        "(float[2, 6, 9, 7] x) => (float[N, C, H, W] y) { y = Conv <group = 2> (x, w) }",
        (4, 3, 3, 2),
        0,
    ),
    "ConvTranspose": ("(float[2, 4, 9, 7] x) => (float[N, C, H, W] y) { y = ConvTranspose(x, w) }", (4, 5, 3, 2), 1),
    "Gemm": ("(float[2, 4] x) => (float[2, 7] y) { y = Gemm(x, w) }", (4, 7), 1),
    "Gemm, transposed": ("(float[2, 4] x) => (float[2, 7] y) { y = Gemm <transB = 1> (x, w) }", (7, 4), 0),
    "MatMul": ("(float[2, 3, 4] x) => (float[2, 3, 7] y) { y = MatMul(x, w) }", (4, 7), 1),
}


def dequantised_weight(done: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray, int]:
    """The weight as the layer reads it, its scales and their axis, taken from the graph alone."""
    values = arrays(done)
    (node,) = (n for n in done.graph.node if n.op_type == DQ and values.get(n.input[0], np.zeros(0)).ndim > 1)
    q, scale, zero = (values[name] for name in node.input)
    assert q.dtype == zero.dtype == np.int8
    assert not zero.any()
    axis = onnx.helper.get_node_attr_value(node, "axis")
    along = scale.reshape([-1 if d == axis else 1 for d in range(q.ndim)])
    return q * along, scale, axis


@pytest.mark.parametrize("name", LAYERS)
def test_scales_lie_along_the_output_channels(name: str) -> None:
    text, shape, axis = LAYERS[name]
    w = weight(*shape)
    done = quantize(parsed(text, w=w), target="tensorrt")
    found, scale, along = dequantised_weight(done)
    assert along == axis
    others = tuple(d for d in range(w.ndim) if d != axis)
    np.testing.assert_allclose(scale, np.abs(w).max(axis=others) / 127, rtol=1e-6)
    error = np.abs(found - w).max(axis=others)
    assert (error <= scale * 0.5001).all()
    assert w.dtype == arrays(parsed(text, w=w))["w"].dtype
    assert "w" not in arrays(done)


def test_a_wrong_axis_is_seen() -> None:
    """Scales along the input channels round small output channels to nothing."""
    w = weight(5, 5, 3, 2)
    done = quantize(parsed(LAYERS["Conv"][0].replace("4, 9", "5, 9"), w=w), target="tensorrt")
    node = next(n for n in done.graph.node if n.op_type == DQ and n.attribute)
    node.attribute[0].i = 1
    found, scale, _ = dequantised_weight(done)
    assert (np.abs(found - w).max(axis=(1, 2, 3)) > scale * 0.5001).any()


@given(st.integers(0, 2**20), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_weights_of_any_size(seed: int, magnitude: float) -> None:
    w = (np.random.default_rng(seed).standard_normal((5, 3)) * 10**magnitude).astype(np.float32)
    w[seed % 5] = 0  # a closed channel
    text = "(float[2, 3] x) => (float[2, 5] y) { y = Gemm <transB = 1> (x, w) }"
    found, scale, _ = dequantised_weight(quantize(parsed(text, w=w)))
    assert (scale > 0).all()
    assert (np.abs(found - w) <= scale[:, None] * 0.5001).all()
    assert not found[seed % 5].any()


@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_activations(target: str) -> None:
    ranges = {"x": 3.0, "r": 5.0, "c": 9.0, "d": 7.0, "f": 11.0, "h": 2.0, "i": 0.0}
    assert set(tensors_to_calibrate(model(), target=target)) == set(ranges) - ({"d"} if target == "tensorrt" else set())
    values = arrays(quantize(model(), ranges=ranges, target=target))
    scales = {name: float(values[f"{name}:scale"]) for name in "xrcfghij"}
    zeros = {name: int(values[f"{name}:zero"]) for name in "xrcfghij"}
    assert {values[f"{name}:zero"].dtype for name in "xr"} == {np.dtype(np.int8 if target == "tensorrt" else np.uint8)}
    steps = 127 if target == "tensorrt" else 255
    # ``c`` is clipped at 6, ``g`` has the numbers of ``f``, ``i`` was all zeros.
    wanted = {"x": 3 / 127, "r": 5 / steps, "c": 6 / steps, "f": 11 / steps, "g": 11 / steps,
              "h": 2 / 127, "i": 1 / 127, "j": 1 / 127}  # fmt: skip
    assert scales == pytest.approx(wanted, rel=1e-6)
    signed = 0 if target == "tensorrt" else 128
    assert zeros == {name: signed if name in "xhij" else 0 for name in "xrcfghij"}


def test_ranges_must_be_whole() -> None:
    with pytest.raises(SluiceError, match=r"ranges lack tensor '.'; take them from calibration batches"):
        quantize(model(), ranges={"x": 1.0})


def test_excluded_layers_stay_float(tmp_path: Path) -> None:
    done = quantize(model(), exclude=("w1", "w5"))
    assert {"w1", "w5"} <= set(arrays(done))
    assert not {"w2", "w3", "w4"} & set(arrays(done))
    assert "x" not in pairs(done)
    assert optimised(done, tmp_path)["QLinearConv"] == 3
    assert {"w2", "w5"} <= set(arrays(quantize(model(), exclude=("w[25]",))))
    with pytest.raises(
        SluiceError, match="exclude names 'w9', which is no layer of the network; its weights are w1, w2"
    ):
        quantize(model(), exclude=("w9",))


@pytest.mark.parametrize("reduced", [False, True])
def test_weights_of_a_reduced_range(reduced: bool) -> None:
    """Seven bits: half as fine, and no sum of two products with uint8 leaves 16 bits."""
    dense = deployed("plain")
    feeds = random_feeds(dense, 5)
    done = quantize(dense, ranges=maxima(dense, feeds, "ort-cpu"), reduce_range=reduced)
    weights = [x.astype(int) for name, x in arrays(done).items() if x.dtype == np.int8 and x.ndim > 1]
    largest = max(int(np.abs(x).max()) for x in weights)
    assert largest == (REDUCED_STEPS if reduced else STEPS)
    assert (2 * 255 * largest <= np.iinfo(np.int16).max) == reduced
    as_written = run(done, feeds, as_written=True)
    assert_close(as_written, run(dense, feeds), 0.06)
    if reduced or not sums_saturate():
        assert_close(run(done, feeds), as_written, 0.06)
    else:
        assert relative_error(run(done, feeds), as_written) > 0.06


@pytest.mark.parametrize("target", TARGETS)
def test_borders_of_parts(target: str) -> None:
    """The second convolution with its addition, as it lies in the network: int8 in, int8 out."""
    part = parsed(
        """(float[2, 4, 5, 7] x, float[2, 6, 5, 7] shortcut) => (float[2, 6, 5, 7] y, float[2, 6, 5, 7] z)
        { a = Conv(x, w)  b = Add(a, shortcut)  y = Relu(b)  z = Gelu(y) }""",
        w=weight(6, 4, 1, 1),
    )
    done = quantize(part, part=True, target=target)
    kinds = {i.name: i.type.tensor_type.elem_type for i in [*done.graph.input, *done.graph.output]}
    assert kinds == dict.fromkeys(("x", "shortcut", "y", "z"), INTEGER[target])
    first = {name: next(n.op_type for n in done.graph.node if name in n.input) for name in ("x", "shortcut")}
    assert first == {"x": DQ, "shortcut": DQ}
    whole = quantize(part, target=target)
    assert {i.type.tensor_type.elem_type for i in [*whole.graph.input, *whole.graph.output]} == {TensorProto.FLOAT}
    # The integers at the borders are those that the network has inside.
    feeds = random_feeds(part)
    shown = onnx.ModelProto()
    shown.CopyFrom(part)
    shown.graph.output.append(onnx.helper.make_empty_tensor_value_info("a"))
    values = {**feeds, **run(shown, feeds)}
    done = quantize(part, part=True, target=target, ranges={n: float(np.abs(v).max()) for n, v in values.items()})
    table = arrays(done)
    scale, zero = ({n: table[f"{n}:{kind}"] for n in kinds} for kind in ("scale", "zero"))
    ints = {
        n: np.clip(np.rint(x / scale[n]) + zero[n], *_limits(zero[n])).astype(zero[n].dtype) for n, x in feeds.items()
    }
    out = {n: scale[n] * (q.astype(np.float32) - zero[n]) for n, q in run(done, ints, as_written=True).items()}
    assert_close(out, {n: values[n] for n in out}, 0.03)


def _limits(zero: np.ndarray) -> tuple[int, int]:
    info = np.iinfo(zero.dtype)
    return info.min, info.max


def test_borders_in_a_transformer() -> None:
    """The residual stream and what goes into attention are not int8, hidden units and normalised tokens are."""
    shapes = "float[2, 3, 4] x, float[2, 3, 6] skip"
    part = parsed(
        f"""({shapes}) => (float[2, 3, 6] sum, float[2, 3, 6] normed, float[2, 6, 3] moved, float[2, 3, 6] hidden)
        {{ a = MatMul(x, w)  b = Add(a, c)  sum = Add(b, skip)  normed = LayerNormalization(sum, c, c)
           moved = Transpose <perm = [0, 2, 1]> (b)  hidden = Gelu(b) }}""",
        w=weight(4, 6),
        c=weight(6),
    )
    done = quantize(part, part=True)
    kinds = {i.name: i.type.tensor_type.elem_type for i in [*done.graph.input, *done.graph.output]}
    integer = {name for name, kind in kinds.items() if kind == TensorProto.UINT8}
    assert integer == {"x", "normed", "hidden"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["plain", "tokens"])
def test_graphs_with_names(name: str, target: str) -> None:
    """Unfolded, as pieces and engines are made of: norms go, transposed weights are quantised the way they are read."""
    dense = named(name)
    done = quantize(dense, target=target)
    assert not ops(done)["BatchNormalization"]
    kept = {n for n, value in arrays(done).items() if value.ndim > 1 and value.dtype == np.float32}
    assert {n for n in kept if n.endswith("weight")} == set()
    folded = fold_batch_norms(dense)
    layers = sum(map(Pairs(folded, dialect_of(target)).is_quantised, folded.graph.node))
    assert layers == sum(v.dtype == np.int8 and v.ndim > 1 for v in arrays(done).values())


def test_one_weight_read_along_two_axes() -> None:
    tied = parsed(
        """(float[2, 3] x) => (float[2, 3] y) { a = MatMul(x, w)  b = Relu(a)  y = Gemm <transB = 1> (b, w)  }""",
        w=weight(3, 5),
    )
    feeds = random_feeds(tied)
    done = quantize(tied, ranges=maxima(tied, feeds, "ort-cpu"))
    assert sum(v.dtype == np.int8 and v.ndim > 1 for v in arrays(done).values()) == 2
    assert_close(run(done, feeds, as_written=True), run(tied, feeds), 0.05)
