"""Faults put in on purpose, each of them a wrong plan or a wrong place for a gate, must be caught twice.

1. The rewriters refuse such a plan, and name a tensor of it.
2. Where that check is left out, the numbers give it away: every channel of these networks is alive.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

from sluice.core.errors import SluiceError
from sluice.core.plan import Plan, Slice
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import mend_literals, rewrite_torch, slice_tensors
from sluice.passes.gates.gating import bake
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis, keep_masks
from sluice.passes.graph.placement_torch import Placement, place_gates
from sluice.runtime.base.compare import assert_close, relative_error
from tests.networks import build

KEPT = {
    "plain": {"conv1": [0, 2, 3, 5], "conv2": [1, 3], "fc1": [0, 1, 4, 7]},
    "in_place": {"conv1": [0, 2, 3], "fc1": [0, 2, 5]},
    "crepe": {"conv": [0, 2, 3], "fc": [1, 2, 5]},
    "grouped": {"conv1": [0, 2], "grouped": [1, 2, 4], "conv2": [0, 2], "up": [0, 3]},
}


@dataclass(frozen=True)
class Prepared:
    dense: fx.GraphModule
    inputs: tuple[Tensor, ...]
    analysis: Analysis
    placement: Placement
    keeps: list[np.ndarray]
    plan: Plan
    closed: Tensor


@functools.cache
def prepared(name: str) -> Prepared:
    model, inputs = build(name)
    dense = capture(model, inputs)
    analysis = analyze(dense)
    kept = {k: v for k, v in KEPT[name].items() if k in {g.name for g in analysis.groups}}
    placement, keeps = place_gates(dense, analysis), keep_masks(analysis, kept)
    with torch.no_grad():
        closed = bake(dense, analysis, placement, keeps)(*inputs)
    return Prepared(dense, inputs, analysis, placement, keeps, make_plan(analysis, kept), closed)


@pytest.fixture(scope="module")
def dense_onnx() -> Callable[[str], onnx.ModelProto]:
    return functools.cache(lambda name: to_onnx(prepared(name).dense, prepared(name).inputs))


def shifted(cut: Slice) -> Slice:
    """One further, round the end."""
    return dataclasses.replace(cut, keep=tuple(sorted((i + 1) % cut.size for i in cut.keep)))


def reversed_(cut: Slice) -> Slice:
    return dataclasses.replace(cut, keep=tuple(sorted(cut.size - 1 - i for i in cut.keep)))


@dataclass(frozen=True)
class Fault:
    network: str
    param: str
    axis: int
    change: Callable[[Slice], Slice]

    def plan(self) -> Plan:
        good = prepared(self.network).plan
        bad = tuple(self.change(s) if (s.param, s.axis) == (self.param, self.axis) else s for s in good.slices)
        assert bad != good.slices
        return dataclasses.replace(good, slices=bad)


FAULTS = {
    "consumer shifted by one channel": Fault("plain", "conv2.weight", 1, shifted),
    "producer shifted by one channel": Fault("plain", "conv1.weight", 0, shifted),
    "flatten to linear shifted by one": Fault("plain", "fc1.weight", 1, shifted),
    "spaced columns shifted by one": Fault("crepe", "fc.weight", 1, shifted),
    "running mean at the wrong channels": Fault("plain", "bn1.running_mean", 0, shifted),
    "running variance at the wrong channels": Fault("plain", "bn2.running_var", 0, shifted),
    "norm's shift at the wrong channels": Fault("plain", "bn2.bias", 0, shifted),
    "bias at the wrong channels": Fault("plain", "conv2.bias", 0, shifted),
    "last bias at the wrong channels": Fault("plain", "fc1.bias", 0, shifted),
    "tied axes keep different indices": Fault("in_place", "twice.weight", 0, reversed_),
    "other axis of a tied weight": Fault("in_place", "twice.weight", 1, shifted),
    "grouped convolution": Fault("grouped", "grouped.weight", 1, shifted),
    "depthwise convolution": Fault("grouped", "dw.weight", 0, shifted),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@torch.no_grad()
def test_numbers_give_a_wrong_plan_away(fault: Fault) -> None:
    p = prepared(fault.network)

    def cut_blindly(plan: Plan) -> Tensor:
        slim = clone(p.dense)
        mend_literals(slim, p.analysis, p.keeps)
        slice_tensors(slim, plan)
        slim.recompile()
        return slim(*p.inputs)

    assert_close(cut_blindly(p.plan), p.closed)
    assert relative_error(cut_blindly(fault.plan()), p.closed) > 1e-3


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_rewriters_refuse_a_wrong_plan(fault: Fault, dense_onnx: Callable[[str], onnx.ModelProto]) -> None:
    p = prepared(fault.network)
    tied = {s.param for s in p.plan.slices}
    for rewrite in (
        lambda plan: rewrite_torch(p.dense, plan, p.inputs),
        lambda plan: rewrite_onnx(dense_onnx(fault.network), plan),
    ):
        rewrite(p.plan)
        with pytest.raises(SluiceError) as error:
            rewrite(fault.plan())
        assert any(repr(name) in str(error.value) for name in tied) or "leaves nothing of group" in str(error.value)


@pytest.mark.parametrize("network", ["plain", "in_place", "crepe"])
def test_no_tied_axis_may_be_left_out(network: str, dense_onnx: Callable[[str], onnx.ModelProto]) -> None:
    p = prepared(network)
    for left_out in p.plan.slices:
        rest = tuple(s for s in p.plan.slices if s != left_out)
        plan = dataclasses.replace(p.plan, slices=rest)
        with pytest.raises(SluiceError, match="the plan does not fit this graph"):
            rewrite_torch(p.dense, plan, p.inputs)
        with pytest.raises(SluiceError, match="the plan does not fit this graph"):
            rewrite_onnx(dense_onnx(network), plan)


def test_what_is_frozen_may_not_be_cut(dense_onnx: Callable[[str], onnx.ModelProto]) -> None:
    p = prepared("plain")
    plan = dataclasses.replace(
        p.plan, slices=(*p.plan.slices, Slice("fc2.weight", 0, 4, (0, 1)), Slice("fc2.bias", 0, 4, (0, 1)))
    )
    for rewrite in (lambda: rewrite_torch(p.dense, plan, p.inputs), lambda: rewrite_onnx(dense_onnx("plain"), plan)):
        with pytest.raises(
            SluiceError, match=r"'fc2\.(weight|bias)' axis 0: it keeps 2 of 4, the axes tied to it ask for all"
        ):
            rewrite()


def test_part_of_a_spaced_channel_may_not_be_cut() -> None:
    p = prepared("crepe")
    odd = Fault("crepe", "fc.weight", 1, lambda s: dataclasses.replace(s, keep=s.keep[1:])).plan()
    with pytest.raises(SluiceError, match=r"does not fit this graph"):
        rewrite_torch(p.dense, odd, p.inputs)


WRONG_GATES: dict[str, tuple[frozenset[tuple[str, int]], frozenset[tuple[str, int]]]] = {
    "shift left out": (frozenset({("bn1.bias", 0)}), frozenset()),
    "scale left out, shift kept": (frozenset({("bn2.bias", 0)}), frozenset()),
    "before the norm": (frozenset({("bn1.weight", 0), ("bn1.bias", 0)}), frozenset({("conv1.weight", 0)})),
    "bias of the linear left out": (frozenset({("fc1.bias", 0)}), frozenset()),
    "on the other axis of the consumer": (
        frozenset({("bn1.weight", 0), ("bn1.bias", 0)}), frozenset({("conv2.weight", 0)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_GATES.values(), ids=WRONG_GATES.keys())
@torch.no_grad()
def test_a_gate_at_the_wrong_place(case: tuple[frozenset[tuple[str, int]], frozenset[tuple[str, int]]]) -> None:
    p = prepared("plain")
    removed, added = case
    assert removed <= p.placement.refs
    wrong = dataclasses.replace(p.placement, refs=(p.placement.refs - removed) | added)
    slim = rewrite_torch(p.dense, p.plan, p.inputs)(*p.inputs)
    assert_close(slim, p.closed)
    assert relative_error(slim, bake(p.dense, p.analysis, wrong, p.keeps)(*p.inputs)) > 1e-3


@torch.no_grad()
def test_statistics_over_removed_channels() -> None:
    """A layer or group norm that still counts the removed channels."""
    model, inputs = build("norms")
    dense = capture(model, inputs)
    analysis = analyze(dense)
    placement = place_gates(dense, analysis)
    keeps = keep_masks(analysis, {"conv1": [0, 1, 2, 6, 7], "conv2": [0, 3], "conv3": [2, 3, 4, 7]})
    right = bake(dense, analysis, placement, keeps)(*inputs)
    for name in placement.norms:
        rest = tuple(n for n in placement.norms if n != name)
        assert (
            relative_error(bake(dense, analysis, dataclasses.replace(placement, norms=rest), keeps)(*inputs), right)
            > 1e-3
        )
