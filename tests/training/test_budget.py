"""Expected latency against the model, and the budget on a toy whose optimum lies on the constraint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sluice
from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Term
from sluice.solver.decide import least_ms
from sluice.training.budget import Budget
from sluice.training.expected_latency import ExpectedLatency, through_levels
from tests import tiny


class Sigmoids(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((channels,), 2.5))

    def mask(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def soft_width(self) -> Tensor:
        return self.mask().sum()

    def width(self) -> int:
        return int((self.logits > 0).sum())


def staircase() -> LatencyModel:
    """Three layers in a ring of groups; time jumps after every multiple of 8."""
    dense = {"a": 32, "b": 40, "c": 24}
    terms = []
    for x, y in ("ab", "bc", "ca"):
        knots = [np.asarray(sorted({1, *range(8, n + 1, 8), *range(9, n, 8)}), float) for n in (dense[x], dense[y])]
        ms = 0.05 + np.outer(*(np.ceil(k / 8) * 8 for k in knots)) / 2000
        terms.append(Term(x + y, (Extent(((x, 1),)), Extent(((y, 1),))), tuple(knots), ms))
    return LatencyModel(tuple(terms), dense, {g: tuple(range(8, n + 1, 8)) for g, n in dense.items()})


def mixed(seed: int, again: bool = False) -> LatencyModel:
    """Terms of no to three extents, joints, concatenation, single knots, calibration; of some weights read again."""
    rng = np.random.default_rng(seed)
    dense = {"a": 7, "b": 12, "c": 5}
    a, b, c = (Extent(((g, 1),)) for g in dense)
    concat = Extent((("a", 2), ("c", 1)), 3)
    terms = [Term("fixed", (), (), np.asarray(0.25), 3.0)]
    for extents in ((a,), (b, c), (c, c), (concat, b), (a, b, c), (Extent((), 4), a)):
        knots = tuple(
            np.sort(rng.choice(np.arange(1.0, 20.0), size=rng.integers(1, 5), replace=False)) for _ in extents
        )
        ms = rng.uniform(0.1, 1.0, tuple(len(k) for k in knots))
        terms.append(Term(f"t{len(terms)}", extents, knots, ms, float(rng.choice([1.0, 2.0, -0.5]))))
    levels = {"a": (2, 5, 7), "b": (3, 4, 9, 12), "c": (1, 5)}
    if again:
        terms = [replace(t, reload=rng.uniform(0.0, 1.0, np.shape(t.ms))) if k % 3 else t for k, t in enumerate(terms)]
    return LatencyModel(tuple(terms), dense, levels, intercept=-0.2, slope=1.3, cached_ms=1.5)


def train(
    budget: Budget, gates: Mapping[str, Sigmoids], scale: float, steps: int, seed: int = 0, grad_scale: float = 1.0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    utility = {g: torch.rand(len(gate.logits), generator=generator) + 0.05 for g, gate in gates.items()}
    optimizer = torch.optim.Adam([p for gate in gates.values() for p in gate.parameters()], 0.05)
    for _ in range(steps):
        loss = sum((utility[g] * (1 - gate.mask()) ** 2).sum() for g, gate in gates.items())
        (grad_scale * (scale * loss + budget.penalty())).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()


def ring() -> dict[str, Sigmoids]:
    return {g: Sigmoids(n) for g, n in staircase().dense.items()}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_expected_latency_equals_the_model(seed: int, again: bool) -> None:
    model = mixed(seed, again)
    expected = ExpectedLatency(model, smooth=False)
    rng = np.random.default_rng(seed)
    for widths in [*rng.uniform(0, 14, (20, 3)), *rng.integers(0, 14, (20, 3)).astype(float)]:
        value = expected(torch.from_numpy(widths)).item()
        assert value == pytest.approx(model.ms(dict(zip(model.dense, widths.tolist(), strict=True))), rel=1e-9)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_gradient_equals_finite_differences(smooth: bool, again: bool) -> None:
    model = mixed(1, again)
    reference = through_levels(model) if smooth else model
    expected = ExpectedLatency(model, smooth=smooth)
    steepest = 0.0
    for point in np.random.default_rng(5).integers(1, 9, (10, 3)) + 0.37:  # sums of it are no knots
        widths = torch.tensor(point, requires_grad=True)
        expected(widths).backward()
        assert widths.grad is not None
        steepest = max(steepest, float(widths.grad.abs().max()))
        for k, group in enumerate(model.dense):
            at = dict(zip(model.dense, point.tolist(), strict=True))
            slope = (
                reference.ms({**at, group: at[group] + 1e-5}) - reference.ms({**at, group: at[group] - 1e-5})
            ) / 2e-5
            assert widths.grad[k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert steepest > 0.01


def test_what_is_read_again_is_felt_beyond_what_the_caches_spare() -> None:
    """One piece of 1 ms and 0.1 ms per channel again, of which the caches spare what 20 channels are."""
    knots = np.asarray([1.0, 40.0])
    piece = Term("p", (Extent((("a", 1),)),), (knots,), np.asarray([1.0, 1.0]), reload=0.1 * knots)
    model = LatencyModel((piece,), {"a": 40}, {"a": (1, 40)}, cached_ms=2.0)
    assert [model.ms({"a": width}) for width in (1, 20, 30, 40)] == pytest.approx([1.0, 1.0, 2.0, 3.0])
    expected = ExpectedLatency(model)
    for width, slope in ((15.0, 0.0), (35.0, 0.1)):
        at = torch.tensor([width], dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(expected(at), at)
        assert found.item() == pytest.approx(slope)


def test_smooth_has_the_staircase_values_at_levels_and_a_slope_on_its_steps() -> None:
    model = staircase()
    smooth, exact = ExpectedLatency(model), ExpectedLatency(model, smooth=False)
    for widths in ({"a": 8, "b": 24, "c": 16}, {"a": 32, "b": 40, "c": 24}):
        value = smooth({g: torch.tensor(float(w)) for g, w in widths.items()}).item()
        assert value == pytest.approx(model.ms(widths), rel=1e-6)
    flat = torch.tensor([12.5, 20.5, 14.5], requires_grad=True)
    exact(flat).backward()
    assert flat.grad is not None
    assert flat.grad.abs().max() < 1e-9
    (slope,) = torch.autograd.grad(smooth(flat), flat)
    assert slope.min() > 1e-3


def test_the_dense_width_has_a_gradient_and_so_has_more() -> None:
    """Gates start at the dense widths; from there and, by rounding, from above the budget must be able to pull."""
    model = staircase()
    expected = ExpectedLatency(model)
    inside = torch.tensor([31.5, 39.5, 23.5], requires_grad=True)
    (slope,) = torch.autograd.grad(expected(inside), inside)
    dense = torch.tensor([float(n) for n in model.dense.values()], requires_grad=True)
    (at_dense,) = torch.autograd.grad(expected(dense), dense)
    assert at_dense.tolist() == pytest.approx(slope.tolist(), rel=0.05)

    class More(Sigmoids):
        def soft_width(self) -> Tensor:
            soft = super().soft_width()
            return soft + (len(self.logits) + 1e-3 - soft).detach()

    gates = {g: More(n) for g, n in model.dense.items()}
    budget = Budget(gates, model, "60%", steps=9)
    value = budget.expected_ms()
    assert value.item() == pytest.approx(model.dense_ms())
    value.backward()
    assert all(gate.logits.grad is not None and gate.logits.grad.min() > 0 for gate in gates.values())


def test_groups_without_a_gate_are_dense_and_other_shapes_refused() -> None:
    model = staircase()
    expected = ExpectedLatency(model, smooth=False)
    value = expected({"b": torch.tensor(16.0)}).item()
    assert value == pytest.approx(model.ms({"a": 32, "b": 16, "c": 24}), rel=1e-6)
    with pytest.raises(SluiceError, match=r"widths have shape \(2,\)"):
        expected(torch.zeros(2))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_budget_is_met_at_any_scale_of_the_loss(scale: float) -> None:
    gates = ring()
    budget = Budget(gates, staircase(), "50%", steps=400)
    assert budget.target_ms == pytest.approx(0.5 * budget.dense_ms)
    assert budget.expected_ms().item() > 1.5 * budget.target_ms
    train(budget, gates, scale, 400)
    assert budget.expected_ms().item() == pytest.approx(budget.target_ms, rel=0.02)


def test_loss_scaling_of_mixed_precision_changes_nothing() -> None:
    plain, scaled = ring(), ring()
    train(Budget(plain, staircase(), "50%", steps=60), plain, 1.0, 60)
    train(Budget(scaled, staircase(), "50%", steps=60), scaled, 1.0, 60, grad_scale=1024.0)
    for g, gate in plain.items():
        assert torch.allclose(gate.logits, scaled[g].logits, atol=1e-3)


def test_no_pull_once_met() -> None:
    gates = ring()
    budget = Budget(gates, staircase(), "90%", steps=10, warmup_fraction=0.0)
    train(budget, gates, 1.0, 2)
    for gate in gates.values():
        nn.init.constant_(gate.logits, -0.5)
    budget.penalty().backward()
    assert all(g.logits.grad is not None and not g.logits.grad.any() for g in gates.values())


def test_target_falls_from_dense_over_the_warm_up() -> None:
    gates = ring()
    budget = Budget(gates, staircase(), "60%", steps=10, warmup_fraction=0.5)
    seen = []
    for _ in range(7):
        seen.append(budget.scheduled_ms() / budget.dense_ms)
        budget.penalty().backward()
        budget.step()
    assert seen == pytest.approx([1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.6])


def test_checkpoint_continues_alike() -> None:
    whole, parts = ring(), ring()
    train(first := Budget(parts, staircase(), "50%", steps=60), parts, 1.0, 30)
    resumed = {g: Sigmoids(n) for g, n in staircase().dense.items()}
    for g, gate in resumed.items():
        gate.load_state_dict(parts[g].state_dict())
    second = Budget(resumed, staircase(), "50%", steps=60)
    second.load_state_dict(first.state_dict())
    assert second.penalty().item() == first.penalty().item()
    assert second.scheduled_ms() == first.scheduled_ms()
    budget = Budget(whole, staircase(), "50%", steps=60)
    train(budget, whole, 1.0, 30)
    assert budget.state_dict() == second.state_dict()
    with pytest.raises(SluiceError, match="checkpoint's target_ms"):
        Budget(resumed, staircase(), "60%", steps=60).load_state_dict(first.state_dict())


def test_reachability_is_said_before_training() -> None:
    model = staircase()
    least = least_ms(model).promised_ms
    assert Budget(ring(), model, f"{least * 1.0001}ms", steps=5).least_ms == pytest.approx(least)
    with pytest.raises(SluiceError, match="cannot be met: filter gates alone reach"):
        Budget(ring(), model, f"{least * 0.99}ms", steps=5)
    only = {"b": Sigmoids(40)}
    with pytest.raises(SluiceError, match="cannot be met"):
        Budget(only, model, f"{least * 1.1}ms", steps=5)
    assert Budget(only, model, "100%", steps=5).least_ms == pytest.approx(model.ms({"a": 32, "b": 8, "c": 24}))


def test_faults_of_the_loop_are_said() -> None:
    gates = ring()
    with pytest.raises(SluiceError, match="gate 'z' has no place"):
        Budget({"z": Sigmoids(3)}, staircase(), "50%", steps=5)
    budget = Budget(gates, staircase(), "50%", steps=5)
    with pytest.raises(SluiceError, match="without penalty"):
        budget.step()
    (budget.penalty() + math.nan * gates["a"].logits.sum()).backward()
    with pytest.raises(SluiceError, match="loss is not finite"):
        budget.step()
    budget = Budget(gates, staircase(), "50%", steps=5)
    nn.init.constant_(gates["b"].logits, math.nan)
    budget.penalty()
    with pytest.raises(SluiceError, match="expected latency is nan at step 0"):
        budget.step()


def test_decisions_are_hard_widths_and_evaluation_needs_no_graph() -> None:
    gates = ring()
    budget = Budget(gates, staircase(), "50%", steps=5)
    assert budget.model.ms(budget.configuration()) == pytest.approx(budget.dense_ms)
    nn.init.constant_(gates["a"].logits[:20], -1.0)
    assert budget.model.ms(budget.configuration()) == pytest.approx(staircase().ms({"a": 12, "b": 40, "c": 24}))
    with torch.no_grad():
        assert not budget.penalty().requires_grad


def test_a_budget_whose_place_was_taken_says_so() -> None:
    gated = sluice.insert_gates(tiny.model(), tiny.inputs(), steps=9)
    with tiny.simulated_device():
        profile = sluice.profile(tiny.model(), tiny.inputs(), batch=tiny.BATCH, methods=("filter",), progress=False)
    first, second = (Budget(gated, profile, share) for share in ("60%", "50%"))
    with pytest.raises(SluiceError, match="gates have another budget by now"):
        first.penalty()
    assert float(second.penalty().detach()) >= 0.0
