"""Sixteen bits: every value has the type it should have, the checker agrees, and the numbers are those of rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from sluice.artifacts.deploy import as_module
from sluice.core.deployment import PRECISIONS, check_precision
from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base.compare import assert_close
from tests.exported import arrays, deployed, named, ops, random_feeds, run

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
CODES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Spacing of numbers above 1, times the depth over which roundings add up.
TOLERANCE = {"fp16": 10 * 2.0**-10, "bf16": 10 * 2.0**-7}


def types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    infos = [*graph.input, *graph.value_info, *graph.output]
    return {i.name: i.type.tensor_type.elem_type for i in infos} | {i.name: i.data_type for i in graph.initializer}


def emulated(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import torch

    found = as_module(model)(*(torch.from_numpy(np.asarray(x)) for x in feeds.values()))
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


def parsed(text: str, opset: int = 20, **constants: np.ndarray) -> onnx.ModelProto:
    """``text``: inputs, outputs and nodes in ONNX's own notation."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> test {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["plain", "norms", "spatial", "tokens", "parameters", "transposed", "tied"])
def test_networks(name: str, precision: str) -> None:
    dense = deployed(name)
    done = to_precision(dense, precision)
    borders = {info.name for info in [*done.graph.input, *done.graph.output]}
    kinds = {n: kind for n, kind in types(done).items() if kind in FLOATS and n not in borders}
    wide = {n for n, kind in kinds.items() if kind == TensorProto.FLOAT}
    # What the schemas ask for (Resize), and what bfloat16 has no kernel for.
    excused = {n for node in done.graph.node if node.op_type == "Resize" for n in node.input[1:]}
    if precision == "bf16":
        excused |= {n for x in done.graph.node if x.op_type == "ConvTranspose" for n in (*x.input, *x.output)}
    assert wide <= excused
    assert set(kinds.values()) - {TensorProto.FLOAT} == {CODES[precision]}
    assert {types(done)[name] for name in borders} == {TensorProto.FLOAT}
    feeds = random_feeds(dense)
    assert_close(emulated(done, feeds), list(run(dense, feeds).values()), TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_parts_have_narrow_borders(precision: str) -> None:
    dense = named("plain")
    done = to_precision(dense, precision, part=True)
    assert [i.type.tensor_type.elem_type for i in [*done.graph.input, *done.graph.output]] == [CODES[precision]] * 2
    assert [i.name for i in done.graph.input] == [i.name for i in dense.graph.input]
    assert not ops(done)["Cast"]
    assert not ops(done)["BatchNormalization"]


def test_rounding_shows() -> None:
    """The comparison above is not of two networks in fp32."""
    dense = deployed("plain")
    feeds = random_feeds(dense)
    exact = list(run(dense, feeds).values())
    for precision, coarse in (("fp16", 2e-5), ("bf16", 2e-4)):
        with pytest.raises(AssertionError):
            assert_close(emulated(to_precision(dense, precision), feeds), exact, coarse)


def test_weights_are_rounded_to_the_nearest() -> None:
    dense = deployed("plain")
    for precision, dtype in DTYPES.items():
        done = arrays(to_precision(dense, precision))
        for name, value in arrays(dense).items():
            if value.dtype == np.float32:
                np.testing.assert_array_equal(done[name].astype(np.float32), value.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_stale_type_is_refused(precision: str) -> None:
    """One initialiser left as it was: this is what the checker behind every rewrite is there for."""
    done = to_precision(deployed("plain"), precision)
    stale = next(init for init in done.graph.initializer if init.name == "conv2.weight")
    stale.CopyFrom(next(i for i in deployed("plain").graph.initializer if i.name == "conv2.weight"))
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(done, full_check=True)


def test_bfloat16_needs_opset_22() -> None:
    dense = deployed("plain")
    dense.metadata_props.add(key="who", value="test")
    before = {init.name for init in dense.graph.initializer}
    for precision, opset in (("fp16", 20), ("bf16", 22)):
        done = to_precision(dense, precision)
        assert done.opset_import[0].version == opset
        assert [(p.key, p.value) for p in done.metadata_props] == [("who", "test")]
        assert {init.name for init in done.graph.initializer} == before


def test_operands_that_stay_float32() -> None:
    model = parsed(
        """(float[2, 3, 5, 7] x, float limit) => (float[2, 3, 10, 14] y, float[N] z, float[N] count)
        { y = Resize <mode = "nearest"> (x, none, scales)
          count = Range(zero, limit, one)  z = Mul(count, one) }""",
        scales=np.array([1, 1, 2, 2], np.float32),
        zero=np.float32(0),
        one=np.float32(1),
        none=np.zeros(0, np.float32),
    )
    for precision, code in CODES.items():
        done = to_precision(model, precision)
        kinds = types(done)
        node = {n.op_type: n for n in done.graph.node}
        assert kinds[node["Resize"].input[2]] == TensorProto.FLOAT
        assert node["Resize"].input[2] in arrays(done), "TensorRT needs a constant there"
        assert kinds[node["Resize"].input[0]] == code
        assert {kinds[name] for name in [*node["Range"].input, *node["Range"].output]} == {TensorProto.FLOAT}
        assert {kinds[name] for name in [*node["Mul"].input, *node["Mul"].output]} == {code}
        feeds = {"x": np.ones((2, 3, 5, 7), np.float32), "limit": np.float32(5)}
        assert_close(emulated(done, feeds)[1], np.arange(5.0))


def test_constants_and_casts() -> None:
    model = parsed(
        """(int8[3] i) => (float[3] y)
        { a = Cast <to = 1> (i)  b = Constant <value_floats = [0.5, 1.5, 2.5]> ()  n = Shape(i)
          c = ConstantOfShape <value = float[1] {3}> (n)  d = Add(a, b)  y = Mul(d, c) }"""
    )
    for precision, code in CODES.items():
        done = to_precision(model, precision)
        kinds = types(done)
        assert {kinds[name] for name in ("a", "b", "c", "d")} == {code}
        feeds = {"i": np.array([1, 2, 3], np.int8)}
        assert_close(emulated(done, feeds)[0], np.array([4.5, 10.5, 16.5]))


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64])
def test_arithmetic_on_integers_is_exact(precision: str, kind: type[np.signedinteger]) -> None:
    """What leads back to an integer, and what leaves the network."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    model = parsed(
        f"""({helper.tensor_dtype_to_string(code).removeprefix("TensorProto.").lower()}[4] i, float[4] x)
        => (int64[4] j, bool[4] odd, float[4] f, float[4] y)
        {{ c = Cast <to = 1> (i)  d = Div(c, two)  e = Floor(d)  j = Cast <to = 7> (e)
          odd = Less(e, d)  f = Mul(c, two)  s = Mul(d, tiny)  y = Add(x, s) }}""",
        two=np.float32(2),
        tiny=np.float32(2.0**-15),
    )
    i = np.array([3, 2049, 32767, 30001 if kind == np.int16 else 2**24 - 1], kind)
    done = to_precision(model, precision)
    kinds = types(done)
    j, odd, f, y = emulated(done, {"i": i, "x": np.ones(4, np.float32)})
    assert j.tolist() == (i // 2).tolist()
    assert odd.tolist() == [True] * 4
    assert f.tolist() == (2.0 * i).tolist()
    assert kinds["f"] == TensorProto.FLOAT
    assert_close(y, 1 + i * 2.0**-16, TOLERANCE[precision])
    (add,) = (node for node in done.graph.node if node.op_type == "Add")
    assert {kinds[name] for name in [*add.input, *add.output]} == {CODES[precision]}, "the rest is in 16 bits"


@pytest.mark.parametrize("precision", CODES)
def test_large_integers_saturate(precision: str) -> None:
    model = parsed(
        "(int64[3] i, float[3] x) => (float[3] y, float[3] m) "
        "{ c = Cast <to = 1> (i)  y = Min(c, x)  d = Sub(one, c)  e = Mul(d, least)  m = Add(x, e) }",
        one=np.float32(1),
        least=np.finfo(np.float32).min,
    )
    largest = float(ml_dtypes.finfo(DTYPES[precision]).max)
    x = np.array([largest, largest, 0], np.float32)
    y, m = emulated(to_precision(model, precision), {"i": np.array([1, 100_000, 0]), "x": x})
    assert_close(y, np.array([1, min(100_000, largest), 0]), TOLERANCE[precision])
    assert m[2] == -largest, "a mask made of integers stays finite"


@pytest.mark.parametrize("precision", CODES)
def test_integers_end_at_a_layer(precision: str) -> None:
    """A network on integers is in 16 bits all the same, and has no float32 copy of a weight."""
    model = parsed(
        "(int32[2, 3] i) => (float[2, 4] y) { c = Cast <to = 1> (i)  a = Mul(c, scale)  y = MatMul(a, w) }",
        scale=np.float32(1 / 1000),
        w=np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32),
    )
    done = to_precision(model, precision)
    assert {name: value.dtype for name, value in arrays(done).items() if name.startswith("w")} == {
        "w": DTYPES[precision]
    }
    (product,) = (node for node in done.graph.node if node.op_type == "MatMul")
    assert {types(done)[name] for name in [*product.input, *product.output]} == {CODES[precision]}
    i = np.array([[3000, -1001, 17], [2049, 0, -2]], np.int32)
    want = (i / 1000) @ arrays(model)["w"]
    assert_close(emulated(done, {"i": i})[0], want, TOLERANCE[precision])
    part = to_precision(model, precision, part=True)
    assert part.graph.output[0].type.tensor_type.elem_type == CODES[precision]


@pytest.mark.parametrize("precision", CODES)
def test_a_part_that_ends_in_integer_arithmetic(precision: str) -> None:
    model = parsed("(int64[3] i) => (float[3] y) { c = Cast <to = 1> (i)  y = Sqrt(c) }")
    done = to_precision(model, precision, part=True)
    assert types(done)["y"] == CODES[precision]
    assert_close(emulated(done, {"i": np.array([4, 9, 90_000])})[0], np.array([2, 3, 300]), TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_constants_that_are_outputs(precision: str) -> None:
    """Float32 as they were; what reads them has a copy in 16 bits."""
    model = parsed(
        """(float[2, 3] x) => (float[2, 3] y, float[3] anchor, float[2] made, float[3] unread)
        { made = Constant <value_floats = [0.1, 0.7]> ()  a = Mul(x, anchor)  y = Add(a, shift) }""",
        anchor=np.array([0.1, 0.2, 1 / 3], np.float32),
        unread=np.array([0.3, 70_000, 1.1], np.float32),
        shift=np.float32(0.25),
    )
    done = to_precision(model, precision)
    x = np.random.default_rng(1).standard_normal((2, 3), dtype=np.float32)
    y, anchor, made, unread = emulated(done, {"x": x})
    assert_close(y, x * arrays(model)["anchor"] + 0.25, TOLERANCE.get(precision, 0.05))
    assert anchor.tolist() == arrays(model)["anchor"].tolist()
    assert made.tolist() == np.array([0.1, 0.7], np.float32).tolist()
    assert unread.tolist() == arrays(model)["unread"].tolist()
    if precision in CODES:
        (product,) = (node for node in done.graph.node if node.op_type == "Mul")
        assert [types(done)[name] for name in product.input] == [CODES[precision]] * 2
        assert not [name for name in arrays(done) if name.startswith("unread:")], "nothing reads one"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_errors_of_onnx_are_said_in_a_sentence(precision: str) -> None:
    stale = deployed("plain")
    stale.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    unsorted = deployed("plain")
    unsorted.graph.node.insert(0, unsorted.graph.node.pop())
    for broken in (stale, unsorted):
        with pytest.raises(
            SluiceError, match=rf"^the network cannot be written in {precision}: .+; check the fp32 file"
        ):
            to_precision(broken, precision)


def test_an_opset_that_cannot_be_converted() -> None:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Scatter", ["x"], ["y"])], "test", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    for precision in ("fp16", "bf16", "int8"):
        with pytest.raises(
            SluiceError, match=rf"^the network cannot be written in {precision}: .*Scatter.*; check the"
        ):
            to_precision(model, precision)


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_masks_stay_finite(value: float) -> None:
    """A row that is masked as a whole must not become NaN."""
    mask = np.where(np.arange(12).reshape(3, 4) < 6, value, 0).astype(np.float32)
    model = parsed("(float[3, 4] x) => (float[3, 4] y) { a = Add(x, mask)  y = Softmax(a) }", mask=mask)
    for precision, dtype in DTYPES.items():
        done = to_precision(model, precision)
        stored = arrays(done)["mask"].astype(np.float32)
        assert np.isfinite(stored).all()
        assert stored.min() <= 0.99 * max(value, float(ml_dtypes.finfo(dtype).min))
        y = emulated(done, {"x": np.zeros((3, 4), np.float32)})[0]
        assert_close(y[1:], np.array([[0, 0, 0.5, 0.5], [0.25] * 4]), 1e-6)
        assert np.isfinite(y).all()


def test_an_epsilon_does_not_vanish() -> None:
    model = parsed("(float[3] x) => (float[3] y) { a = Add(x, eps)  y = Div(x, a) }", eps=np.float32(-1e-12))
    stored = arrays(to_precision(model, "fp16"))["eps"]
    assert stored < 0
    assert arrays(to_precision(model, "bf16"))["eps"].astype(np.float32) == pytest.approx(-1e-12, rel=0.01)


SCALED = {
    "a large divisor": "{ a = Div(x, large)  b = Mul(a, some)  y = Tanh(b) }",
    "a large factor": "{ a = Mul(x, large)  b = Div(a, large)  y = Tanh(b) }",
    "a small factor": "{ a = Mul(small, x)  b = Mul(a, large)  c = Mul(b, some)  y = Tanh(c) }",
    "a factor with few digits": "{ a = Mul(x, few)  b = Mul(a, some)  c = Mul(b, some)  y = Tanh(c) }",
    "a filled tensor": "{ n = Shape(x)  f = ConstantOfShape <value = float[1] {1000000}> (n)  a = Div(x, f)  "
    "b = Mul(a, some)  y = Tanh(b) }",
    "an expanded tensor": "{ n = Shape(x)  f = Expand(large, n)  a = Div(x, f)  b = Mul(a, some)  y = Tanh(b) }",
}


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("name", SCALED)
def test_factors_that_do_not_fit(name: str, precision: str) -> None:
    """Clipped, they would give other numbers without a word."""
    model = parsed(
        f"(float[3, 5] x) => (float[3, 5] y) {SCALED[name]}",
        large=np.full(5, 1e6, np.float32),
        some=np.float32(3e4),
        small=np.float32(1e-9),
        few=np.float32(3e-7),
    )
    feeds = random_feeds(model)
    feeds["x"] *= 0.02 if "some" in SCALED[name] else 2
    done = to_precision(model, precision)
    assert_close(emulated(done, feeds), list(run(model, feeds).values()), TOLERANCE[precision])
    last = next(node for node in done.graph.node if node.op_type == "Tanh")
    assert types(done)[last.input[0]] == CODES[precision], "the rest is in 16 bits"


@pytest.mark.parametrize("precision", CODES)
def test_masks_that_are_made_by_a_product(precision: str) -> None:
    model = parsed(
        """(float[3, 4] x, float[3, 4] keep) => (float[3, 4] y)
        { a = Sub(one, keep)  b = Mul(a, least)  c = Add(x, b)  y = Softmax(c) }""",
        one=np.float32(1),
        least=np.finfo(np.float32).min,
    )
    keep = np.array([[0] * 4, [1, 1, 0, 0], [1] * 4], np.float32)
    (y,) = emulated(to_precision(model, precision), {"x": np.zeros((3, 4), np.float32), "keep": keep})
    assert_close(y, np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [0.25] * 4]), TOLERANCE[precision])


NORMS = {
    "Pow": "{ a = Pow(x, two)  b = ReduceMean(a, last)  c = Add(b, eps)  d = Sqrt(c)  e = Reciprocal(d)  "
    "y = Mul(x, e) }",
    "Mul": "{ a = Mul(x, x)  b = ReduceSum(a, last)  c = Add(b, eps)  d = Sqrt(c)  y = Div(x, d) }",
    "ReduceSumSquare": "{ b = ReduceSumSquare(x, last)  c = Add(b, eps)  d = Sqrt(c)  y = Div(x, d) }",
    "ReduceL2": "{ b = ReduceL2(x, last)  c = Max(b, eps)  y = Div(x, c) }",
}


@pytest.mark.parametrize("name", NORMS)
def test_sums_of_squares(name: str) -> None:
    """Those of activations of some hundreds are beyond fp16."""
    model = parsed(
        f"(float[3, 32] x) => (float[3, 32] y) {NORMS[name]}",
        two=np.float32(2),
        last=np.array([-1]),
        eps=np.float32(1e-6),
    )
    feeds = {key: 400 * value for key, value in random_feeds(model).items()}
    for precision, code in CODES.items():
        done = to_precision(model, precision)
        assert_close(emulated(done, feeds), list(run(model, feeds).values()), TOLERANCE[precision])
        kinds = types(done)
        wide = {node.op_type for node in done.graph.node if kinds[node.output[0]] == TensorProto.FLOAT} - {"Cast"}
        assert (name in wide) == (precision == "fp16")
        last = next(node for node in done.graph.node if "y" in node.output[0] and node.op_type in ("Div", "Mul"))
        expected = TensorProto.FLOAT if last.op_type == "Div" and precision == "fp16" else code
        assert {kinds[value] for value in [*last.input, *last.output]} == {expected}


@pytest.mark.parametrize("guard", ["Clip (norm, least)", "Max (norm, least)", "Add (norm, least)"])
def test_a_row_of_zeros_is_divided_by_its_guarded_norm(guard: str) -> None:
    """The guard is less than 16 bits hold, and 0 / 0 is no number."""
    model = parsed(
        f"(float[3, 32] x) => (float[3, 32] y) {{ norm = ReduceL2 (x, last)  safe = {guard}  y = Div (x, safe) }}",
        last=np.array([-1]),
        least=np.float32(1e-12),
    )
    feeds = {key: value * np.array([[400], [0], [1]], np.float32) for key, value in random_feeds(model).items()}
    for precision in CODES:
        found = emulated(to_precision(model, precision), feeds)
        assert_close(found, list(run(model, feeds).values()), TOLERANCE[precision])


def test_a_weight_that_does_not_fit() -> None:
    model = parsed("(float[2, 3] x) => (float[2, 1] y) { y = MatMul(x, w) }", w=np.array([[1], [7e4], [2]], np.float32))
    with pytest.raises(SluiceError, match=r"weight 'w' holds values of up to 7e\+04, more than fp16 can; choose bf16"):
        to_precision(model, "fp16")
    assert to_precision(model, "bf16")


def test_what_cannot_be_written() -> None:
    model = parsed(
        """(float[2] x, bool c) => (float[2] y)
        { y = If (c) <then_branch = g () => (float[2] a) { a = Abs(x) },
                      else_branch = h () => (float[2] b) { b = Neg(x) }> }"""
    )
    with pytest.raises(SluiceError, match=r"If \(y\) holds a graph of its own"):
        to_precision(model, "fp16")
    node = helper.make_node("Strange", ["x"], ["y"], domain="com.example")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "test", infos[:1], infos[1:]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)],
    )
    with pytest.raises(SluiceError, match=r"types of operator com\.example\.Strange \(y\) are not known"):
        to_precision(model, "fp16")


def test_names_of_precisions() -> None:
    model = deployed("plain")
    assert to_precision(model, "fp32") is model
    assert [check_precision(name) for name in PRECISIONS] == ["fp32", "fp16", "bf16", "int8"]
    with pytest.raises(SluiceError, match="there is no precision 'fp8'; choose one of fp32, fp16, bf16, int8"):
        to_precision(model, "fp8")
