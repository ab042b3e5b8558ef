"""A network that runs from the frontier on says what the whole network says, whatever was asked before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.importance.loss_increase import LossIncrease
from sluice.models import enliven
from sluice.passes.cut.drop_torch import drop_torch
from sluice.passes.cut.merge_torch import linearize_torch
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.view_torch import view_torch
from sluice.runtime.base.compare import assert_close

Change = tuple[str, Callable[[LossIncrease], float], Callable[[fx.GraphModule], None]]


def squared(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Zero for the dense network with statistics of the batch, so that every change increases it."""
    return ((outputs - labels) ** 2).mean()


class Net(nn.Module):
    """Two residual blocks, a pair that merges, and a weight that is read through a transpose."""

    def __init__(self, inplace: bool):
        super().__init__()
        act = functools.partial(nn.ReLU, inplace=inplace)
        self.stem = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), act())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5), act(), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)
            )
            for _ in range(2)
        )
        self.first, self.act, self.second = nn.Conv2d(7, 9, 1), act(), nn.Conv2d(9, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            branch = block(x)
            branch += x  # what an in-place sum leaves behind must not reach the next network
            x = self.act(branch)
        x = self.second(self.act(self.first(x))).mean((2, 3))
        return x @ self.head.weight.t() + self.head.bias


MERGE = Merge(("first.weight", "second.weight"), (("first.weight", "second.weight"),))


@functools.cache
def network(inplace: bool) -> fx.GraphModule:
    torch.manual_seed(3)
    return capture(enliven(Net(inplace), seed=3), torch.randn(2, 3, 9, 8)).eval()


@functools.cache
def judge_of(inplace: bool) -> LossIncrease:
    generator, statistics = torch.Generator().manual_seed(5), clone(network(inplace)).train()
    batches = [torch.randn(6, 3, 9, 8, generator=generator) for _ in range(2)]
    with torch.no_grad():
        return LossIncrease(network(inplace), [(x, statistics(x.clone())) for x in batches], squared)


def mixed(tensor: Tensor) -> Tensor:
    """Other values, which no batch norm undoes."""
    return tensor + 0.7 * tensor.roll(1, 0)


def weight(name: str) -> Change:
    def plainly(gm: fx.GraphModule) -> None:
        tensor = gm.state_dict()[name]
        tensor.copy_(mixed(tensor))

    return name, lambda judge: judge.weights({name: mixed(judge.gm.state_dict()[name])}), plainly


@functools.cache
def changes(inplace: bool) -> list[Change]:
    names = ["stem.0.weight", "stem.1.bias", "blocks.0.3.weight", "blocks.1.1.weight", "second.bias", "head.weight"]
    found = [weight(name) for name in names]
    blocks, _ = find_blocks(view_torch(network(inplace)))
    assert len(blocks) == 2
    for block in blocks:
        drop = block.drop()
        found.append(
            (
                block.name,
                lambda judge, drop=drop: judge.restructured(lambda g: drop_torch(g, [drop]), near=drop.params),  # type: ignore[misc]
                lambda gm, drop=drop: drop_torch(gm, [drop]),  # type: ignore[misc]
            )
        )

    def merge(gm: fx.GraphModule) -> None:
        linearize_torch(gm, [MERGE])

    found.append(("merge", lambda judge: judge.restructured(merge, near=MERGE.layers), merge))
    found.append(("merge, place unknown", lambda judge: judge.restructured(merge), merge))
    found.append(("merge, wrong place", lambda judge: judge.restructured(merge, near=["head.weight"]), merge))
    return found


@functools.cache
def whole(inplace: bool, index: int) -> float:
    """The increase with nothing kept: a deep copy, changed, run as the module that it is."""
    judge = judge_of(inplace)
    values = []
    with torch.no_grad():
        for inputs, taught, labels in judge.batches:
            gm = clone(judge.gm).train()
            changes(inplace)[index][2](gm)
            values.append(float(squared(gm(*copy.deepcopy(inputs)), taught, labels)))
    return sum(values) / len(values)


@pytest.mark.parametrize("inplace", [False, True])
@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 10), min_size=1, max_size=12))
def test_any_order_of_changes_gives_what_the_whole_network_gives(inplace: bool, order: list[int]) -> None:
    judge = judge_of(inplace)
    assert len(changes(inplace)) == 11
    for index in order:
        want = whole(inplace, index)
        assert want > 1e-5 and judge.base < 1e-10
        assert_close(changes(inplace)[index][1](judge), want, tol=1e-5, what=changes(inplace)[index][0])


def test_nodes_before_the_change_do_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, ran = judge_of(False), []
    run_node = fx.Interpreter.run_node
    monkeypatch.setattr(fx.Interpreter, "run_node", lambda self, n: (ran.append(n.name), run_node(self, n))[1])
    late = {"merge", "head.weight", "second.bias"}
    for name, increase, _ in sorted(changes(False), key=lambda c: c[0] in late):
        if name in late:
            increase(judge)
            ran.clear()
            increase(judge)
            assert ran and not {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4"} & set(ran), name
            assert "mean" in ran or name == "head.weight"


def test_the_network_stays_as_it_was() -> None:
    gm = network(False)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    for _, increase, _ in changes(False):
        increase(judge_of(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    parameters = {name: tensor for name, tensor in judge_of(False).gm.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters.items())


def test_a_network_without_a_finite_loss_is_refused() -> None:
    with pytest.raises(SluiceError, match="the loss is nan"):
        LossIncrease(network(False), [(torch.full((4, 3, 9, 8), float("nan")), torch.zeros(4, 4))], squared)
