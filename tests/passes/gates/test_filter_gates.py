"""Gates start as identity, survive ``state_dict``, never decide for nothing, and score by the task's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sluice.core.errors import SluiceError
from sluice.passes.gates.filter_gates import (
    BETA_MAX,
    INITIAL_LOGIT,
    MEMORY,
    BlockGate,
    Gate,
    Gates,
    gate_parameters,
    other_parameters,
)
from sluice.passes.gates.gating import absorb_masks, insert_gates, strip_gates
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.capture import capture
from sluice.passes.graph.view_torch import view_torch
from sluice.runtime.base.compare import assert_close
from tests.networks import mixed


def test_starts_as_identity_for_every_beta() -> None:
    gate = Gate("conv", 5)
    for beta in (1.0, 3.7, BETA_MAX):
        gate.beta.fill_(beta)
        assert torch.equal(gate(), torch.ones(5))
        assert gate.soft_width().item() == 5.0
    assert gate.width() == 5


def test_mask_is_the_formula() -> None:
    gate = Gate("conv", 4)
    logits = torch.tensor([-0.7, 0.1, 1.9, 3.0])
    gate.logit.data.copy_(logits)
    gate.beta.fill_(2.5)
    expected = [(1 / (1 + math.exp(-2.5 * a))) / (1 / (1 + math.exp(-2.5 * INITIAL_LOGIT))) for a in logits.tolist()]
    assert_close(gate(), torch.tensor(expected), 1e-6)
    assert gate.decision().tolist() == [False, True, True, True]


def test_masks_harden() -> None:
    gate = Gate("conv", 2)
    gate.logit.data.copy_(torch.tensor([-1.6, 1.6]))
    spread = []
    for beta in (1.0, 2.5, BETA_MAX):
        gate.beta.fill_(beta)
        low, high = gate().tolist()
        spread.append(high - low)
    assert spread == sorted(spread) and spread[-1] > 0.999


def test_decision_is_never_empty() -> None:
    gate = Gate("conv", 4)
    gate.logit.data.copy_(torch.tensor([-3.0, -0.2, -0.9, -1.0]))
    assert gate.decision().tolist() == [False, True, False, False]
    assert gate.width() == 1
    gate.hard.fill_(True)
    assert gate().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_set_decision() -> None:
    gate = Gate("conv", 4)
    gate.logit.data.copy_(torch.tensor([0.0, 2.0, -1.5, 0.3]))
    mask = torch.tensor([True, False, True, False])
    gate.set_decision(mask)
    assert torch.equal(gate.decision(), mask)
    assert torch.equal(gate(), mask.float())


def test_fisher_collects_the_gradient_of_the_task_only() -> None:
    gate = Gate("conv", 3)
    values = torch.tensor([1.0, -2.0, 0.5])
    loss = (gate() * values).sum() + 100.0 * gate.soft_width()
    loss.backward()
    assert_close(gate.fisher, values**2)
    (gate() * values).sum().backward()
    assert_close(gate.fisher, (1 + MEMORY) * values**2)
    assert gate.logit.grad is not None


def test_importance_is_the_effect_of_the_mask_as_it_stands() -> None:
    gate = Gate("conv", 3)
    gate.logit.data.copy_(torch.tensor([2.0, 0.0, -4.0]))
    mask = gate().detach()
    values = torch.tensor([1.0, -2.0, 0.5])
    (gate() * values).sum().backward()
    assert_close(gate.fisher, (mask * values) ** 2)


def test_soft_width_counts_decisions_and_has_the_gradient_of_masks() -> None:
    gate = Gate("conv", 4)
    gate.logit.data.copy_(torch.tensor([2.0, 0.3, -0.4, -3.0]))
    width = gate.soft_width()
    assert_close(width, torch.tensor(2.0))
    (found,) = torch.autograd.grad(width, gate.logit)
    (expected,) = torch.autograd.grad(gate().sum(), gate.logit)
    assert_close(found, expected)
    assert (found > 0).all()


def test_fisher_rests_in_eval_and_without_gradient() -> None:
    gate = Gate("conv", 3).eval()
    gate().sum().backward()
    gate.train()
    with torch.no_grad():
        gate().sum()
    assert gate.fisher.tolist() == [0.0, 0.0, 0.0]


def test_schedule() -> None:
    gates = Gates({"a": 2, "b": 3}, steps=4)
    betas = []
    for _ in range(6):
        gates.step()
        betas.append(float(gates["b"].beta))
    assert_close(betas, [BETA_MAX**f for f in (0.0, 0.0, 0.5, 1.0, 1.0, 1.0)], 1e-6)
    assert int(gates.progress) == 6
    with pytest.raises(SluiceError, match="steps=0"):
        Gates({"a": 2}, steps=0)


def test_state_dict_round_trip() -> None:
    sizes = {"layer1.0.conv": 3, "layer1_0_conv": 4, "layer1.0#2": 2, "layer1.0_2": 5}
    gates = Gates(sizes, steps=5)
    gates.step()
    gates.step()
    for _, gate in gates.items():
        gate.logit.data.normal_()
        gate.fisher.uniform_()
    gates["layer1.0#2"].set_decision(torch.tensor([True, False]))
    again = Gates(sizes, steps=5)
    again.load_state_dict(gates.state_dict())
    assert int(again.progress) == 2
    for site, gate in gates.items():
        other = again[site]
        assert torch.equal(other(), gate()) and torch.equal(other.beta, gate.beta)
        assert torch.equal(other.fisher, gate.fisher) and torch.equal(other.hard, gate.hard)
    assert list(again) == list(sizes) and len(again) == 4
    assert again.widths() == gates.widths()


def test_parameter_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.add_module("gates", Gates({"0": 2}, steps=1))
    logits, others = gate_parameters(model), other_parameters(model)
    assert [tuple(p.shape) for p in logits] == [(2,)]
    assert [tuple(p.shape) for p in others] == [(2, 3), (2,)]


def test_absorbed_masks_are_the_same_function_with_open_gates() -> None:
    model, inputs = mixed()
    found, _ = find_blocks(view_torch(capture(model, inputs)))
    blocks = {b.name: b.closing for b in found if b.closing}
    gated = insert_gates(model, inputs, kinds=("filter", "block"), blocks=blocks).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, gate in gated.gates.items():
            own = gate.open if isinstance(gate, BlockGate) else gate
            assert isinstance(own, Gate)
            own.logit.copy_(3 * torch.randn(own.logit.shape, generator=generator))
        before = gated(*inputs)
        open_before = strip_gates(gated).eval()(*inputs)
        absorb_masks(gated)
        assert_close(gated(*inputs), before, tol=1e-5)
        assert_close(strip_gates(gated).eval()(*inputs), before, tol=1e-5)
    assert float((open_before - before).abs().max()) > 1e-2 * float(before.abs().max())
