"""The torch program of an ONNX graph against ONNX Runtime on the CPU; no GPU is needed to know its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from examples.crepe.model import Crepe
from sluice import models
from sluice.core.errors import SluiceError
from sluice.models import enliven
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.partition import partition_graph
from sluice.profiler.pieces.sources import add_sources, source_model
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.base.inputs import static_shapes
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.torch_cuda import ops as torch_ops
from sluice.runtime.torch_cuda.ops import OPS, Op
from sluice.runtime.torch_cuda.program import TorchProgram, build_program, laid_out, to_numpy, to_tensor
from tests.exported import named
from tests.networks import NETWORKS

CPU = torch.device("cpu")
Arrays = dict[str, np.ndarray]


def program_of(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> TorchProgram:
    return build_program(model, {name: laid_out(to_tensor(value)) for name, value in feeds.items()}, CPU)


def computed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Arrays:
    program = program_of(model, feeds)
    with torch.no_grad():
        outputs = program([laid_out(to_tensor(feeds[name])) for name in program.inputs])
    return dict(zip(program.outputs, map(to_numpy, outputs), strict=True))


def random_feeds(model: onnx.ModelProto, batch: int = 3, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = static_shapes(model, batch, {}).inputs
    return {
        name: rng.standard_normal([int(n or 0) for n in shape]).astype(np.float32) for name, shape in shapes.items()
    }


def slim_of(dense: onnx.ModelProto, batch: int = 3, seed: int = 0) -> onnx.ModelProto:
    """The graph at one batch with a random width in every group."""
    rng, cut = np.random.default_rng(seed), partition_graph(dense, batch)
    widths = {group: int(rng.integers(1, size + 1)) for group, size in cut.dense.items()}
    return cut_graph(cut.model, cut.analysis, cut.masks(widths))


def check(dense: onnx.ModelProto, tol: float = 1e-5) -> None:
    for model in (dense, finalize(dense), slim_of(dense)):
        feeds = random_feeds(model)
        assert_close(computed(model, feeds), OrtRunner().build(model).run(feeds), tol)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_onnx_runtime_computes(name: str) -> None:
    check(named(name))


REFERENCE: dict[str, dict[str, Any]] = {
    "densenet": {"growth": 5},
    "mobilenet_v2": {"width": 0.25},
    "resnet1d": {},
    "resnet20": {"widths": (5, 7, 11)},
    "resnet56": {"widths": (3, 5, 7)},
    "se_resnet": {"widths": (5, 7, 11)},
    "vgg16_bn": {"widths": (5, 7, 9, 11, 13), "hidden": 17},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_network_computes_what_onnx_runtime_computes(name: str) -> None:
    inputs = models.example_inputs(name)
    check(to_onnx(enliven(getattr(models, name)(**REFERENCE[name]), 0, inputs), inputs))


@pytest.mark.slow
def test_crepe_computes_what_onnx_runtime_computes() -> None:
    inputs = (torch.randn(2, 256, generator=torch.Generator().manual_seed(0)),)
    check(to_onnx(enliven(Crepe((7, 5), frame=256, bins=9, momentum=0.1), 0, inputs), inputs))


@pytest.mark.parametrize("name", ["in_place", "sequence1d", "splits", "tokens", "squeeze_excite"])
def test_pieces_of_a_network_run_as_they_are_timed(name: str) -> None:
    for piece in partition_graph(named(name), 3).pieces:
        model, _ = add_sources(piece.model, piece.bare)
        feeds = random_feeds(model)
        assert_close(computed(model, feeds), OrtRunner().build(model).run(feeds), 1e-5)
        narrow = to_precision(model, "bf16", part=True)
        there = {key: to_tensor(value).to("meta", torch.bfloat16) for key, value in feeds.items()}
        assert build_program(narrow, there, torch.device("meta")).steps


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["squeeze_excite", "tokens", "norms"])
def test_sixteen_bits(name: str, precision: str) -> None:
    dense = named(name)
    narrow = to_precision(dense, precision)
    feeds = random_feeds(dense)
    program = program_of(narrow, feeds)
    want = torch.float16 if precision == "fp16" else torch.bfloat16
    weights = [v for step in program.steps for v in step.bound.values() if v is not None and v.dim() > 1]
    assert weights and all(weight.dtype == want for weight in weights)
    error = relative_error(computed(narrow, feeds), OrtRunner().build(dense).run(feeds))
    assert 1e-6 < error < (5e-3 if precision == "fp16" else 4e-2)  # the narrow type was used, and used rightly


def node_model(
    kind: str, inputs: Arrays, constants: Mapping[str, np.ndarray] | None = None, outputs: int = 1, opset: int = 20,
    order: tuple[str, ...] | None = None, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    constants = constants or {}
    names = order or (*inputs, *constants)
    node = helper.make_node(kind, list(names), [f"y{k}" for k in range(outputs)], **attributes)
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in inputs.items()
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return model


def normal(*shape: int, seed: int = 0, positive: bool = False) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.abs(found) + 0.1 if positive else found


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def recurrent(kind: str, gates: int, way: str, order: tuple[str, ...], **attributes: Any) -> onnx.ModelProto:
    """A layer from 3 features to 2 over 5 steps."""
    sides, outputs = 2 if way == "bidirectional" else 1, 3 if kind == "LSTM" else 2
    shapes = {"w": (gates * 2, 3), "r": (gates * 2, 2), "b": (gates * 4,), "h": (4, 2), "c": (4, 2)}
    held = {n: normal(sides, *shape, seed=k) for k, (n, shape) in enumerate(shapes.items()) if n in order}
    inputs = {"x": normal(5, 4, 3)}
    return node_model(kind, inputs, held, outputs, order=order, direction=way, hidden_size=2, **attributes)


X, IMAGE = {"x": normal(3, 5)}, {"x": normal(2, 3, 7, 5)}
WEIGHT = {"w": normal(4, 3, 3, 2, seed=1), "b": normal(4, seed=2)}
# Operators, or attributes of theirs, that no network above has.
NODES: dict[str, onnx.ModelProto] = {
    "uneven padding": node_model("Conv", IMAGE, WEIGHT, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]),
    "same upper": node_model("Conv", IMAGE, WEIGHT, auto_pad="SAME_UPPER", strides=[2, 3]),
    "same lower": node_model("Conv", IMAGE, WEIGHT, auto_pad="SAME_LOWER"),
    "valid": node_model("Conv", IMAGE, WEIGHT, auto_pad="VALID"),
    "transposed, uneven": node_model(
        "ConvTranspose", IMAGE, {"w": normal(3, 4, 3, 2)}, pads=[1, 0, 2, 1], strides=[2, 3]
    ),
    "transposed, longer": node_model(
        "ConvTranspose", IMAGE, {"w": normal(3, 4, 3, 2)}, strides=[2, 3], output_padding=[1, 2]
    ),
    "gemm, plain": node_model("Gemm", X, {"w": normal(5, 4)}),
    "gemm, scaled": node_model("Gemm", {"x": normal(5, 3)}, {"w": normal(5, 4), "c": normal(3, 1)}, transA=1, alpha=0.5,
                               beta=2.0),
    "max pool, uneven": node_model("MaxPool", IMAGE, kernel_shape=[3, 2], pads=[1, 0, 0, 1], strides=[2, 2]),
    "max pool, dilated": node_model("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 1]),
    "average, counting": node_model("AveragePool", IMAGE, kernel_shape=[3, 2], pads=[1, 0, 0, 1], count_include_pad=1),
    "average, not counting": node_model("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    "global average": node_model("GlobalAveragePool", IMAGE),
    "global maximum": node_model("GlobalMaxPool", IMAGE),
    "batch norm alone": node_model("BatchNormalization", IMAGE, {"s": normal(3), "b": normal(3, seed=1),
        "m": normal(3, seed=2), "v": normal(3, seed=3, positive=True)}, epsilon=1e-3),
    "group norm": node_model("GroupNormalization", {"x": normal(2, 6, 5)}, {"s": normal(6), "b": normal(6, seed=1)},
        num_groups=3, opset=21),
    "layer norm, two axes": node_model("LayerNormalization", IMAGE, {"s": normal(7, 5)}, axis=2, epsilon=1e-3),
    "reflected": node_model("Pad", IMAGE, {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}, mode="reflect"),
    "reflected channels": node_model("Pad", IMAGE, {"p": ints(1, 2, 0, 0, 0, 1, 0, 3)}, mode="reflect"),
    "edges": node_model("Pad", IMAGE, {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}, mode="edge"),
    "cropped": node_model("Pad", IMAGE, {"p": ints(0, 1, -2, 1, 0, 0, 1, -1), "v": np.float32(0.5)}),
    "padded axes": node_model("Pad", IMAGE, {"p": ints(1, 2, 0, 3), "v": np.float32(0), "a": ints(1, -1)}),
    "corners": node_model("Resize", IMAGE, {"s": np.array([1, 1, 2, 3], np.float32)}, order=("x", "", "s"),
                          mode="linear", coordinate_transformation_mode="align_corners"),
    "elu": node_model("Elu", X, alpha=0.7),
    "erf": node_model("Erf", X),
    "gelu, tanh": node_model("Gelu", X, approximate="tanh"),
    "hard sigmoid": node_model("HardSigmoid", X, alpha=0.3, beta=0.4),
    "hard swish": node_model("HardSwish", {"x": normal(5, 7) * 4}),
    "leaky": node_model("LeakyRelu", X, alpha=0.2),
    "log": node_model("Log", {"x": normal(3, 5, positive=True)}),
    "clipped below": node_model("Clip", X, {"l": np.float32(-0.2)}),
    "clipped above": node_model("Clip", X, {"h": np.float32(0.2)}, order=("x", "", "h")),
    "maximum": node_model("Max", {"a": normal(3, 5), "b": normal(5, seed=1), "c": normal(3, 1, seed=2)}),
    "minimum": node_model("Min", {"a": normal(3, 5), "b": normal(5, seed=1)}),
    "negative": node_model("Neg", X),
    "a slope for each": node_model("PRelu", X, {"s": normal(5)}),
    "power": node_model("Pow", {"x": normal(3, 5, positive=True)}, {"e": np.float32(1.7)}),
    "whole division": node_model("Div", {"x": ints(7, -7, 9)}, {"d": ints(2, 2, -4)}),
    "reciprocal": node_model("Reciprocal", {"x": normal(3, 5, positive=True)}),
    "softplus": node_model("Softplus", X),
    "square root": node_model("Sqrt", {"x": normal(3, 5, positive=True)}),
    "sum": node_model("Sum", {"a": normal(3, 5), "b": normal(5, seed=1), "c": normal(3, 1, seed=2)}),
    "tanh": node_model("Tanh", X),
    "where": node_model("Where", {"c": normal(3, 5) > 0, "x": normal(3, 1, seed=1), "y": normal(5, seed=2)}),
    "equal": node_model("Equal", {"x": ints(1, 2, 3)}, {"y": ints(1, 5, 3)}),
    "log softmax": node_model("LogSoftmax", X, axis=0),
    "minimum over an axis": node_model("ReduceMin", IMAGE, {"a": ints(1, -1)}),
    "sum over all": node_model("ReduceSum", X, keepdims=0),
    "sum over none": node_model("ReduceSum", X, noop_with_empty_axes=1),
    "axes in the attribute": node_model("ReduceMean", IMAGE, axes=[2, 3], opset=13),
    "cast": node_model("Cast", X, to=TensorProto.INT32),
    "cast like": node_model("CastLike", X, {"t": np.zeros(2, np.float64)}),
    "dropout": node_model("Dropout", X),
    "identity": node_model("Identity", X),
    "blocks first": node_model("DepthToSpace", {"x": normal(2, 12, 3, 5)}, blocksize=2, mode="DCR"),
    "space to depth": node_model("SpaceToDepth", {"x": normal(2, 3, 4, 6)}, blocksize=2),
    "expand": node_model("Expand", {"x": normal(3, 1)}, {"s": ints(2, 1, 5)}),
    "flatten": node_model("Flatten", IMAGE, axis=2),
    "flatten all": node_model("Flatten", X, axis=0),
    "gather, one": node_model("Gather", IMAGE, {"i": np.int64(-2)}, axis=2),
    "gather, several": node_model("Gather", IMAGE, {"i": np.array([[0, -1], [2, 1]], np.int64)}, axis=1),
    "gather, by data": node_model("Gather", {"x": normal(7, 5), "i": ints(3, 0, 6)}),
    "reshape, zero": node_model("Reshape", IMAGE, {"s": ints(0, -1, 5)}),
    "slice backwards": node_model(
        "Slice", IMAGE, {"b": ints(-1, 1), "e": ints(-1000, 100), "a": ints(2, 3), "t": ints(-2, 2)}
    ),
    "slice to nothing": node_model("Slice", X, {"b": ints(4), "e": ints(2), "a": ints(1)}),
    "split, uneven": node_model("Split", IMAGE, {"s": ints(1, 4, 2)}, outputs=3, axis=2),
    "split, as it comes": node_model("Split", IMAGE, outputs=3, axis=2, num_outputs=3),
    "squeeze all": node_model("Squeeze", {"x": normal(1, 3, 1)}),
    "turned": node_model("Transpose", IMAGE),
    "size": node_model("Size", X),
    "not": node_model("Not", {"x": normal(3, 5) > 0}),
    "and": node_model("And", {"x": normal(3, 5) > 0, "z": normal(5, seed=1) > 0}),
    "or": node_model("Or", {"x": normal(3, 5) > 0, "z": normal(5, seed=1) > 0}),
    **{kind: node_model(kind, X, {"z": normal(5, seed=1)})
       for kind in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    **{f"lstm {way}": recurrent("LSTM", 4, way, ("x", "w", "r", "b", "", "h", "c"))
       for way in ("forward", "reverse", "bidirectional")},
    "lstm, plain": recurrent("LSTM", 4, "forward", ("x", "w", "r")),
    **{f"gru {way}": recurrent("GRU", 3, way, ("x", "w", "r", "b", "", "h"), linear_before_reset=1)
       for way in ("forward", "reverse", "bidirectional")},
    "tile": node_model("Tile", X, {"r": ints(2, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NODES)
def test_an_operator_computes_what_onnx_runtime_computes(case: str) -> None:
    model = NODES[case]
    taken = {info.name for info in model.graph.input}
    feeds = {name: value for name, value in _feeds(model).items() if name in taken}
    found, want = computed(model, feeds), OrtRunner().build(model).run(feeds)
    assert_close(found, want, 1e-6)
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in want.items()}


def _feeds(model: onnx.ModelProto) -> Arrays:
    found = {}
    for k, info in enumerate(model.graph.input):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if kind == np.float32:
            positive = model.graph.node[0].op_type in ("Log", "Pow", "Reciprocal", "Sqrt")
            found[info.name] = normal(*shape, seed=k, positive=positive) * (
                4 if "Swish" in str(model.graph.node) else 1
            )
        elif kind == np.bool_:
            found[info.name] = normal(*shape, seed=k) > 0
        else:
            found[info.name] = np.array([3, 1, 2][: shape[0]], kind)
    return found


def test_every_operator_of_the_table_is_tested() -> None:
    seen = {model.graph.node[0].op_type for model in NODES.values()} | {"Shape"}
    for name in NETWORKS:
        seen |= {node.op_type for node in named(name).graph.node}
    on_host = {"Constant", "ConstantOfShape", "Range"}  # test_sizes_are_computed_on_the_host
    assert set(OPS) - seen - on_host == set()


def graph_of(
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    shape: list[Any],
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_sizes_are_computed_on_the_host() -> None:
    """(n, c, h, w) -> (n, h * w, c) * scale, by shape arithmetic that the batch enters; one step for each tensor op."""
    make = helper.make_node
    model = graph_of(
        [
            make("Shape", ["x"], ["all"]),
            make("Shape", ["x"], ["spatial"], start=2),
            make("Constant", [], ["zero"], value_int=0),
            make("Gather", ["all", "zero"], ["n"]),
            make("Unsqueeze", ["n", "axis"], ["n1"]),
            make("Slice", ["all", "one", "two"], ["c1"]),
            make("ReduceSum", ["spatial"], ["unused"]),
            make("Mul", ["h", "w"], ["hw"]),
            make("Slice", ["spatial", "axis", "one"], ["h"]),
            make("Slice", ["spatial", "one", "two"], ["w"]),
            make("Concat", ["n1", "c1", "hw"], ["size"], axis=0),
            make("Reshape", ["x", "size"], ["flat"]),
            make("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
            make("Cast", ["c1"], ["cf"], to=TensorProto.FLOAT),
            make("Sqrt", ["cf"], ["root"]),
            make("Div", ["tokens", "root"], ["scaled"]),
            make("Squeeze", ["hw", "axis"], ["count"]),
            make("Constant", [], ["step"], value_int=1),
            make("Range", ["zero", "count", "step"], ["order"]),
            make("Gather", ["scaled", "order"], ["same"], axis=1),
            make("ConstantOfShape", ["size"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
            make("Shape", ["ones"], ["back"], end=-1),
            make("ReduceMax", ["back", "axis"], ["most"], keepdims=0),
            make("Cast", ["most"], ["m"], to=TensorProto.FLOAT),
            make("Add", ["same", "m"], ["y"]),
        ],
        {"axis": ints(0), "one": ints(1), "two": ints(2)},
        ["n", 3, 4, 5],
    )
    order = {node.output[0]: node for node in model.graph.node}
    nodes = list(order.values())
    nodes.insert(7, nodes.pop(8))
    nodes.insert(8, nodes.pop(9))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    feeds = {"x": normal(2, 3, 4, 5)}
    program = program_of(model, feeds)
    assert [step.outputs[0] for step in program.steps] == ["flat", "tokens", "scaled", "same", "y"]
    assert_close(computed(model, feeds)["y"], OrtRunner().build(model).run(feeds)["y"], 1e-6)


CONV, NORM = ["c", "w", "b"], {"s": normal(4, positive=True), "t": normal(4, seed=4), "m": normal(4, seed=5),
                               "v": normal(4, seed=6, positive=True)}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("reader", "steps"), [(None, 1), ("Relu", 4), ("output", 2)])
def test_a_norm_is_folded_into_the_convolution_that_it_alone_reads(bias: bool, reader: str | None, steps: int) -> None:
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["c"]),
        make("BatchNormalization", ["c", *NORM], ["n"], epsilon=1e-2),
    ]
    if reader == "Relu":
        nodes += [make("Relu", ["c"], ["r"]), make("Add", ["r", "n"], ["y"])]
    else:
        nodes[1].output[0] = "y"
    constants = {"w": WEIGHT["w"], **({"b": WEIGHT["b"]} if bias else {}), **NORM}
    model = graph_of(nodes, constants, [2, 3, 7, 5], ("y", "c") if reader == "output" else ("y",))
    feeds = {"x": IMAGE["x"]}
    assert len(program_of(model, feeds).steps) == steps
    assert_close(computed(model, feeds), OrtRunner().build(model).run(feeds), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_steps_read_the_device_alone(name: str) -> None:
    """On a device without data: whoever asks for a value, as no captured graph may, or mixes devices, fails."""
    model = named(name)
    feeds = random_feeds(model)
    there = {name: laid_out(to_tensor(value)).to("meta") for name, value in feeds.items()}
    program = build_program(model, there, torch.device("meta"))
    with torch.no_grad():
        outputs = program(list(there.values()))
    want = computed(model, feeds)
    assert [tuple(value.shape) for value in outputs] == [want[name].shape for name in program.outputs]
    assert all(value.device.type == "meta" for value in outputs)
    for step in program.steps:
        for k, value in step.bound.items():
            on_host = k in step.op.numbers or (step.op.scalars and value is not None and value.dim() == 0)
            assert value is None or value.device.type == ("cpu" if on_host else "meta")


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 1, 5, 5), (25, 1, 5, 1)),
        ((1, 1, 5, 3), (15, 1, 3, 1)),
        ((7, 1, 3, 3), (9, 1, 3, 1)),
        ((7, 3, 1, 1), (3, 1, 3, 3)),
        ((2, 3, 5, 4), (60, 1, 12, 3)),
        ((7, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 3, 5), (15, 5, 1)),
    ],
)
def test_images_and_weights_have_their_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    value = torch.arange(float(np.prod(shape))).reshape(shape)
    found = laid_out(value)
    assert found.stride() == strides and torch.equal(found, value)
    assert laid_out(found.half()).stride() == strides


def test_a_source_gives_its_piece_channels_last() -> None:
    """Whatever reads it in the whole network finds them so."""
    model = source_model((2, 7, 5, 3))
    program = program_of(model, random_feeds(model))
    (made,) = program([laid_out(to_tensor(value)) for value in random_feeds(model).values()])
    assert made.stride() == (105, 1, 21, 7)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_one_channel_between_two_layers_keeps_the_layout(kind: str) -> None:
    """What torch computes of one channel, value by value, has the strides of channels first."""
    rng = np.random.default_rng(0)
    wide = (7, 1, 1, 1) if kind == "Conv" else (1, 7, 1, 1)
    weights = {
        "narrow": rng.standard_normal((1, 3, 3, 3)).astype(np.float32),
        "wide": rng.standard_normal(wide).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "narrow"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node(kind, ["r", "wide"], ["y"]),
    ]
    model = graph_of(nodes, weights, [2, 3, 7, 5])
    feeds = {"x": IMAGE["x"]}
    (made,) = program_of(model, feeds)([laid_out(to_tensor(feeds["x"]))])
    assert made.stride() == (105, 1, 21, 7)
    assert_close(computed(model, feeds), OrtRunner().build(model).run(feeds), 1e-6)


def test_a_value_lives_until_its_last_reader() -> None:
    model = named("splits")
    program = program_of(model, random_feeds(model))
    made = [name for step in program.steps for name in step.outputs]
    dropped = [name for step in program.steps for name in step.drop]
    assert sorted(dropped) == sorted({*program.inputs, *made} - set(program.outputs))
    for k, step in enumerate(program.steps):
        later = {name for other in program.steps[k + 1 :] for name in other.inputs}
        assert not later & set(step.drop)


def test_an_output_may_be_known_or_an_input() -> None:
    model = graph_of(
        [helper.make_node("Identity", ["k"], ["y"]), helper.make_node("Identity", ["x"], ["same"])],
        {"k": normal(2, 3)},
        [2, 3],
        ("y", "same"),
    )
    assert_close(computed(model, X | {"x": normal(2, 3)}), {"y": normal(2, 3), "same": normal(2, 3)}, 0)


FAULTS: dict[str, tuple[str, str, Op]] = {
    "no activation": ("plain", "Relu", Op(lambda x, a: x[0])),
    "another gelu": ("plain", "Gelu", Op(lambda x, a: torch.nn.functional.gelu(x[0], approximate="tanh"))),
    "padding forgotten": ("plain", "Conv", Op(lambda x, a: OPS_CONV(x, {**a, "pads": [0, 0, 0, 0]}))),
    "weights turned": ("concat", "Gemm", Op(lambda x, a: x[0] @ x[1].reshape(x[1].shape[::-1]) + x[2])),
    "joined in another order": ("concat", "Concat", Op(lambda x, a: torch.cat(list(x)[::-1], a["axis"]))),
    "another epsilon": ("norms", "LayerNormalization", Op(lambda x, a: OPS_NORM(x, {**a, "epsilon": 1e-2}))),
    "over another axis": ("tokens", "Softmax", Op(lambda x, a: x[0].softmax(1))),
    "cut at another place": ("splits", "Slice", Op(lambda x, a: OPS_SLICE(x, a).roll(1, 1), frozenset({1, 2, 3, 4}))),
    "blocks first": ("pixels", "DepthToSpace", Op(lambda x, a: OPS_DEPTH(x, {**a, "mode": "DCR"}))),
}
OPS_CONV, OPS_NORM = OPS["Conv"].run, OPS["LayerNormalization"].run
OPS_SLICE, OPS_DEPTH = OPS["Slice"].run, OPS["DepthToSpace"].run


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind, wrong = FAULTS[fault]
    model = named(name)
    feeds = random_feeds(model)
    want = OrtRunner().build(model).run(feeds)
    assert_close(computed(model, feeds), want, 1e-5)
    monkeypatch.setitem(torch_ops.OPS, kind, wrong)
    with pytest.raises((AssertionError, SluiceError)):
        assert_close(computed(model, feeds), want, 1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            graph_of([helper.make_node("NonZero", ["x"], ["y"], name="nz")], {}, [2, 3]),
            "NonZero 'nz' of the model has no counterpart",
        ),
        (
            graph_of([helper.make_node("Relu", ["x"], ["y"], domain="my.own")], {}, [2, 3]),
            "Relu 'y' of the model has no counterpart",
        ),
        (
            graph_of(
                [helper.make_node("QuantizeLinear", ["x", "s"], ["y"])], {"s": np.float32(0.1)}, [2, 3]
            ),
            "no int8 kernels for QuantizeLinear 'y'",
        ),
        (
            graph_of(
                [
                    helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
                    helper.make_node("Expand", ["x", "i"], ["y"]),
                ],
                {},
                [2],
            ),
            r"operand 1 \('i'\) of Expand 'y' of the model depends on the data",
        ),
        (
            graph_of([helper.make_node("MaxPool", ["x"], ["y", "where"], kernel_shape=[2])], {}, [1, 2, 4]),
            "output 'where' of MaxPool 'y' of the model is not supported",
        ),
        (
            graph_of(
                [helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=1)],
                {"w": normal(1, 3, 2), "r": normal(1, 3, 1)}, [4, 1, 2],
            ),
            "GRU 'y' of the model cannot run in torch: a GRU that resets before its product",
        ),
        (
            graph_of([helper.make_node("Reshape", ["x", "s"], ["y"])], {"s": ints(4, 2)}, [2, 3]),
            r"Reshape 'y' of the model cannot run in torch: shape '\[4, 2\]' is invalid",
        ),
        (
            graph_of([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)], {}, [2, 3]),
            "Cast 'y' of the model cannot run in torch: ONNX element type 8 is not supported",
        ),
        (
            graph_of(
                [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic")],
                {"s": np.array([1, 1, 2], np.float32)},
                [1, 2, 4],
            ),
            "Resize 'y' of the model cannot run in torch: resizing by",
        ),
    ],
)  # fmt: skip
def test_what_torch_cannot_do_is_named(model: onnx.ModelProto, reason: str) -> None:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    with pytest.raises(SluiceError, match=reason):
        program_of(model, {"x": normal(*shape)})


def test_an_old_file_is_refused() -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, [2, 3])
    model.opset_import[0].version = 11
    with pytest.raises(SluiceError, match="ONNX opset 11; export it with opset 13"):
        program_of(model, {"x": normal(2, 3)})
