"""The square with all four edits: torch and ONNX, merged before and after, and the closed network are one function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.plan import Drop, Edits, Factorize, Plan
from sluice.models import enliven
from sluice.models.mobilenet import InvertedResidual
from sluice.models.resnet1d import Block1d
from sluice.passes.cut import drop_torch as drop_module
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import merge_runs, rewrite_torch
from sluice.passes.gates.gating import Gated, insert_gates, strip_gates
from sluice.passes.graph.blocks import Block, dropped_values, find_blocks, match_drops
from sluice.passes.graph.capture import capture
from sluice.passes.graph.view import GraphView
from sluice.passes.graph.view_torch import view_torch
from sluice.pipeline.close import close
from sluice.pipeline.problem import Solution
from sluice.profiler.profile import profile_onnx
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from sluice.solver.decide import Choice
from sluice.solver.options import METHODS, chosen_edits
from sluice.solver.random_configurations import random_configuration
from tests.device import FakeRunner, profile_on, staircase
from tests.networks import mixed
from tests.passes.cut.test_square import skeleton

TOL = 1e-5
PLANS = 10


class Body(nn.Module):
    """A stem, then ``body``, then the mean and a linear layer."""

    def __init__(self, stem: nn.Module, body: nn.Module, last: int) -> None:
        super().__init__()
        self.stem, self.body, self.fc = stem, body, nn.Linear(last, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(F.relu(self.stem(x))).flatten(2).mean(-1))


def bottlenecks() -> nn.Module:
    blocks = [InvertedResidual(11, 17, 2, 2), InvertedResidual(17, 17, 1, 2), InvertedResidual(17, 17, 1, 3)]
    return Body(nn.Conv2d(3, 11, 3, padding=1), nn.Sequential(*blocks), 17)


def series() -> nn.Module:
    blocks = [Block1d(13, 13, 1), Block1d(13, 19, 2), Block1d(19, 19, 1)]
    return Body(nn.Conv1d(3, 13, 5), nn.Sequential(*blocks), 19)


def plain() -> nn.Module:
    layers = [
        nn.Conv2d(11, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(13, 17, 3, padding=1), nn.GELU(), nn.Conv2d(17, 15, (3, 1), stride=2), nn.BatchNorm2d(15),
    ]  # fmt: skip
    return Body(nn.Conv2d(3, 11, 3, padding=1), nn.Sequential(*layers), 15)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bottlenecks": (bottlenecks, (3, 9, 7)),
    "series": (series, (3, 29)),
    "plain": (plain, (3, 13, 11)),
}


@dataclass(frozen=True)
class Corner:
    model: nn.Module
    inputs: tuple[Tensor, ...]
    gated: Gated
    exported: onnx.ModelProto
    profile: Profile


@functools.cache
def corner(name: str) -> Corner:
    if name == "mixed":
        model, inputs = mixed()
    else:
        factory, shape = NETWORKS[name]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model, inputs = factory(), (torch.randn(2, *shape),)
        model = enliven(model, 0, inputs)
    exported = to_onnx(model, inputs)
    with pytest.MonkeyPatch.context() as patch:
        profile_on(lambda target, threads=1: FakeRunner(staircase(8)), patch)
        profile = profile_onnx(exported, deployment=Deployment(batch=2), methods=METHODS, progress=False)
    captured = capture(model, inputs)
    return Corner(captured, inputs, insert_gates(captured, inputs), exported, profile)


def answers(c: Corner) -> list[Solution]:
    """Random configurations with any width and any rank, and any channels kept."""
    rng, groups = np.random.default_rng(5), c.gated.meta["space"].analysis.groups
    latency = c.profile.latency
    free = {g.name: tuple(range(1, g.size + 1)) for g in groups}
    free |= {o.rank: tuple(range(1, 1 + latency.levels[o.rank][-1])) for o in c.profile.options.ranks}
    model = replace(latency, levels={**latency.levels, **free})
    found = []
    for _ in range(PLANS):
        widths = random_configuration(model, rng)
        kept = {g.name: tuple(sorted(rng.choice(g.size, widths[g.name], replace=False).tolist())) for g in groups}
        plan = make_plan(c.gated.meta["space"].analysis, kept, (), chosen_edits(c.profile.options, widths))
        found.append(Solution(Choice(widths, 0.0, 0.0, 1.0, 0.0, 0.0), kept, plan))
    return found


def run(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> np.ndarray:
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    return next(iter(OrtRunner().build(model).run(feeds).values()))


def check(c: Corner, answer: Solution, second_export: bool) -> None:
    plan = answer.plan
    apart = rewrite_torch(c.model, plan, c.inputs, merged=False).eval()
    merged = rewrite_torch(c.model, plan, c.inputs).eval()
    cut = rewrite_onnx(c.exported, plan)
    with torch.no_grad():
        reference = close(c.gated, answer).eval()(*c.inputs)
        assert_close(apart(*c.inputs), reference, TOL, "rewrite_torch(merged=False)")
        assert_close(merged(*c.inputs), reference, TOL, "rewrite_torch(merged=True)")
        assert_close(merge_runs(apart, plan)(*c.inputs), reference, TOL, "merge_runs")
    assert_close(run(cut, c.inputs), reference, TOL, "rewrite_onnx")
    assert_close(run(finalize(cut), c.inputs), reference, TOL, "finalize(rewrite_onnx)")
    if second_export:
        other = finalize(to_onnx(merged, c.inputs))
        assert_close(run(other, c.inputs), reference, TOL, "export(rewrite_torch)")
        assert skeleton(finalize(cut)) == skeleton(other)


@pytest.mark.parametrize("name", ["mixed", *NETWORKS])
def test_the_square(name: str) -> None:
    c = corner(name)
    for index, answer in enumerate(answers(c)):
        check(c, answer, second_export=index < 2)


@pytest.mark.parametrize("name", ["mixed", "bottlenecks"])
def test_every_merged_run_with_cut_channels(name: str) -> None:
    """Layers that go may have carried masks."""
    c = corner(name)
    rng, analysis = np.random.default_rng(8), c.gated.meta["space"].analysis
    for merge in c.profile.options.merges.values():
        kept = {g.name: tuple(sorted(rng.choice(g.size, g.size // 2, replace=False).tolist())) for g in analysis.groups}
        plan = make_plan(analysis, kept, (), Edits(merges=(merge,)))
        with torch.no_grad():
            reference = close(c.gated, Solution(Choice({}, 0.0, 0.0, 1.0, 0.0, 0.0), kept, plan)).eval()(*c.inputs)
            apart = rewrite_torch(c.model, plan, c.inputs, merged=False).eval()
            assert_close(apart(*c.inputs), reference, TOL, merge.name)


def test_all_edits_are_among_them() -> None:
    plans = [answer.plan for name in ("mixed", "bottlenecks", "series") for answer in answers(corner(name))]
    for kind in ("slices", "factorizations", "drops", "merges"):
        assert sum(bool(getattr(plan, kind)) for plan in plans) >= 3, kind
    assert any(p.slices and p.factorizations and p.drops and p.merges for p in plans)
    assert any(m.runs != (m.layers,) for p in plans for m in p.merges)


def rank_less(plan: Plan) -> Plan:
    edits = [replace(e, rank=max(1, e.rank - 1)) for e in plan.factorizations]
    return replace(plan, factorizations=tuple(edits))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("factorizations", rank_less),
        ("drops", lambda plan: replace(plan, drops=plan.drops[1:])),
        ("merges", lambda plan: replace(plan, merges=plan.merges[1:])),
        ("slices", lambda plan: replace(plan, slices=())),
    ],
)
def test_a_fault_on_one_side_is_noticed(kind: str, fault: Callable[[Plan], Plan]) -> None:
    c = corner("mixed")
    answer = next(a for a in answers(c) if getattr(a.plan, kind) and fault(a.plan) != a.plan)
    with torch.no_grad():
        reference = close(c.gated, answer).eval()(*c.inputs)
        slim: fx.GraphModule = rewrite_torch(c.model, fault(answer.plan), c.inputs).eval()
        with pytest.raises(AssertionError):
            assert_close(slim(*c.inputs), reference, TOL)
    with pytest.raises(AssertionError):
        assert_close(run(rewrite_onnx(c.exported, fault(answer.plan)), c.inputs), reference, TOL)


def wrong_side(view: GraphView, drops: Sequence[Drop]) -> tuple[Block, ...]:
    """The branch stays and its shortcut goes."""
    blocks = []
    for block in match_drops(view, drops):
        (branch,) = set(view.nodes[view.producer[block.add]].inputs) - {block.shortcut_output}
        blocks.append(replace(block, shortcut_output=branch, own=()))
    return tuple(blocks)


def too_far(view: GraphView, blocks: Sequence[Block]) -> dict[str, str]:
    """Every activation behind the addition goes as well."""
    taken = dropped_values(view, blocks)
    for node in view.nodes:
        if node.bounds is not None and node.inputs[0] in taken:
            taken[node.outputs[0]] = taken[node.inputs[0]]
    return taken


@pytest.mark.parametrize(("step", "fault"), [("match_drops", wrong_side), ("dropped_values", too_far)])
def test_a_fault_in_the_rewriter_of_drops_is_noticed(
    step: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed network must not come from the code that it is there to check."""
    c = corner("mixed")
    (drop,) = [drop for drop in c.profile.options.drops.values() if drop.name == "block2"]
    plan = make_plan(c.gated.meta["space"].analysis, {}, (), Edits(drops=(drop,)))
    answer = Solution(Choice({}, 0.0, 0.0, 1.0, 0.0, 0.0), {}, plan)
    with torch.no_grad():
        reference = close(c.gated, answer).eval()(*c.inputs)
        assert_close(rewrite_torch(c.model, plan, c.inputs).eval()(*c.inputs), reference, TOL)
        monkeypatch.setattr(drop_module, step, fault)
        assert_close(close(c.gated, answer).eval()(*c.inputs), reference, 0.0, "closing is not touched by it")
        with pytest.raises(AssertionError):
            assert_close(rewrite_torch(c.model, plan, c.inputs).eval()(*c.inputs), reference, TOL)


