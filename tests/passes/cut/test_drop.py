"""Dropping a branch is exact: torch, ONNX and the closed network compute the same, for every subset of blocks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice import models
from sluice.core.errors import SluiceError
from sluice.core.plan import Drop
from sluice.passes.cut.drop_onnx import drop_onnx
from sluice.passes.cut.drop_torch import close_block, drop_torch
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.blocks import Block, find_blocks
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.graph.view_onnx import view_onnx
from sluice.passes.graph.view_torch import view_torch
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import build, random_kept
from tests.passes.graph.test_blocks import CASES, LONG, REFERENCE, case, reference

Prepared = tuple[nn.Module, fx.GraphModule, tuple[Tensor, ...], onnx.ModelProto, tuple[Block, ...]]
DROPPABLE = (*REFERENCE, *(n for n, (_, blocks, _) in CASES.items() if blocks), "tokens", "squeeze_excite")
SEVERAL = (*REFERENCE, *(n for n, (_, blocks, _) in CASES.items() if len(blocks) > 1), "tokens")  # to choose from


def _slow(*pairs: tuple[str, int]) -> list[Any]:
    """Long networks are marked: nothing is in them that the others lack."""
    return [pytest.param(*pair, marks=pytest.mark.slow if pair[0] in LONG else ()) for pair in pairs]


@functools.cache
def prepared(name: str) -> Prepared:
    model, inputs = reference(name) if name in REFERENCE else case(name) if name in CASES else build(name)
    gm = capture(model, inputs)
    return model, gm, inputs, to_onnx(gm, inputs), find_blocks(view_torch(gm))[0]


@functools.cache
def analysis_of(name: str) -> Analysis:
    return analyze(prepared(name)[1])


def onnx_output(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> np.ndarray:
    feed = {info.name: x.numpy() for info, x in zip(model.graph.input, inputs, strict=True)}
    return next(iter(OrtRunner().build(model).run(feed).values()))


def subset(blocks: tuple[Block, ...], seed: int) -> tuple[Block, ...]:
    """Seed 0: all; otherwise random; never two of which one lies in the other."""
    rng = np.random.default_rng(seed)
    chosen: list[Block] = []
    for index in rng.permutation(len(blocks)) if seed else range(len(blocks)):
        block = blocks[index]
        if (not seed or rng.random() < 0.6) and not any(set(block.params) & set(b.params) for b in chosen):
            chosen.append(block)
    return tuple(chosen) or blocks[-1:]


@pytest.mark.parametrize(("name", "seed"), _slow(*((n, 0) for n in DROPPABLE), *((n, 1) for n in SEVERAL)))
@torch.no_grad()
def test_dropping_is_exact(name: str, seed: int) -> None:
    model, gm, inputs, dense, blocks = prepared(name)
    chosen = subset(blocks, seed)
    drops = [block.drop() for block in chosen]
    slim, closed, state = clone(gm), clone(gm), {k: v.clone() for k, v in model.state_dict().items()}
    drop_torch(slim, drops)
    out = slim(*inputs)
    if all(block.closing is not None for block in chosen):
        for block in chosen:
            close_block(closed, block)
            close_block(model, block)
        assert_close(out, closed(*inputs), 1e-6, "closed, captured")
        assert_close(out, model(*inputs), 1e-6, "closed, as it was written")
        model.load_state_dict(state)
    assert relative_error(out, gm(*inputs)) > 1e-3, "the branches did something"
    before = dense.SerializeToString()
    cut = drop_onnx(dense, drops)
    assert dense.SerializeToString() == before
    assert_close(onnx_output(cut, inputs), out, what="ONNX")
    assert_close(onnx_output(finalize(cut), inputs), out, what="finalized")
    gone = {p for d in drops for p in d.params}
    left = {n for n in state if n not in gone and "tracked" not in n}
    assert {n for n in slim.state_dict() if "tracked" not in n} == left
    assert not {i.name for i in cut.graph.initializer} & gone
    again = to_onnx(capture(slim, inputs), inputs)
    assert sorted(n.op_type for n in again.graph.node) == sorted(n.op_type for n in cut.graph.node)
    assert {i.name for i in again.graph.initializer if i.name in state} == {
        i.name for i in cut.graph.initializer if i.name in state
    }


@pytest.mark.parametrize(
    ("name", "seed"),
    _slow(*((n, seed) for n in (*REFERENCE, "nested", "projection", "tokens", "squeeze_excite") for seed in (1, 2))),
)
@torch.no_grad()
def test_dropping_after_slicing(name: str, seed: int) -> None:
    _, gm, inputs, dense, blocks = prepared(name)
    plan = make_plan(analysis_of(name), random_kept(analysis_of(name), seed))
    chosen = subset(blocks, seed)
    drops = [block.drop() for block in chosen]
    slim = rewrite_torch(gm, plan, inputs)
    closed = clone(slim)
    for block in chosen:
        close_block(closed, block)
    drop_torch(slim, drops)
    out = slim(*inputs)
    assert_close(out, closed(*inputs), 1e-6, "closed")
    cut = drop_onnx(rewrite_onnx(dense, plan), drops, named=plan.fingerprint)
    assert_close(onnx_output(cut, inputs), out, what="ONNX")
    sizes = {i.name: tuple(i.dims) for i in cut.graph.initializer}
    assert all(sizes.get(n, tuple(t.shape)) == tuple(t.shape) for n, t in slim.state_dict().items())
    more = tuple(torch.cat([x, x]) for x in inputs)
    assert_close(slim(*more), torch.cat([out, out]))


def test_what_is_left_of_resnet() -> None:
    """No module, no counter and no second ReLU stays behind; what is left trains."""
    _, gm, inputs, dense, blocks = prepared("resnet20")
    slim = clone(gm)
    names = ("stages.0.0", "stages.0.1", "stages.1.0")
    drops = [b.drop() for b in blocks if b.name in names]
    drop_torch(slim, drops)
    assert not [n for n in slim.state_dict() if n.startswith(("stages.0.0", "stages.0.1"))]
    assert {n.split(".")[3] for n in slim.state_dict() if n.startswith("stages.1.0.")} == {"shortcut"}
    assert not [n for n, _ in slim.named_modules() if n.startswith(("stages.0.0", "stages.1.0.bn1"))]
    # Both activations of an identity block go; of a block with a projection, the one behind the sum has work to do.
    removed = 2 + 2 + 1
    assert _count(slim, "relu") == _count(gm, "relu") - removed
    assert _count(slim, "add") == _count(gm, "add") - 3
    cut = drop_onnx(dense, drops)
    assert [n.op_type for n in cut.graph.node].count("Relu") == _count(slim, "relu")
    made = {out for node in cut.graph.node for out in node.output}
    assert {info.name for info in cut.graph.value_info} <= made | {i.name for i in cut.graph.initializer}
    slim.train()(*inputs).sum().backward()
    assert all(p.grad is not None for p in slim.parameters())
    assert find_blocks(view_torch(slim))[0] == tuple(b for b in find_blocks(view_torch(slim))[0] if b.name not in names)
    assert len(find_blocks(view_onnx(cut))[0]) == 6


def _count(gm: fx.GraphModule, name: str) -> int:
    return sum(f"aten.{name}" in str(n.target) for n in gm.graph.nodes)


@torch.no_grad()
def test_limits_behind_a_dropped_branch() -> None:
    """An activation goes only if the one before it has limited to the same range or a narrower one."""

    class Limits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 6)
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(2 * self.stem(x))
            x = F.hardtanh(x + self.a(x), 0.0, 1.0)  # narrower than before: stays
            x = F.relu6(x + self.b(x))  # wider: goes
            return F.relu(x + self.c(x), inplace=True)  # wider: goes

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(4, 5)
        gm = capture(models.enliven(Limits(), 0, (x,)), x)
    blocks, _ = find_blocks(view_torch(gm))
    closed, slim, dense = clone(gm), clone(gm), to_onnx(gm, x)
    for block in blocks:
        close_block(closed, block)
    drops = [block.drop() for block in blocks]
    drop_torch(slim, drops)
    cut = drop_onnx(dense, drops)
    assert_close(slim(x), closed(x), 1e-6)
    assert_close(onnx_output(cut, (x,)), closed(x))
    assert [n.op_type for n in cut.graph.node if n.op_type in ("Relu", "Clip")] == ["Relu", "Clip"]
    assert sum(_count(slim, n) for n in ("relu", "hardtanh")) == 2


@torch.no_grad()
def test_a_branch_around_the_whole_network() -> None:
    """The sum is the output and its shortcut the input: the names of both stay."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 5, 3, padding=1), nn.Conv1d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.gelu(self.a(x)))

    x = torch.randn(2, 2, 7)
    gm = capture(Whole(), x)
    dense = to_onnx(gm, x)
    (block,), _ = find_blocks(view_torch(gm))
    drop_torch(gm, [block.drop()])
    cut = drop_onnx(dense, [block.drop()])
    assert torch.equal(gm(x), x) and not gm.state_dict()
    assert cut.graph.output[0].name == dense.graph.output[0].name and not cut.graph.initializer
    np.testing.assert_array_equal(onnx_output(cut, (x,)), x.numpy())


