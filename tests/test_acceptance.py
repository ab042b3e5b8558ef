"""What we write is what TensorRT takes: TensorRT-RTX parses and builds it, on a machine without a GPU.

Every reference network, dense and cut by plans with all kinds of edits, whole and in pieces, in every precision. It is
no proof that a fast kernel exists on another GPU, but types, operators and attributes are those of the real importer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from benchmarks.kernels_networks import CASES
from sluice import models
from sluice.core.deployment import PRECISIONS
from sluice.core.errors import SluiceError
from sluice.core.plan import Drop, Edits, Factorize, Merge, Plan
from sluice.models import EXAMPLE_SHAPES, example_inputs
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.factor import forms_of
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.graph.segments import find_segments, folded_norms
from sluice.passes.graph.view_onnx import view_onnx
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.partition import build_piece, partition_graph
from sluice.profiler.pieces.sources import add_sources
from sluice.runtime.trt.inspect import EngineLayers, owners, place_pieces, read_layers
from tests import networks
from tests.device import chain
from tests.rtx import INSTALLED, Rtx

pytestmark = pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")

BATCH = 2
TARGET = "tensorrt"
WIDTHS = (5, 7, 9)
SMALL: dict[str, Callable[[], nn.Module]] = {
    "densenet": lambda: models.densenet(7, growth=5),
    "mobilenet_v2": lambda: models.mobilenet_v2(7, width=0.25),
    "resnet1d": lambda: models.resnet1d(7, widths=WIDTHS),
    "resnet20": lambda: models.resnet20(7, widths=WIDTHS),
    "se_resnet": lambda: models.se_resnet(7, widths=WIDTHS),
    "vgg16_bn": lambda: models.vgg16_bn(7, widths=(5, 7, 9, 11, 13), hidden=17),
}
LARGE: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2_224": models.mobilenet_v2_224,
    "resnet20_mnist": models.resnet20_mnist,
    "resnet50": models.resnet50,
    "resnet56": lambda: models.resnet56(7, widths=WIDTHS),
}
DENSENET = pytest.param("densenet", marks=pytest.mark.slow)  # as its export takes longest of all small ones
IMAGES = {*SMALL, *LARGE}
OTHERS = sorted({*models.__all__} - IMAGES - {"EXAMPLE_SHAPES", "enliven", "example_inputs"})
REFERENCE = [
    DENSENET,
    *(name for name in SMALL if name != "densenet"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE),
]
METHODS = ("filter", "rank", "block", "merge")


@pytest.fixture(scope="module")
def rtx() -> Iterator[Rtx]:
    with Rtx() as found:
        yield found


@functools.cache
def named(name: str) -> onnx.ModelProto:
    """A network with its parameter names; what its weights are is nothing to a parser."""
    if name == "mixed":
        model, inputs = networks.mixed()
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make = {**SMALL, **LARGE}.get(name) or getattr(models, name)
            model, inputs = make().eval(), example_inputs(name, BATCH)
    return to_onnx(model, inputs)


@functools.cache
def cut(name: str, methods: tuple[str, ...] = METHODS) -> tuple[onnx.ModelProto, Plan]:
    """The network with about half of every group, and one edit of every kind that it offers, on disjoint layers."""
    dense, rng = named(name), np.random.default_rng(3)
    analysis, view = analyze_onnx(dense), view_onnx(dense)
    tensors = {init.name: onnx.numpy_helper.to_array(init) for init in dense.graph.initializer}
    taken: set[str] = set()
    drops: list[Drop] = []
    merges: list[Merge] = []
    factorizations: list[Factorize] = []
    if "block" in methods:
        for block in find_blocks(view)[0][:1]:
            drops.append(Drop(block.name, block.params))
            taken |= set(block.params)
    if "merge" in methods:
        for chain_ in chains_onnx(dense):
            for segment in find_segments(chain_, folded_norms(chain_, tensors), set()):
                merge = segment.merge()
                if (
                    not merges
                    and len(merge.layers) > 1
                    and merge.runs == (merge.layers,)
                    and not taken & {*merge.layers}
                ):
                    merges.append(merge)
                    taken |= set(merge.layers)
    if "rank" in methods:
        weights = [n.tensors[0] for n in view.nodes if n.kind == "weighted" and n.op in ("Conv", "Gemm")]
        for weight in weights:
            shape = tensors[weight].shape
            if weight not in taken and min(shape[:2]) > 3 and len(factorizations) < 3:
                form = forms_of(shape)[len(factorizations) % len(forms_of(shape))]
                factorizations.append(Factorize(weight, form, 2))
    kept = {g.name: sorted(rng.choice(g.size, max(1, g.size // 2), replace=False).tolist()) for g in analysis.groups}
    edits = Edits(tuple(factorizations), tuple(drops), tuple(merges))
    plan = make_plan(analysis, kept if "filter" in methods else {}, (), edits)
    return rewrite_onnx(dense, plan), plan


def accepted(rtx: Rtx, model: onnx.ModelProto) -> None:
    found = rtx.build(model, BATCH)
    assert not found.error and found.size > 1000, found.error


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["HardSwish", "Mish"])
def test_activations_that_bfloat16_lacks(rtx: Rtx, activation: str, precision: str) -> None:
    model = chain([5, 7])
    for node in model.graph.node:
        node.op_type = activation if node.op_type == "Relu" else node.op_type
    accepted(rtx, to_precision(model, precision, target=TARGET))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_stays_float32(rtx: Rtx, precision: str) -> None:
    """A sum of squares and a factor beyond 16 bits, in a network."""
    model = chain([5, 7])
    made = {"square": ("Mul", "c1", "c1"), "mean": ("ReduceMean", "square"), "root": ("Sqrt", "mean"),
            "normed": ("Div", "c1", "root"), "scaled": ("Mul", "normed", "large")}  # fmt: skip
    activation = next(index for index, node in enumerate(model.graph.node) if node.output[0] == "a1")
    model.graph.node[activation].input[0] = "scaled"
    for output, (kind, *inputs) in reversed(made.items()):
        model.graph.node.insert(activation, helper.make_node(kind, inputs, [output]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e9), "large"))
    accepted(rtx, to_precision(model, precision, target=TARGET))


def test_every_reference_network_is_here() -> None:
    assert set(EXAMPLE_SHAPES) == IMAGES
    assert {"attention_recommender", "bert", "detector3d", "gru_recommender", "lstm_classifier", "unet", "vit"} < {
        *OTHERS
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", REFERENCE)
def test_a_dense_network(rtx: Rtx, name: str, precision: str) -> None:
    accepted(rtx, to_precision(finalize(named(name)), precision, target=TARGET))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_words_steps_or_volumes(rtx: Rtx, name: str) -> None:
    """In every precision, but for a GRU in bfloat16; all those that take no single image."""
    exported = finalize(named(name))
    for precision in PRECISIONS:
        if precision == "bf16" and name.startswith("gru"):
            continue
        accepted(rtx, to_precision(exported, precision, target=TARGET))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kind", "gates"), [("GRU", 3), ("LSTM", 4)])
def test_a_recurrent_layer(rtx: Rtx, kind: str, gates: int, precision: str) -> None:
    """TensorRT's parser mixes a GRU's gates with float32, so in bfloat16 it is refused before a build."""
    draw = np.random.default_rng(0).standard_normal
    sizes = {"w": (1, gates * 4, 3), "r": (1, gates * 4, 4), "b": (1, gates * 8)}
    held = [onnx.numpy_helper.from_array(draw(size).astype(np.float32), name) for name, size in sizes.items()]
    extra = {"linear_before_reset": 1} if kind == "GRU" else {}
    layer = helper.make_node(kind, ["x", *sizes], ["y"], hidden_size=4, **extra)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in (("x", (5, BATCH, 3)), ("y", (5, 1, BATCH, 4)))
    ]
    graph = helper.make_graph([layer], kind, ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if kind == "GRU" and precision == "bf16":
        assert "GRU" in rtx.build(to_precision(model, precision), BATCH).error, "it takes one by now: refuse it no more"
        with pytest.raises(SluiceError, match=r"TensorRT takes no GRU \(y\) in bf16; choose fp16 or fp32"):
            to_precision(model, precision, target=TARGET)
        return
    accepted(rtx, to_precision(model, precision, target=TARGET))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_two_layers", "convnext_atto", "crepe_tiny", "vit_tiny"])
def test_a_network_of_another_family(rtx: Rtx, name: str) -> None:
    """In every precision; their attention, layer norms and depthwise convolutions are in no reference network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exported = to_onnx(CASES[name].make().eval(), (CASES[name].example(BATCH),))
    for precision in PRECISIONS:
        accepted(rtx, to_precision(finalize(exported), precision, target=TARGET))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["mixed", "se_resnet", "resnet1d"])