class Ungated(nn.Module):
    """A branch that nothing of its own makes zero, and one that ends in its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.shut = nn.Conv2d(11, 11, 3, padding=1), nn.Conv2d(11, 11, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + torch.sigmoid(self.open(x)))
        return F.relu(x + self.shut(x))


def test_a_branch_that_no_tensor_closes_is_closed_by_cutting() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, inputs = Body(nn.Conv2d(3, 11, 3, padding=1), Ungated(), 11).eval(), (torch.randn(2, 3, 9, 7),)
    gated = insert_gates(model, inputs)
    blocks, _ = find_blocks(view_torch(strip_gates(gated)))
    assert [block.closing is None for block in blocks] == [True, False]
    for chosen in (blocks[:1], blocks[1:], blocks):
        plan = make_plan(gated.meta["space"].analysis, {}, (), Edits(drops=tuple(block.drop() for block in chosen)))
        closed = close(gated, Solution(Choice({}, 0.0, 0.0, 1.0, 0.0, 0.0), {}, plan)).eval()
        with torch.no_grad():
            assert_close(rewrite_torch(model, plan, inputs).eval()(*inputs), closed(*inputs), TOL)
        assert ("body.open.weight" in closed.state_dict()) == (blocks[0] not in chosen)
        assert "body.shut.weight" in closed.state_dict()


class Fixed(nn.Module):
    """Every width is that of the input and of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(7, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "edits",
    [
        Edits((Factorize("conv.weight", "kxk-1x1", 3), Factorize("last.weight", "kxk-1x1", 2))),
        Edits(drops=(Drop("conv", ("bn.bias", "bn.running_mean", "bn.running_var", "bn.weight", "conv.bias",
                                   "conv.weight")),)),
    ],
    ids=["ranks", "branch"],
)  # fmt: skip
def test_a_network_of_fixed_widths(edits: Edits) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inputs = (torch.randn(2, 7, 6, 5),)
        model = enliven(Fixed(), 0, inputs)
    with pytest.raises(SluiceError, match="nothing in this model can be cut"):
        insert_gates(model, inputs)
    gated = insert_gates(model, inputs, kinds=())
    plan = make_plan(gated.meta["space"].analysis, {}, (), edits)
    with torch.no_grad():
        closed = close(gated, Solution(Choice({}, 0.0, 0.0, 1.0, 0.0, 0.0), {}, plan)).eval()(*inputs)
        assert_close(rewrite_torch(model, plan, inputs).eval()(*inputs), closed, TOL)
        assert relative_error(closed, model(*inputs)) > 1e-2
    assert_close(run(rewrite_onnx(to_onnx(model, inputs), plan), inputs), closed, TOL)
