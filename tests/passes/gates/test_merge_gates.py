"""Gates over merges: shares exclude each other, what a merge takes away fades, decisions do not depend on sharpness."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.plan import Merge
from sluice.models import enliven
from sluice.passes.cut.merge_torch import linearize_torch
from sluice.passes.gates.filter_gates import BETA_MAX, gate_parameters, other_parameters
from sluice.passes.gates.gating import Gated, insert_gates, strip_gates
from sluice.passes.gates.merge_gates import MergeGate, exclude_each_other
from sluice.passes.graph.capture import capture, clone
from sluice.runtime.base.compare import assert_close, relative_error

FAR = 60.0


class Run(nn.Module):
    """Convolutions without padding, one between them that may be removed, then a block that may be emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.Conv2d(7, 5, 1)
        self.bn, self.inner = nn.BatchNorm2d(7), nn.Conv2d(5, 5, 3, padding=1)
        self.d, self.fc = nn.Conv2d(5, 9, 1), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.hardswish(self.bn(self.b(F.relu(self.a(x)))))))
        x = F.relu(self.d(F.relu(x + self.inner(x))))
        return self.fc(x.mean((2, 3)))


WHOLE = Merge(("a.weight", "b.weight", "c.weight"), (("a.weight", "c.weight"),))
FRONT = Merge(("a.weight", "b.weight"), (("a.weight", "b.weight"),))
EMPTIED = Merge(("c.weight", "inner.weight", "d.weight"), (("c.weight", "d.weight"),))
MERGES = {"whole": WHOLE, "front": FRONT, "emptied": EMPTIED}


@functools.cache
def network() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = Run(), torch.randn(4, 3, 11, 9)
    return capture(enliven(model, 1, (x,)), (x,)), (x,)


def gated(kinds: tuple[str, ...] = ("merge",)) -> Gated:
    model, inputs = network()
    return insert_gates(model, inputs, kinds=kinds, merges=MERGES)


def push(made: Gated, **logits: float) -> Gated:
    """The given logits, and all others far below zero."""
    with torch.no_grad():
        for site in MERGES:
            gate = made.gates[site]
            assert isinstance(gate, MergeGate)
            gate.logit.fill_(logits.get(site, -FAR))
    return made


@torch.no_grad()
@pytest.mark.parametrize("site", ["whole", pytest.param(None, id="none")])
def test_the_ends_are_the_dense_and_the_linear_network(site: str | None) -> None:
    model, inputs = network()
    expected = clone(model)
    linearize_torch(expected, [MERGES[site]] if site else [])
    for beta in (1.0, BETA_MAX):
        made = push(gated(), **({site: FAR} if site else {})).eval()
        made.gates[site or "whole"].sharpen(beta)
        assert_close(made(*inputs), expected(*inputs), what=f"{site} merged")
    assert not site or relative_error(expected(*inputs), model(*inputs)) > 1e-2


@torch.no_grad()
def test_an_emptied_block_is_its_shortcut() -> None:
    model, (x,) = network()
    made = push(gated(), emptied=FAR).eval()
    run = Run().eval()
    run.load_state_dict(model.state_dict())
    y = run.c(F.hardswish(run.bn(run.b(F.relu(run.a(x))))))
    assert_close(made(x), run.fc(F.relu(run.d(y)).mean((2, 3))), what="without block and activations")


@torch.no_grad()
def test_in_between_an_activation_is_a_mixture() -> None:
    model, (x,) = network()
    made = push(gated(), front=0.4).eval()
    share = torch.sigmoid(torch.tensor(0.4))
    run = Run().eval()
    run.load_state_dict(model.state_dict())
    y = run.a(x)
    y = run.c(F.hardswish(run.bn(run.b(share * y + (1 - share) * F.relu(y)))))
    y = F.relu(y)
    assert_close(made(x), run.fc(F.relu(run.d(F.relu(y + run.inner(y)))).mean((2, 3))), what="a share")


def test_shares_are_the_formula_and_leave_some_of_every_layer() -> None:
    gates = {gate.site: gate for gate in exclude_each_other(MERGES)}
    logits = {"whole": 0.8, "front": -0.3, "emptied": 1.1}
    for site, gate in gates.items():
        gate.logit.data.fill_(logits[site])
        gate.sharpen(2.0)
    powers = {site: torch.tensor(2.0 * a).exp() for site, a in logits.items()}
    # "front" and "emptied" have no layer in common.
    rivals = {"whole": ["front", "emptied"], "front": ["whole"], "emptied": ["whole"]}
    for site, gate in gates.items():
        expected = powers[site] / (1 + powers[site] + sum(powers[other] for other in rivals[site]))
        assert_close(gate(), expected.reshape(1), what=site)
    layers = {name for merge in MERGES.values() for name in merge.layers}
    for layer in layers:
        assert sum(float(gates[s]().detach()) for s, merge in MERGES.items() if layer in merge.layers) < 1


@pytest.mark.parametrize("beta", [1.0, BETA_MAX])
def test_of_rivals_one_is_decided_for(beta: float) -> None:
    gates = {gate.site: gate for gate in exclude_each_other(MERGES)}

    def decided(**logits: float) -> list[str]:
        for site, gate in gates.items():
            gate.logit.data.fill_(logits[site])
            gate.sharpen(beta)
            assert float(gate.soft_width().detach()) == gate.width()
        return [site for site, gate in gates.items() if gate.width()]

    assert decided(whole=0.2, front=0.1, emptied=0.1) == ["whole"]
    assert decided(whole=0.2, front=0.3, emptied=0.1) == ["front"]
    assert decided(whole=-0.1, front=0.1, emptied=0.1) == ["front", "emptied"]
    assert decided(whole=-0.2, front=-0.1, emptied=-0.1) == []
    # At the start there is room for both answers.
    for site, gate in gates.items():
        gate.start(site == "emptied")
    assert [site for site, gate in gates.items() if gate.width()] == ["emptied"]
    assert float(gates["whole"]().detach()) < 0.2 < 0.5 < float(gates["emptied"]().detach())


def test_task_and_rivals_pull_at_the_logits() -> None:
    made = push(gated(), whole=0.3, front=0.1, emptied=-0.2).train()
    _, inputs = network()
    made(*inputs).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in gate_parameters(made))
    assert len(gate_parameters(made)) == len(MERGES)
    made.zero_grad()
    made.gates["whole"].soft_width().backward()
    rival = made.gates["front"]
    assert isinstance(rival, MergeGate) and rival.logit.grad is not None and float(rival.logit.grad) < 0


def test_gates_over_merges_come_off_and_save() -> None:
    model, inputs = network()
    made = push(gated(("filter", "merge")), whole=0.3, emptied=0.1)
    assert {name for name, _ in made.named_parameters() if not name.startswith("gates.")} == dict(
        model.named_parameters()
    ).keys()
    other = gated(("filter", "merge"))
    other.load_state_dict(made.state_dict())
    assert other.gates.widths() == made.gates.widths() and other.gates.widths()["whole"] == 1
    assert len(other_parameters(made)) == len(list(model.parameters()))
    assert_close(strip_gates(made).eval()(*inputs), model(*inputs), what="stripped")