def test_a_slim_network(rtx: Rtx, name: str, precision: str) -> None:
    accepted(rtx, to_precision(finalize(cut(name)[0]), precision, target=TARGET))


@pytest.mark.parametrize(
    "name", [pytest.param("densenet", marks=pytest.mark.slow), "mobilenet_v2", "resnet20", "vgg16_bn"]
)
def test_a_thinner_network(rtx: Rtx, name: str) -> None:
    accepted(rtx, finalize(cut(name, ("filter",))[0]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_as_it_is_timed(rtx: Rtx, precision: str) -> None:
    """Nothing is folded there, since names are needed to the end."""
    accepted(rtx, to_precision(cut("mixed")[0], precision, target=TARGET))


def test_all_edits_are_among_the_plans() -> None:
    plan = cut("mixed")[1]
    assert plan.slices and plan.factorizations and plan.drops and plan.merges


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_piece(rtx: Rtx, precision: str) -> None:
    found = partition_graph(named("mixed"), BATCH)
    pieces = {piece.key: piece for piece in found.pieces}
    halves = {group: max(1, size // 2) for group, size in found.dense.items()}
    assert len(pieces) > 5
    for piece in pieces.values():
        model, _ = add_sources(build_piece(found, piece, halves), piece.bare)
        solution = rtx.build(to_precision(model, precision, part=True, target=TARGET), BATCH)
        assert not solution.error and solution.size, f"{piece.description}: {solution.error}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_traced_to_pieces(rtx: Rtx, precision: str) -> None:
    """By what the builder says of the layers that it made of every piece."""
    placed, pieces = placement(rtx, precision)
    assert list(placed.pieces) == pieces
    assert all(placed.pieces.values()), placed
    assert all(len(held) > 1 for held in placed.shared.values())


def placement(rtx: Rtx, precision: str) -> tuple[EngineLayers, list[str]]:
    found = partition_graph(named("mixed"), BATCH)
    deployed = to_precision(found.model, precision, target=TARGET)
    layers = read_layers(rtx.build(deployed, BATCH, described=True).information)
    assert len(layers) > len(found.pieces) // 2
    pieces = {piece.name: piece.model.graph for piece in found.pieces}
    return place_pieces(layers, owners(deployed.graph, pieces)), list(pieces)


def attention(opset: int = 23) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 8, 16]) for name in "qkvy"]
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"])], "attention", infos[:3], infos[3:]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def half_typed() -> onnx.ModelProto:
    model = chain([5, 7])
    weight = next(init for init in model.graph.initializer if init.name == "conv1.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float16), weight.name))
    return model


def unknown_operator() -> onnx.ModelProto:
    model = chain([5])
    model.graph.node[1].op_type = "Relo"
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (half_typed, ["parse", "'node_of_c1' (Conv)", "must be of same type", "Float", "Half"]),
        (unknown_operator, ["parse", "'node_of_a0' (Relo)", "Plugin not found"]),
        (attention, ["build", "Attention operation was not supported"]),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(
    rtx: Rtx, model: Callable[[], onnx.ModelProto], words: list[str]
) -> None:
    error = rtx.build(model(), BATCH).error
    assert error.startswith("TensorRT-RTX 1.") and "\n" not in error
    assert all(word in error for word in words), error
