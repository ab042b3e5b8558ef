from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.importance.taylor import fisher_scores, learned_scores
from sluice.passes.gates.gating import Gated, insert_gates, strip_gates
from sluice.runtime.base.compare import assert_close
from tests import networks, tiny


def gated_of(model: nn.Module) -> Gated:
    return insert_gates(model.double(), tiny.inputs().double(), steps=10)


def data(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in tiny.data()[:count]]


def test_scores_are_squared_derivatives_of_the_loss() -> None:
    """Scaling what a ReLU channel is made of scales the channel: a derivative that needs no gate."""
    model = tiny.model().double()
    ((x, y),) = data(1)
    scores = fisher_scores(gated_of(copy.deepcopy(model)), [(x, y)])
    for layer, group in ((model.conv1, "conv1"), (model.conv2, "conv2")):
        assert scores[group].shape == (layer.out_channels,)
        for channel in range(layer.out_channels):
            losses = []
            for scale in (1 + 1e-4, 1 - 1e-4):
                changed = copy.deepcopy(model)
                target = changed.get_submodule(group)
                with torch.no_grad():
                    target.weight[channel] *= scale
                    target.bias[channel] *= scale
                    losses.append(float(nn.functional.cross_entropy(changed(x), y)))
            slope = (losses[0] - losses[1]) / 2e-4
            assert scores[group][channel] == pytest.approx(slope**2, rel=1e-3, abs=1e-12)


def test_a_dead_channel_is_worth_nothing() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.conv1.weight[3], model.conv1.bias[3] = 0.0, -1.0  # never positive
        model.conv2.weight[:, 6] = 0.0  # never read
        model.fc.weight[:, 11] = 0.0
    scores = fisher_scores(gated_of(model), data())
    assert set(np.flatnonzero(scores["conv1"] == 0)) == {3, 6}
    assert set(np.flatnonzero(scores["conv2"] == 0)) == {11}


def test_a_channel_that_is_read_more_is_worth_more() -> None:
    model = tiny.model()
    before = fisher_scores(gated_of(copy.deepcopy(model)), data())
    with torch.no_grad():
        model.fc.weight[:, 4] *= 6.0
    after = fisher_scores(gated_of(model), data())
    assert after["conv2"][4] > 4.0 * before["conv2"][4]
    assert all(after["conv2"][4] / before["conv2"][4] > s for s in np.delete(after["conv2"] / before["conv2"], 4))


def test_everything_is_left_as_it_was() -> None:
    model, inputs = networks.build("plain")
    gated = insert_gates(model, inputs, steps=10).train()
    state = copy.deepcopy(gated.state_dict())
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 3, 8, 6, generator=g), torch.randint(4, (3,), generator=g)) for _ in range(3)]
    fisher_scores(gated, batches)
    assert gated.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in gated.state_dict().items())
    assert all(p.grad is None for p in gated.parameters())
    with pytest.raises(RuntimeError, match="mine"):
        fisher_scores(gated.train(), batches, teacher=model, loss=failing)
    assert gated.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in gated.state_dict().items())


def failing(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    raise RuntimeError("mine")


def test_only_so_many_batches_are_read() -> None:
    few, all_of_them = (
        fisher_scores(gated_of(tiny.model()), data(), batches=2),
        fisher_scores(gated_of(tiny.model()), data(2)),
    )
    assert all(np.array_equal(few[g], all_of_them[g]) for g in few)
    rest = fisher_scores(gated_of(tiny.model()), data())
    assert any(not np.array_equal(few[g], rest[g]) for g in few)


def test_a_teacher_and_a_loss_of_ones_own() -> None:
    gated = gated_of(tiny.model())
    teacher = tiny.enliven(tiny.Tiny(), 5).double()
    found = fisher_scores(gated, data(), teacher=teacher, loss=lambda o, t, _: (o - t).square().sum())
    halved = fisher_scores(gated, data(), teacher=teacher, loss=lambda o, t, _: 0.5 * (o - t).square().sum())
    assert all(np.allclose(found[g], 4 * halved[g]) for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_against_itself_is_detected(dtype: torch.dtype) -> None:
    gated = insert_gates(tiny.model().to(dtype), tiny.inputs().to(dtype), steps=10)
    teacher, batches = strip_gates(gated), [x.to(dtype) for x, _ in data()]
    with pytest.raises(SluiceError, match="a network compared with itself"):
        fisher_scores(gated, batches, teacher=teacher)
    # With labels, or another teacher, there is something to learn from.
    assert sum(s.sum() for s in fisher_scores(gated, tiny_data(dtype), teacher=teacher).values()) > 0
    with torch.no_grad():
        teacher.get_parameter("fc.bias").add_(torch.tensor([0.01, 0, 0, 0, 0], dtype=dtype))
    assert sum(s.sum() for s in fisher_scores(gated, batches, teacher=teacher).values()) > 0


def tiny_data(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(dtype), y) for x, y in tiny.data()]


def test_learned_scores_are_what_gates_collected() -> None:
    gated = gated_of(tiny.model())
    with pytest.raises(SluiceError, match=r"call gated\.train\(\) before"):
        learned_scores(gated.gates)
    gated.train()
    for x, y in data(3):
        nn.functional.cross_entropy(gated(x), y).backward()
    scores = learned_scores(gated.gates)
    assert set(scores) == {"conv1", "conv2"}
    for site, gate in gated.gates.items():
        assert np.array_equal(scores[site], gate.fisher.double().numpy()) and (scores[site] >= 0).all()


def test_a_closed_gate_is_worth_next_to_nothing() -> None:
    gated = gated_of(tiny.model()).train()
    with torch.no_grad():
        gated.gates["conv2"].logit[5] = -9.0
    for x, y in data(3):
        nn.functional.cross_entropy(gated(x), y).backward()
    scores = learned_scores(gated.gates)["conv2"]
    assert scores[5] < 1e-3 * np.median(scores)


def test_labels_of_every_position() -> None:
    """Logits (batch, positions, classes): the scores are those of the flattened problem."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model, g = Sequence(), torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 5, 6, generator=g), torch.randint(5, (8, 5), generator=g)
    whole = fisher_scores(insert_gates(model, x), [(x, y)])
    flat = fisher_scores(insert_gates(model, x.flatten(0, 1)), [(x.flatten(0, 1), y.flatten())])
    assert_close(whole["a"], flat["a"], tol=1e-4)