def test_half_a_drop_and_foreign_drops_are_refused() -> None:
    _, gm, _, dense, blocks = prepared("resnet20")
    code, before = gm.code, set(gm.state_dict())
    bad = [
        Drop("half", blocks[0].params[:4]),
        Drop("two", tuple(sorted(blocks[0].params + blocks[1].params))),
        Drop("head", ("fc.bias", "fc.weight")),
        Drop("none", ("elsewhere.weight",)),
    ]
    for drop in bad:
        with pytest.raises(SluiceError, match=rf"drops '{drop.name}' with .* no residual block of this graph"):
            drop_torch(gm, [blocks[2].drop(), drop])
        with pytest.raises(SluiceError, match=rf"drops '{drop.name}' with .* no residual block of this graph"):
            drop_onnx(dense, [blocks[2].drop(), drop])
    assert gm.code == code and set(gm.state_dict()) == before


def test_no_drop_changes_nothing() -> None:
    _, gm, _, dense, _ = prepared("resnet20")
    slim = clone(gm)
    drop_torch(slim, [])
    assert slim.code == gm.code and list(slim.state_dict()) == list(gm.state_dict())
    assert drop_onnx(dense, []) == dense


def test_what_cannot_be_closed() -> None:
    model, _, _, _, blocks = prepared("sigmoid")
    with pytest.raises(SluiceError, match=r"block 'middle\.a' cannot be closed: sigmoid before the addition"):
        close_block(model, blocks[0])
    with pytest.raises(SluiceError, match=r"ends in 'stages\.0\.0\.bn2\.bias', which the module lacks"):
        close_block(model, prepared("resnet20")[4][0])


