"""The table of operators, swept: between two layers and in a residual branch, as torch and as ONNX.

The cases are those of the ATen table (`tests.passes.graph.test_coupling`). A network holds a dozen of them, since an
export costs more than what is in it. Of every case:

1. Both readers find the same groups, the same frozen layers, the same residual blocks and the same chains.
2. Under hard masks the gated network, the closed one and the one that is cut compute the same.
3. The square commutes: cut and then exported is exported and then cut.
4. What closes a residual block does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import close_gates, insert_gates
from sluice.passes.graph import aten, onnx_axes
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.blocks import Block, find_blocks
from sluice.passes.graph.capture import capture
from sluice.passes.graph.chains import Chain
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.chains_torch import chains_torch
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.operators import ATEN, ROWS
from sluice.passes.graph.view_onnx import view_onnx
from sluice.passes.graph.view_torch import view_torch
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import random_kept
from tests.passes.graph.test_coupling import CASES, Between, Case

DOZEN = 12
# Cases of which no such network can be made, and why.
APART = {
    "rrelu": "torch.onnx does not know it",
    "adaptive_avg_pool3d": "torch.onnx does not know it",
    "adaptive_max_pool1d": "torch.onnx does not know it",
    "adaptive_max_pool2d": "torch.onnx does not know it",
    "adaptive_max_pool3d": "torch.onnx does not know it",
    "view as another type": "torch.onnx does not know it",
    "squeeze the channels": "torch leaves an axis of several entries alone, the exported Squeeze is not well typed",
    "expand_as another": "the export leaves out a layer of which only the shape is read",
}
_STEPS = "several of them share what the exporter writes for a step; tests/sequences.py has each of them alone"
APART |= dict.fromkeys(("rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _STEPS)
# Cases that the two readers see differently, and why.
_FOLDED = "the export folds a value of fixed size into a constant, which is a tensor like any other there"
_GATHER = "it is exported as a Gather by positions that the graph computes"
_MORE = "what it is exported as shows that zero stays zero"
DIFFERENT = {
    "ones_like": "the export leaves out layers that nothing depends on",
    "lerp": _MORE,
    "addcmul": _MORE,
    "addcdiv": _MORE,
    "index by a mask": _MORE,
    "zeros": _MORE,
    "empty": _MORE,
    "add a fixed value": _FOLDED,
    "reshape_as a fixed value": _FOLDED,
    "adaptive_avg_pool1d": _GATHER,
    "adaptive_avg_pool2d": _GATHER,
    "upsample nearest-exact": _GATHER,
}
# Rows that neither front end has a rule for: what flows into them stays whole.
WITHOUT_RULE = ("view.dtype",)


class Residual(nn.Module):
    """``after(y + f(second(y)))``; where f changes the shape, the shortcut goes through it as well."""

    def __init__(self, case: Case, function: Between, shortcut: Between) -> None:
        super().__init__()
        self.before, self.after, self.branch, self.shortcut = case.before(), case.after(), function, shortcut
        weight = self.before.weight
        assert isinstance(weight, Tensor)
        args = (weight.shape[0], weight.shape[0]) if weight.ndim == 2 else (weight.shape[0], weight.shape[0], 1)
        self.second, self.dropped = type(self.before)(*args), False
        y = self.before(torch.randn(3, *case.shape))
        self.same = self.branch(y.clone()).shape == y.shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if not self.same:
            return self.after(self.branch(self.second(y)) + self.shortcut(y))
        return self.after(y if self.dropped else y + self.branch(self.second(y)))


class Side(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()

        def function(before: nn.Module, after: nn.Module) -> Between:
            return Between(before, case.function, after, copy.deepcopy(case.extra))

        self.plain = function(case.before(), case.after())
        self.residual = Residual(case, *(function(nn.Identity(), nn.Identity()) for _ in range(2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(x), self.residual(x)


class Many(nn.Module):
    """Cases side by side; one input for every shape that they take."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.sides = nn.ModuleList(Side(case) for case in cases)
        shapes = [case.shape for case in cases]
        self.shapes = list(dict.fromkeys(shapes))
        self.reads = [self.shapes.index(shape) for shape in shapes]

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [out for side, k in zip(self.sides, self.reads, strict=True) for out in side(xs[k])]


@dataclass(frozen=True)
class Network:
    cases: tuple[Case, ...]
    model: Many
    inputs: tuple[Tensor, ...]
    dense: fx.GraphModule

    def name(self, index: int) -> str:
        return f"{self.cases[index // 2].name}, {'residual' if index % 2 else 'plain'}"


def network(cases: Sequence[Case]) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Many(cases)
        inputs = tuple(torch.randn(3, *shape) for shape in model.shapes)
    model = enliven(model.eval(), 0, inputs)
    return Network(tuple(cases), model, inputs, capture(model, inputs))


SWEPT = [case for case in CASES if case.name not in APART]
DOZENS = [SWEPT[start : start + DOZEN] for start in range(0, len(SWEPT), DOZEN)]
IDS = [f"{dozen[0].name} .. {dozen[-1].name}" for dozen in DOZENS]


@functools.cache
def swept(index: int) -> tuple[Network, onnx.ModelProto]:
    found = network(DOZENS[index])
    return found, to_onnx(found.dense, found.inputs)


