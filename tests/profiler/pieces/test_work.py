"""The work of a piece is that of the graph cut at these extents, counted by other code."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from sluice.artifacts.macs import count_macs
from sluice.profiler.pieces.identity import compositions_of
from sluice.profiler.pieces.partition import Partition, Piece, build_piece, partition_graph, spread_widths
from sluice.profiler.pieces.split import ANCHORS
from sluice.profiler.pieces.work import work_of
from tests.device import chain
from tests.exported import named

# Not "splits": a slice across the border of two groups holds some channels twice, which is affine in no width.
QUICK = ("concat", "grouped", "transposed", "tokens", "squeeze_excite")
REST = ("sequence1d", "volume", "mobilenet_v2", "densenet", "se_resnet")
SLOW = tuple(pytest.param(name, marks=pytest.mark.slow) for name in REST)


@functools.cache
def cut(name: str) -> Partition:
    return partition_graph(named(name), 2)


def at(partition: Partition, piece: Piece, share: float) -> tuple[dict[str, int], np.ndarray]:
    """Widths at a share of the piece's extents, and its extents there."""
    sizes = [int(extent.at(partition.dense)) for extent in piece.extents]
    asked = [max(len(e.coefs), round(share * size)) for e, size in zip(piece.extents, sizes, strict=True)]
    widths = spread_widths(piece, asked, partition.dense)
    return widths, np.array([asked], dtype=np.float64)


def check_macs(partition: Partition, piece: Piece, share: float) -> None:
    widths, point = at(partition, piece, share)
    macs, _ = work_of(piece, partition).at(point)
    assert macs[0] == pytest.approx(count_macs(build_piece(partition, piece, widths))), piece.description


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_macs_are_those_of_the_cut_piece(name: str) -> None:
    for share in (1.0, 0.6, 0.3):
        for piece in cut(name).pieces:
            check_macs(cut(name), piece, share)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_macs_at_any_widths(data: st.DataObject) -> None:
    partition = cut(data.draw(st.sampled_from(QUICK)))
    piece = data.draw(st.sampled_from([p for p in partition.pieces if p.extents]))
    point = []
    for extent in piece.extents:
        count = len(extent.coefs)
        point.append(data.draw(st.integers(count, int(extent.at(partition.dense)))))
    widths = spread_widths(piece, point, partition.dense)
    macs, _ = work_of(piece, partition).at(np.array([point], dtype=np.float64))
    assert macs[0] == pytest.approx(count_macs(build_piece(partition, piece, widths))), piece.description


def moved_by_hand(model: onnx.ModelProto) -> tuple[int, int]:
    """Elements of the activations in a graph of one piece, and of the weights that its anchors read."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {init.name: math.prod(init.dims) for init in graph.initializer}
    sizes = {
        info.name: math.prod(d.dim_value for d in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
    }
    names = {n for node in graph.node for n in (*node.input, *node.output)} - weights.keys() - {""}
    read = [weights[node.input[1]] for node in graph.node if node.op_type in ANCHORS and node.input[1] in weights]
    return sum(sizes[name] for name in names), sum(read)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_is_moved_by_hand(share: float) -> None:
    partition = partition_graph(chain([24, 16, 20], batch="N"), 2)
    for piece in partition.pieces:
        widths, point = at(partition, piece, share)
        work = work_of(piece, partition)
        active, weights = moved_by_hand(build_piece(partition, piece, widths))
        assert work.at(point)[1][0] == pytest.approx(active + weights)
        assert work.weights_at(point)[0] == weights


def test_the_work_of_a_convolution_by_hand() -> None:
    """16 channels into 20, 3x3, on 9x9 pixels, two images, and ReLU behind it."""
    partition = partition_graph(chain([16, 20, 12], batch="N"), 2)
    piece = next(p for p in partition.pieces if p.name == "conv1")
    points = np.array([[16.0, 20.0], [8.0, 12.0]])
    work = work_of(piece, partition)
    pixels = 2 * 9 * 9
    macs, moved = work.at(points)
    assert macs.tolist() == [pixels * 16 * 20 * 9, pixels * 8 * 12 * 9]
    assert work.weights_at(points).tolist() == [16 * 20 * 9, 8 * 12 * 9]
    assert moved.tolist() == [pixels * (16 + 20 + 20) + 16 * 20 * 9, pixels * (8 + 12 + 12) + 8 * 12 * 9]
    assert work.channels(points).tolist() == points.tolist()
    assert work.kind == "Conv 3x3"


def test_kinds() -> None:
    kinds = {work_of(piece, cut(name)).kind for name in QUICK for piece in cut(name).pieces}
    assert {"Conv 3x3", "Conv 1x1", "Conv 3x3 depthwise", "Gemm"} <= kinds
    assert any(kind.startswith("ConvTranspose") for kind in kinds)


def test_weights_are_those_of_the_cut_piece() -> None:
    """They decide what no longer fits the caches."""
    for name in QUICK:
        partition = cut(name)
        for piece, share in ((piece, share) for piece in partition.pieces for share in (1.0, 0.5)):
            widths, point = at(partition, piece, share)
            graph = build_piece(partition, piece, widths).graph
            held = {i.name: numpy_helper.to_array(i).size for i in graph.initializer}
            laid = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
            names = [laid.get(n.input[1], n.input[1]) for n in graph.node if n.op_type in ANCHORS]
            read = [held[name] for name in names if name in held]
            assert work_of(piece, partition).weights_at(point)[0] == pytest.approx(sum(read)), piece.description


def test_a_piece_without_an_anchor_moves_what_it_reads_and_makes() -> None:
    model = chain([12, 8], batch="N")
    pool = onnx.helper.make_node("MaxPool", ["x"], ["pooled"], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    model.graph.node[0].input[0] = "pooled"
    model.graph.node.insert(0, pool)
    partition = partition_graph(model, 2)
    (piece,) = [p for p in partition.pieces if not any(node.op_type in ANCHORS for node in p.model.graph.node)]
    work, nothing = work_of(piece, partition), np.zeros((1, 0))
    macs, moved = work.at(nothing)
    assert (work.kind, macs.tolist(), moved.tolist()) == ("MaxPool", [0.0], [2 * 2 * 3 * 9 * 9])
    assert work.channels(nothing).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ["splits", "shuffle", "grouped", "tokens"])
def test_an_axis_with_one_layer_is_read_as_those_with_several_are(name: str) -> None:
    """A layer twice says nothing new, and is read the general way."""
    analysis = cut(name).analysis
    twice = {v: tuple(replace(a, layers=a.layers * 2) for a in axes) for v, axes in analysis.values.items()}
    single = [v for v, axes in analysis.values.items() if axes and all(len(axis.layers) == 1 for axis in axes)]
    assert len(single) > 3
    for value in single:
        found, general = (compositions_of(a, value) for a in (analysis, replace(analysis, values=twice)))
        assert found == general and [list(c.coefs) for c in found] == [list(c.coefs) for c in general]
