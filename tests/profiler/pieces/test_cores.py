"""Attention and recurrence in pieces: one core, what goes in front of it, heads and dimensions as extents, levels."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from sluice.artifacts.macs import count_macs
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.profiler.pieces.joints import find_joints
from sluice.profiler.pieces.levels import group_levels
from sluice.profiler.pieces.partition import (
    Partition,
    Piece,
    anchor_weight,
    build_piece,
    partition_static,
    spread_widths,
    static_at,
)
from sluice.profiler.pieces.work import work_of
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.blocked_part import kernels, without_reorders
from sluice.runtime.ort.cpu import OrtRunner
from tests.exported import named_sequence
from tests.sequences import sequence

QUICK = ("sdpa", "fused, by hand", "multihead", "lstm", "gru, last state")
REST = ("by hand", "einsum", "bmm", "masked", "cross", "padded", "grouped", "grouped, expanded", "vision", "window",
        "language, tied", "encoder", "lstm, both ways", "lstm, states", "gru cell")  # fmt: skip
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
ATTENTION = ("sdpa", "multihead")


@functools.cache
def cut(name: str, dims: bool = False) -> Partition:
    static = static_at(named_sequence(name), 3)
    return partition_static(static, analyze_onnx(static, dims=dims), 3)


def core(partition: Partition) -> Piece:
    """The one piece that multiplies activations."""
    (found,) = [p for p in partition.pieces if work_of(p, partition).kind == "MatMul of activations"]
    return found


def operators(piece: Piece) -> Counter[str]:
    return Counter(node.op_type for node in piece.model.graph.node)


@pytest.mark.parametrize("dims", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_pieces_run_in_order_compute_the_cut_network(name: str, dims: bool) -> None:
    partition = cut(name, dims)
    _, inputs = sequence(name)
    rng = np.random.default_rng(3)
    widths = {g: int(rng.integers(1, size + 1)) for g, size in partition.dense.items()}
    known = {i.name: x.numpy() for i, x in zip(partition.model.graph.input, inputs, strict=True)}
    whole = cut_graph(partition.model, partition.analysis, partition.masks(widths))
    reference = OrtRunner().build(whole).run(known)
    for piece in partition.pieces:
        model = build_piece(partition, piece, widths)
        known.update(OrtRunner().build(model).run({i.name: known[i.name] for i in model.graph.input}))
    assert_close({out: known[out] for out in reference}, reference)


@pytest.mark.parametrize("dims", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_work_is_that_of_the_cut_piece(name: str, dims: bool) -> None:
    partition = cut(name, dims)
    for index, piece in enumerate(partition.pieces):
        rng = np.random.default_rng(index)
        asked = [int(rng.integers(1, extent.at(partition.dense) + 1)) for extent in piece.extents]
        model = build_piece(partition, piece, spread_widths(piece, asked, partition.dense))
        macs = work_of(piece, partition).at(np.array([asked], dtype=np.float64))[0]
        assert macs[0] == pytest.approx(count_macs(model)), piece.description


@pytest.mark.parametrize("name", ATTENTION)
def test_scores_and_context_are_one_piece_between_projections(name: str) -> None:
    partition = cut(name)
    piece, before, after = core(partition), *neighbours(partition)
    assert operators(piece)["MatMul"] == 2 and operators(piece)["Softmax"] == 1
    assert operators(piece)["Mul"] and operators(piece)["Transpose"]  # scales and layouts go along
    for own in before:
        assert not {"Reshape", "Mul"} & set(operators(own)) and anchor_weight(own)
    assert anchor_weight(after) and anchor_weight(piece) is None


def neighbours(partition: Partition) -> tuple[list[Piece], Piece]:
    piece = core(partition)
    before = [p for p in partition.pieces if set(p.outputs) & set(piece.inputs)]
    (after,) = [p for p in partition.pieces if set(p.inputs) & set(piece.outputs)]
    return before, after


@pytest.mark.parametrize("name", ["sdpa", "encoder"])
def test_the_kernels_of_the_pieces_are_those_of_the_network(name: str) -> None:
    """A scale, a transpose or a sum at a border would run apart, where the network has one kernel."""
    partition = cut(name)
    total: Counter[object] = Counter()
    for piece in partition.pieces:
        total += kernels(without_reorders(build_piece(partition, piece, partition.dense)))
    assert total == kernels(without_reorders(partition.model))


def test_what_others_read_too_stays_in_front() -> None:
    """A scaling that another layer reads cannot be inside the core."""

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = torch.nn.Linear(5, 6), torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
            self.side = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.q(x) * 0.5, self.k(x) * 0.5
            return self.out((q @ k.transpose(1, 2)).softmax(-1) @ k) + self.side(q)

    static = static_at(to_onnx(Shared().eval(), (torch.randn(2, 4, 5),)), 2)
    found = {p.name: operators(p) for p in partition_static(static, analyze_onnx(static), 2).pieces}
    assert found["q"]["Mul"] == 1 and found["k"]["Mul"] == 0


def test_tensors_that_no_convolution_lays_out_need_no_source() -> None:
    assert all(not piece.bare for name in QUICK for piece in cut(name).pieces)
    assert any(operators(piece)["Add"] > 1 for piece in cut("sdpa").pieces)  # shortcuts among them


def test_joints_of_a_core_save_their_calls_alone() -> None:
    partition = cut("sdpa")
    piece = core(partition)
    assert {j.calls for j in find_joints(partition) if j.tensor in (*piece.inputs, *piece.outputs)} == {1}


def test_heads_and_their_dimensions_are_two_extents() -> None:
    partition = cut("sdpa", dims=True)
    piece = core(partition)
    assert sorted(int(extent.at(partition.dense)) for extent in piece.extents) == [3, 4, 4]  # H, Dq, Dv
    (out,) = [e for e in partition.pieces if e.name == "attention.proj"]
    assert len(out.extents) == 3  # H, Dv, width
    plain = core(cut("sdpa"))
    assert [int(extent.at(partition.dense)) for extent in plain.extents] == [3]


def test_layers_of_a_recurrent_network_are_pieces() -> None:
    partition = cut("lstm")
    assert [p.name for p in partition.pieces] == ["embed", "inner.weight_ih_l0", "head"]
    assert anchor_weight(partition.pieces[1]) == "inner.weight_ih_l0"


def levels_of(model: torch.nn.Module, inputs: torch.Tensor, dims: bool = False) -> dict[str, tuple[int, ...]]:
    static = static_at(to_onnx(model.eval(), (inputs,)), 1)
    return group_levels(partition_static(static, analyze_onnx(static, dims=dims), 1), "fp32")


def test_levels_count_positions() -> None:
    from sluice.models.vit import vit

    found = levels_of(vit(width=96, heads=7, dims=16, hidden=80, depth=1), torch.randn(1, 1, 28, 28), dims=True)
    assert found["blocks.0.attention.qkv"] == (1, 2, 3, 4, 5, 6, 7)
    assert found["blocks.0.attention.qkv#2"] == (8, 16)
    assert all(width % 8 == 0 for width in found["blocks.0.up"])
    assert found["patch"][0] % 4 == 0 and 12 in found["patch"]  # a convolution reads it
    two = levels_of(vit(width=32, heads=12, dims=2, hidden=16, depth=1), torch.randn(1, 1, 28, 28))
    assert two["blocks.0.attention.qkv"] == (2, 4, 6, 8, 10, 12)  # four positions are two heads


def test_levels_of_a_recurrent_layer_are_eights() -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = torch.nn.GRU(5, 40, batch_first=True), torch.nn.Linear(40, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x)[0][:, -1])

    assert levels_of(Reader(), torch.randn(1, 6, 5)) == {"inner": (8, 16, 24, 32, 40)}