@pytest.mark.parametrize("fault", ["half closed", "wrong norm", "neighbour"])
@torch.no_grad()
def test_faults_are_caught(fault: str) -> None:
    """A closing at the wrong place differs from the dropped network by far more than rounding."""
    _, gm, inputs, _, blocks = prepared("resnet20")
    slim, closed = clone(gm), clone(gm)
    drop_torch(slim, [blocks[1].drop()])
    close_block(closed, blocks[1])
    assert_close(slim(*inputs), closed(*inputs), 1e-6)
    wrong = clone(gm)
    state = wrong.state_dict()
    if fault == "half closed":
        state[f"{blocks[1].name}.bn2.weight"].zero_()
    elif fault == "wrong norm":
        for leaf in ("weight", "bias"):
            state[f"{blocks[1].name}.bn1.{leaf}"].zero_()
    else:
        close_block(wrong, blocks[2])
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(slim(*inputs), wrong(*inputs), 1e-3)


def test_tensors_that_the_file_shares_or_lacks() -> None:
    """Equal tensors kept once, norms folded into convolutions: the rest of the names still say which block is meant."""
    _, gm, inputs, dense, blocks = prepared("resnet20")
    drop = blocks[1].drop()
    slim = clone(gm)
    drop_torch(slim, [drop])
    shared = onnx.ModelProto()
    shared.CopyFrom(dense)
    values = {i.name: i for i in shared.graph.initializer}
    mean, other = (f"{blocks[i].name}.bn1.running_mean" for i in (1, 0))
    values[mean].raw_data = values[other].raw_data
    for node in shared.graph.node:
        node.input[:] = [other if name == mean else name for name in node.input]
    shared.graph.initializer.remove(values[mean])
    cut = drop_onnx(shared, [drop])
    names = {i.name for i in cut.graph.initializer}
    assert other in names and not names & set(drop.params)
    folded = drop_onnx(finalize(dense), [drop], named=gm.state_dict())
    with torch.no_grad():
        assert_close(onnx_output(cut, inputs), slim(*inputs))
        assert_close(onnx_output(folded, inputs), slim(*inputs))


def test_control_flow_reads_the_sum() -> None:
    """A value that a body reads keeps its name."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    then = helper.make_graph([helper.make_node("Neg", ["z"], ["t"])], "then", [], [y_like("t")])
    other = helper.make_graph([helper.make_node("Abs", ["z"], ["e"])], "else", [], [y_like("e")])
    nodes = [
        helper.make_node("MatMul", ["x", "m.weight"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["z"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((3, 3)).astype(np.float32), "m.weight"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (block,), _ = find_blocks(view_onnx(model))
    cut = drop_onnx(model, [block.drop()])
    value = torch.randn(2, 3)
    assert_close(onnx_output(cut, (value,)), -value)


def y_like(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])
