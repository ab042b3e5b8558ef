from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Term
from sluice.passes.gates.gating import insert_gates, strip_gates
from sluice.passes.graph.capture import capture
from sluice.training.batches import check_data
from sluice.training.budget import Budget
from sluice.training.train import (
    call,
    cosine,
    count_rows,
    default_loss,
    fit,
    in_order,
    late,
    split_batch,
)
from tests import tiny


def toy(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def batches(count: int = 5, labels: bool = False) -> list[object]:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(7, 4, generator=g) for _ in range(count)]
    return [(x, torch.randint(3, (7,), generator=g)) for x in inputs] if labels else list(inputs)


def distance(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float(sum(default_loss(student(x), teacher(x), None) for x in batches()))


@pytest.mark.parametrize("labels", [False, True])
def test_fit_brings_a_student_to_its_teacher(labels: bool) -> None:
    student, teacher = toy(0), toy(1).train()
    before, taught = distance(student, teacher), copy.deepcopy(teacher.state_dict())
    trained = fit(student, batches(labels=labels), epochs=30, teacher=teacher, lr=1e-2, progress=False)
    assert trained is student and not student.training and not teacher.training
    assert distance(student, teacher) < 0.2 * before
    assert all(torch.equal(t, taught[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_no_epochs_is_an_error() -> None:
    for epochs, data in ((0, batches()), (2, [])):
        with pytest.raises(SluiceError, match=f"cannot train: {epochs} epochs over no batches"):
            fit(toy(0), data, epochs=epochs, teacher=toy(1), progress=False)


def test_data_without_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream:
        def __iter__(self) -> Iterator[object]:
            return iter(batches(3))

    student, teacher = toy(0), toy(1)
    before = distance(student, teacher)
    fit(student, Stream(), epochs=9, teacher=teacher, lr=1e-2)
    assert distance(student, teacher) < before
    (line,) = capsys.readouterr().err.splitlines()  # plain lines, where there is no terminal
    assert line.startswith("train 27, took") and "\r" not in line


def test_steps_are_counted_of_those_that_there_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy(0), batches(3), epochs=2, teacher=toy(1), lr=1e-2)
    assert capsys.readouterr().err.startswith("train 6/6, took")


def test_a_loss_that_is_not_finite_is_an_error_with_its_step() -> None:
    data = batches()
    data[3] = data[3] * float("nan")  # type: ignore[operator]
    with pytest.raises(SluiceError, match=r"the loss became nan at step 3; lower the learning rate lr=0\.02"):
        fit(toy(0), data, epochs=1, teacher=toy(1), lr=0.02, progress=False)


def test_own_losses_get_outputs_teaching_and_labels() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        seen.append((outputs, taught, labels))
        return (outputs - taught).square().mean()

    data = batches(2, labels=True)
    teacher = toy(1)
    fit(toy(0), data, epochs=1, teacher=teacher, loss=loss, progress=False)
    for (outputs, taught, labels), (x, y) in zip(seen, data, strict=True):  # type: ignore[misc]
        assert outputs.requires_grad and not taught.requires_grad
        assert torch.equal(taught, teacher(x)) and labels is y


def budget_of(gated: nn.Module, share: str) -> Budget:
    """Each channel of either convolution costs 0.01 ms."""
    dense = {"conv1": 10, "conv2": 13}
    terms = tuple(
        Term(g, (Extent(((g, 1),)),), (np.array([1.0, n]),), np.array([0.01, 0.01 * n])) for g, n in dense.items()
    )
    levels = {g: tuple(range(1, n + 1)) for g, n in dense.items()}
    return Budget(gated, LatencyModel(terms, dense, levels), share)


def test_gates_and_budget_step_with_the_optimizer() -> None:
    data = tiny.data()
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=4 * len(data))
    budget = budget_of(gated, "60%")
    logits = {site: gate.logit.detach().clone() for site, gate in gated.gates.items()}
    weights = copy.deepcopy({n: p for n, p in gated.named_parameters() if not n.startswith("gates")})
    teacher = strip_gates(gated)
    fit(gated, data, epochs=4, teacher=teacher, budget=budget, gate_lr=0.05, progress=False)
    assert int(gated.gates.progress) == budget.state_dict()["step"] == 4 * len(data)
    assert all(not torch.equal(gate.logit, logits[site]) for site, gate in gated.gates.items())
    assert all(float(gate.fisher.sum()) > 0 for _, gate in gated.gates.items())
    assert any(not torch.equal(p, weights[n]) for n, p in gated.named_parameters() if n in weights)
    assert all(
        float(gate.logit.detach().mean()) < 0.8 * float(logits[site].mean()) for site, gate in gated.gates.items()
    )


def test_without_a_budget_gates_rest() -> None:
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=9)
    teacher = strip_gates(gated)
    with torch.no_grad():
        gated.get_parameter("fc.bias").add_(0.3)
    fit(gated, tiny.data(), epochs=1, teacher=teacher, progress=False)
    assert int(gated.gates.progress) == 0


def test_the_default_loss() -> None:
    g = torch.Generator().manual_seed(2)
    s, t = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    labels = torch.randint(5, (6,), generator=g)
    p, q = torch.softmax(t / 4, 1), torch.softmax(s / 4, 1)
    soft = 16 * (p * (p / q).log()).sum(1).mean()
    hard = -torch.log_softmax(s, 1)[torch.arange(6), labels].mean()
    assert float(default_loss(s, t, None)) == pytest.approx(float(soft), rel=1e-5)
    assert float(default_loss(s, t, labels)) == pytest.approx(float(0.9 * soft + 0.1 * hard), rel=1e-5)
    with pytest.raises(SluiceError, match="returns dict, not logits; pass loss="):
        default_loss({"a": s}, {"a": t}, None)


def test_batches_are_split() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert split_batch(x) == ((x,), None)
    assert split_batch((x, y)) == ((x,), y) and split_batch([x, y]) == ((x,), y)
    assert split_batch({"x": x}) == ({"x": x}, None) and split_batch(({"x": x}, y)) == ({"x": x}, y)
    assert split_batch(((x, y), y)) == ((x, y), y) and split_batch(([x, y], y))[0] == (x, y)
    for wrong in ((x,), (x, y, y), 3):
        with pytest.raises(SluiceError, match="make it inputs, or a pair"):
            split_batch(wrong)


class Named(nn.Module):
    def forward(self, *, ids: Tensor, mask: Tensor) -> Tensor:
        return ids * mask


class OneMapping(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["ids"] * batch["mask"]


@pytest.mark.parametrize("model", [Named(), OneMapping()])
def test_a_mapping_is_keywords_or_one_argument(model: nn.Module) -> None:
    batch = {"mask": torch.tensor([[0.0, 2.0]]), "ids": torch.tensor([[3.0, 4.0]])}
    assert call(model, batch).tolist() == [[0.0, 8.0]] and count_rows(batch) == 1
    given = tuple(batch[name] for name in ("ids", "mask")) if isinstance(model, Named) else (batch,)
    captured = capture(model, batch if isinstance(model, Named) else (batch,), trained=False)
    assert call(captured, batch).tolist() == [[0.0, 8.0]]
    assert all(a is b for a, b in zip(in_order(captured, batch), given, strict=True))


def test_data_is_checked_without_touching_the_model() -> None:
    class Counting(nn.BatchNorm1d):
        calls = 0

    model = nn.Sequential(nn.Linear(4, 6), Counting(6)).train()
    before = copy.deepcopy(model.state_dict())
    check_data(model, batches())
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    check_data(model, batches(labels=True))
    with pytest.raises(SluiceError, match=r"does not run on the first batch of data \(7, 4\)"):
        check_data(nn.Linear(5, 2), batches())
    with pytest.raises(SluiceError, match="read only once"):
        check_data(model, iter(batches()))


def test_schedules() -> None:
    rate = cosine(8)
    assert [rate(k) for k in (0, 4, 8, 11)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert rate(2) == pytest.approx(0.5 + math.sqrt(0.125))
    gates = late(8)
    assert [gates(k) for k in (0, 3, 4, 6, 8, 11)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert cosine(None)(10_000) == late(None)(10_000) == 1.0


def test_a_second_budget_takes_the_place_of_the_first() -> None:
    data = tiny.data()
    gated = insert_gates(tiny.model(), tiny.inputs(), steps=len(data)).train()
    first = budget_of(gated, "60%")
    second = budget_of(gated, "70%")
    for x, y in data[:3]:
        (nn.functional.cross_entropy(gated(x), y) + second.penalty()).backward()
        gated.step()
    assert second.state_dict()["step"] == 3
    assert first.state_dict()["step"] == 0
