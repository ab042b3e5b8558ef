"""Attention, embeddings and recurrent layers: torch and ONNX are read alike, and every cut is exact.

The slim network is compared with the closed one in double precision; closing multiplies weights by masks, knows
nothing of the rewriters, and keeps all shapes. The exported and cut graph is compared with the slim network at two
batch sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Plan, Slice
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import mend_literals, rewrite_torch, slice_tensors
from sluice.passes.gates.gating import bake, insert_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis, agreeing, keep_masks
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.placement_torch import place_gates
from sluice.passes.search_space import find_search_space, read_torch
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import random_kept
from tests.passes.graph.test_readings_agree import groups
from tests.sequence_forms import ALL
from tests.sequences import REFERENCES, Recurrent, sequence

EXACT = 1e-10  # of double precision
DIMS = ("sdpa", "fused, by hand", "bmm", "cross", "grouped", "vision", "window")  # with the dimensions of heads
QUICK = (
    "fused", "multihead, positions first", "grouped", "vision", "window", "language, tied", "lstm cell",
    "llama, grouped", "t5", "seen", "folded", "turned", "repeated", "shifted", "weight norm",
    "standardised, by hand", "shortcut", "gru, dropout, both ways",
)  # fmt: skip


@dataclass(frozen=True)
class Corner:
    dense: fx.GraphModule
    inputs: tuple[Tensor, ...]
    analysis: Analysis
    exported: onnx.ModelProto


@functools.cache
def captured(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model, inputs = sequence(name, ALL)
    return capture(model, inputs), inputs


@functools.cache
def corner(name: str, dims: bool = False) -> Corner:
    dense, inputs = captured(name)
    return Corner(dense, inputs, analyze(dense, dims=dims), to_onnx(dense, inputs))


@functools.cache
def precise(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model, inputs = sequence(name, ALL)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return capture(model.double(), wide), wide


def run(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> Tensor:
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    return torch.from_numpy(next(iter(OrtRunner().build(model).run(feeds).values())))


def check(name: str, plans: int, exported: int, dims: bool = False, alike: bool = True) -> None:
    """``plans`` random plans in torch, ``exported`` of them in ONNX too; of the groups of both, if not ``alike``."""
    c, (exact, wide) = corner(name, dims), precise(name)
    theirs = analyze_onnx(c.exported, dims=dims)
    if alike:
        assert groups(c.analysis, c.analysis.tensors) == groups(theirs, c.analysis.tensors)
        assert set(c.analysis.frozen) == set(theirs.frozen)
    else:
        c = dataclasses.replace(c, analysis=agreeing(c.analysis, theirs, "is no group of the ONNX graph"))
    mine = analyze(exact, dims=dims)
    placement = place_gates(exact, mine if alike else agreeing(mine, theirs, "is no group of the ONNX graph"))
    longer = tuple(torch.cat([x, x[:2]]) for x in c.inputs)
    changed = 0.0
    for seed in range(plans):
        kept = random_kept(c.analysis, seed)
        plan = make_plan(c.analysis, kept)
        with torch.no_grad():
            closed = bake(exact, c.analysis, placement, keep_masks(c.analysis, kept))(*wide)
            assert_close(rewrite_torch(exact, plan, wide)(*wide), closed, EXACT, what=f"slim, plan {seed}")
            changed = max(changed, relative_error(closed, exact(*wide)))
            if seed < exported:
                slim, cut = rewrite_torch(c.dense, plan, c.inputs), rewrite_onnx(c.exported, plan)
                assert_close(run(cut, c.inputs), slim(*c.inputs), what=f"ONNX, plan {seed}")
                assert_close(run(cut, longer), slim(*longer), what=f"ONNX at another batch, plan {seed}")
    assert changed > 1e-2


@pytest.mark.parametrize("name", QUICK)
def test_some_plans(name: str) -> None:
    check(name, plans=3, exported=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_many_plans(name: str) -> None:
    check(name, plans=20, exported=20)


# Group norms of a concatenation are a reshape in ONNX, which keeps widths that the torch graph can cut.
UNLIKE = ("unet",)


@pytest.mark.parametrize("name", ["vit", "unet"])
def test_reference_networks(name: str) -> None:
    check(name, plans=2, exported=1, alike=name not in UNLIKE)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_networks_many_plans(name: str) -> None:
    check(name, plans=20, exported=20, alike=name not in UNLIKE)


def test_dimensions_of_heads() -> None:
    check("fused, by hand", plans=3, exported=2, dims=True)
    sizes = {g.name: g.size for g in corner("fused, by hand", True).analysis.groups}
    assert sizes == {"embed": 10, "attention.qkv": 3, "attention.qkv#2": 4, "up": 13}


def test_dimensions_of_heads_that_turn_in_pairs() -> None:
    """Every second dimension is read by itself, so pairs go as a whole."""
    check("interleaved", plans=2, exported=1, dims=True)
    sizes = {g.name: g.size for g in corner("interleaved", True).analysis.groups}
    assert sizes == {"embed": 10, "attention.qkv": 3, "attention.qkv#2": 2, "up": 13}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIMS)
def test_dimensions_of_heads_many_plans(name: str) -> None:
    check(name, plans=20, exported=20, dims=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_lstm_stays_whole_and_is_not_exported() -> None:
    """torch.onnx drops the projection and writes a file that computes something else."""
    dense = capture(Recurrent(nn.LSTM, 6, proj_size=4), torch.randn(3, 7, 5))
    analysis = analyze(dense, needed=False)
    assert not analysis.groups
    assert analysis.frozen["inner"] == analysis.frozen["embed"] == "lstm (lstm) projects its hidden units"
    with pytest.raises(SluiceError, match=r"torch\.onnx leaves 'inner.weight_hr_l0' out of the file"):
        to_onnx(dense, torch.randn(3, 7, 5))


WIDTHS = {
    "fused": {"embed": 10, "attention.qkv": 3, "up": 13},
    "multihead": {"embed": 10, "attention.inner": 5, "up": 13},
    "cross": {"one": 10, "two": 6, "attention": 5},
    "grouped, expanded": {"embed": 10, "attention.q": 2, "attention.q#2": 3, "up": 13},
    "window": {"patch": 10, "qkv": 3},
    "language": {"word": 10, "attention.q": 3, "up": 13},
    "lstm, stacked": {"embed": 7, "inner": 6, "inner#2": 6},
    "llama": {"word": 10, "q": 2, "q#2": 3, "gate": 13},
    "t5": {"word": 10, "table": 3, "layers.0.up": 13, "layers.1.up": 13},
    "columns": {"word": 12, "qkv": 3, "up": 14},
    "turned": {"embed": 10, "attention.q": 3, "up": 13},
    "shifted": {"embed": 10, "attention.q": 3, "up": 13},
    "repeated": {"embed": 10, "attention.q": 2, "attention.q#2": 3, "attention.proj": 7, "up": 13},
    "weight norm, a hook": {"a": 7, "b": 9, "d": 11},
    "standardised": {"a": 3, "b": 4},
    "shortcut": {"a": 6, "b": 10, "c": 4, "d": 7},
    "rnn, dropout": {"embed": 7, "inner": 6, "inner#2": 6, "inner#3": 6},
}


@pytest.mark.parametrize("name", WIDTHS)
def test_what_can_be_cut(name: str) -> None:
    """Without one reason for a matrix that is left alone, but the last, whose rows are the output."""
    dense, _ = captured(name)
    space = find_search_space(read_torch(dense))
    analysis = space.analysis
    assert {g.name: g.size for g in analysis.groups} == WIDTHS[name]
    told = {*space.left_alone, *(ref.param for group in analysis.groups for ref in group.refs)}
    silent = [n for n, p in dense.named_parameters() if p.ndim > 1 and told.isdisjoint((n, n.rpartition(".")[0]))]
    assert not silent
    outputs = {} if name == "columns" else {"head": "is an output of the model"}  # of a table that is cut elsewhere
    assert analysis.frozen == outputs


def test_heads_are_closed_by_the_projection_and_states_by_their_readers() -> None:
    for name, expected, absent in (
        ("sdpa", ("attention.proj.weight", 1), ("attention.k.weight", 0)),
        ("lstm", ("inner.weight_hh_l0", 1), ("inner.weight_hh_l0", 0)),
    ):
        c = corner(name)
        refs = place_gates(c.dense, c.analysis).refs
        assert expected in refs and absent not in refs


@pytest.mark.parametrize("name", ["fused", "lstm, both ways"])
def test_gates_train(name: str) -> None:
    model, inputs = captured(name)
    gated = insert_gates(model, inputs)
    with torch.no_grad():
        assert_close(gated(*inputs), model(*inputs), 2e-6)
    gated.train()(*inputs).square().sum().backward()
    assert all(gate.logit.grad is not None and gate.logit.grad.abs().sum() > 0 for _, gate in gated.gates.items())


def blindly(c: Corner, plan: Plan, *, mended: bool = True) -> Tensor:
    """The slim network without the check of its plan."""
    slim = clone(c.dense)
    keeps = [np.isin(np.arange(g.size), KEPT[g.name]) if g.name in KEPT else np.ones(g.size, bool) for g in c.analysis.groups]  # noqa: E501 # fmt: skip
    scale = [(n, n.kwargs) for n in slim.graph.nodes if "scaled_dot_product" in str(n.target)]
    mend_literals(slim, c.analysis, keeps)
    for node, before in scale if not mended else ():
        node.kwargs = before
    slice_tensors(slim, plan)
    slim.recompile()
    with torch.no_grad():
        return slim(*c.inputs)


KEPT = {"attention.q": [0, 2], "attention.q#2": [1, 3], "inner": [0, 2, 3, 5]}


def closed_and_plan(c: Corner) -> tuple[Tensor, Plan]:
    kept = {g.name: KEPT[g.name] for g in c.analysis.groups if g.name in KEPT}
    with torch.no_grad():
        closed = bake(c.dense, c.analysis, place_gates(c.dense, c.analysis), keep_masks(c.analysis, kept))
        return closed(*c.inputs), make_plan(c.analysis, kept)


def changed(plan: Plan, param: str, keep: tuple[int, ...]) -> Plan:
    assert any(
        (s.param, s.axis) == (param, 0) and len(s.keep) == len(keep) != s.size and s.keep != keep for s in plan.slices
    )
    swap: list[Slice] = [
        dataclasses.replace(s, keep=keep) if (s.param, s.axis) == (param, 0) else s for s in plan.slices
    ]
    return dataclasses.replace(plan, slices=tuple(swap))


def test_a_scale_of_the_cut_head() -> None:
    c = corner("sdpa", True)
    closed, plan = closed_and_plan(c)
    assert_close(blindly(c, plan), closed)
    assert relative_error(blindly(c, plan, mended=False), closed) > 1e-3


def test_other_rows_of_one_gate_or_of_keys() -> None:
    gates = [6 * gate + unit for gate in range(4) for unit in KEPT["inner"]]
    heads = [4 * head + d for head in KEPT["attention.q"] for d in range(4)]
    for name, param, good, bad in (
        ("lstm", "inner.weight_hh_l0", gates, [*gates[:12], 18, 19, 20, 21]),
        ("sdpa", "attention.k.weight", heads, [*range(8)]),
    ):
        c = corner(name)
        closed, plan = closed_and_plan(c)
        assert next(s.keep for s in plan.slices if (s.param, s.axis) == (param, 0)) == tuple(good)
        assert_close(blindly(c, plan), closed)
        wrong = changed(plan, param, tuple(bad))
        assert relative_error(blindly(c, wrong), closed) > 1e-3
        for rewrite in (lambda p, c=c: rewrite_torch(c.dense, p, c.inputs), lambda p, c=c: rewrite_onnx(c.exported, p)):
            with pytest.raises(SluiceError, match="the plan does not fit this graph"):
                rewrite(wrong)


def test_heads_closed_by_q_and_k_alone() -> None:
    """Scores of zero are uniform attention, not none."""
    c = corner("sdpa")
    closed, _ = closed_and_plan(c)
    rows = {(f"attention.{x}.{leaf}", 0) for x in "qk" for leaf in ("weight", "bias")}
    placement = place_gates(c.dense, c.analysis)
    wrong = dataclasses.replace(placement, refs=(placement.refs - {("attention.proj.weight", 1)}) | rows)
    keeps = keep_masks(c.analysis, {"attention.q": KEPT["attention.q"]})
    with torch.no_grad():
        assert relative_error(bake(c.dense, c.analysis, wrong, keeps)(*c.inputs), closed) > 1e-3


def test_a_table_that_is_not_cut() -> None:
    c = corner("window")
    plan = make_plan(c.analysis, {"qkv": [0, 2]})
    left = dataclasses.replace(plan, slices=tuple(s for s in plan.slices if s.param != "table"))
    assert len(left.slices) == len(plan.slices) - 1
    for rewrite in (lambda p: rewrite_torch(c.dense, p, c.inputs), lambda p: rewrite_onnx(c.exported, p)):
        with pytest.raises(SluiceError, match="the plan does not fit this graph at 'table' axis 1"):
            rewrite(left)