def reading(analysis: Analysis, blocks: Sequence[Block], chains: Sequence[Chain], side: str) -> dict[str, Any]:
    """What a reader says of one side."""
    return {
        "groups": {(g.name, g.size) for g in analysis.groups if g.name.startswith(side)},
        "frozen": {name for name in analysis.frozen if name.startswith(side)},
        "blocks": {(b.name, b.closing, b.layers) for b in blocks if b.name.startswith(side)},
        "chains": {tuple(layer.weight for layer in c.layers) for c in chains if c.layers[0].weight.startswith(side)},
    }


def differences(net: Network, exported: onnx.ModelProto) -> dict[str, dict[str, tuple[Any, Any]]]:
    """By case: what only torch and what only ONNX says."""
    named = net.dense.state_dict()
    torch_says = analyze(net.dense, needed=False), find_blocks(view_torch(net.dense))[0], chains_torch(net.dense)
    onnx_says = analyze_onnx(exported), find_blocks(view_onnx(exported, named))[0], chains_onnx(exported)
    found = {}
    for index, case in enumerate(net.cases):
        left, right = (reading(*says, f"sides.{index}.") for says in (torch_says, onnx_says))
        if left != right:
            found[case.name] = {k: (left[k] - right[k], right[k] - left[k]) for k in left if left[k] != right[k]}
    return found


def run(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    return [torch.from_numpy(out) for out in OrtRunner().build(model).run(feeds).values()]


@torch.no_grad()
def check_cuts(net: Network, exported: onnx.ModelProto) -> None:
    """Gated, closed, cut, exported and cut, cut and exported: all the same, output by output."""
    whole = [f"sides.{i}." for i, case in enumerate(net.cases) if case.name in DIFFERENT]
    gated = insert_gates(net.model, net.inputs)
    analysis = gated.meta["space"].analysis
    kept = {name: keep for name, keep in random_kept(analysis, 1).items() if not name.startswith(tuple(whole))}
    for group in analysis.groups:
        keep = torch.tensor(kept.get(group.name, range(group.size)))
        gated.gates[group.name].set_decision(torch.isin(torch.arange(group.size), keep))
    expected = gated(*net.inputs)
    closed, plan = close_gates(gated, kept), make_plan(analysis, kept)
    slim = rewrite_torch(net.dense, plan, net.inputs)
    ways = {
        "closed": closed(*net.inputs),
        "cut": slim(*net.inputs),
        "exported, then cut": run(rewrite_onnx(exported, plan), net.inputs),
        "cut, then exported": run(to_onnx(slim, net.inputs), net.inputs),
    }
    for way, outputs in ways.items():
        for index, (out, want) in enumerate(zip(outputs, expected, strict=True)):
            assert_close(out, want, what=f"{net.name(index)}: {way}")


@torch.no_grad()
def check_closing(net: Network) -> None:
    """Without the tensors that close it, a branch adds nothing."""
    closed, skipping = copy.deepcopy(net.model), copy.deepcopy(net.model)
    state = closed.state_dict()
    done = set()
    for block in find_blocks(view_torch(net.dense))[0]:
        side = int(block.name.split(".")[1])
        if block.closing is not None and net.model.sides[side].residual.same:  # type: ignore[union-attr]
            skipping.sides[side].residual.dropped = True  # type: ignore[union-attr,assignment]
            done.add(2 * side + 1)
            for name in block.closing:
                state[name].zero_()
    for index, (out, want) in enumerate(zip(closed(*net.inputs), skipping(*net.inputs), strict=True)):
        if index in done:
            assert_close(out, want, what=f"{net.name(index)}: its block closed")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(DOZENS)), ids=IDS)
def test_both_readers_agree(index: int) -> None:
    net, exported = swept(index)
    found = differences(net, exported)
    assert found.keys() == DIFFERENT.keys() & {case.name for case in net.cases}, found


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(DOZENS)), ids=IDS)
def test_cuts_are_exact(index: int) -> None:
    net, exported = swept(index)
    check_cuts(net, exported)
    check_closing(net)


QUICK = {
    *("hardswish", "silu", "elu", "softplus", "hardshrink", "softshrink", "threshold", "square", "clamp"),
    *("roll", "flip", "flip beside"),
}


def test_where_the_readers_once_disagreed() -> None:
    net = network([case for case in CASES if case.name in QUICK])
    exported = to_onnx(net.dense, net.inputs)
    assert len(net.cases) == len(QUICK) and not differences(net, exported)
    check_cuts(net, exported)
    check_closing(net)


def test_the_sweep_goes_over_the_table() -> None:
    """`test_coupling` and `test_onnx_axes` hold that every rule has a case; here, that every row has a rule."""
    names = {case.name for case in CASES}
    assert names >= {*APART, *DIFFERENT}
    without = [
        r for r in ROWS if not (set(r.aten.split()) & aten.RULES.keys() or set(r.onnx.split()) & onnx_axes.RULES.keys())
    ]
    assert [(r.aten or r.onnx).split()[0] for r in without] == list(WITHOUT_RULE)


def test_an_operator_has_one_row() -> None:
    for names in ([n for r in ROWS for n in r.aten.split()], [n for r in ROWS for n in r.onnx.split()]):
        assert len(set(names)) == len(names)


def test_a_wrong_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network([case for case in CASES if case.name in ("relu", "sigmoid")])
    exported = to_onnx(net.dense, net.inputs)
    check_cuts(net, exported)
    monkeypatch.setitem(ATEN, "sigmoid", replace(ATEN["sigmoid"], zero="zero"))
    with pytest.raises(AssertionError, match="sigmoid, plain: cut"):
        check_cuts(net, exported)
    with pytest.raises(AssertionError, match="sigmoid, residual: its block closed"):
        check_closing(net)
    assert "blocks" in differences(net, exported)["sigmoid"]
