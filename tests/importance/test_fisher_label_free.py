from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.importance.fisher_label_free import _ROOTS, Outputs, label_free_scores
from sluice.importance.taylor import fisher_scores
from sluice.passes.gates.filter_gates import Gate
from sluice.passes.gates.gating import Gated, close_gates, insert_gates, strip_gates
from sluice.runtime.base.compare import assert_close
from tests import networks, tiny


class Ends(nn.Module):
    """The tiny network with another end."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.body, self.outputs = tiny.Tiny(), outputs
        self.body.load_state_dict(tiny.model().state_dict())

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return torch.sigmoid(3 * z) if self.outputs == "bernoulli" else z


def divergence(outputs: Outputs, student: Tensor, teacher: Tensor) -> float:
    """Mean over samples, in nats; of the unit normal distribution for plain values."""
    if outputs == "categorical":
        log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
        each = log_t.exp() * (log_t - log_s)
    elif outputs == "bernoulli":
        each = teacher * (teacher / student).log() + (1 - teacher) * ((1 - teacher) / (1 - student)).log()
    else:
        each = 0.5 * (student - teacher) ** 2
    return float(each.sum(1).mean())


def gated_of(outputs: Outputs) -> Gated:
    return insert_gates(Ends(outputs).double(), tiny.inputs().double(), steps=10)


def data(count: int = 6) -> list[Tensor]:
    return [x.double() for x, _ in tiny.data()[:count]]


KINDS: tuple[Outputs, ...] = ("categorical", "bernoulli", "gaussian")


@pytest.mark.parametrize("outputs", KINDS)
def test_projections_have_the_curvature_for_covariance(outputs: Outputs) -> None:
    """Over all 32 patterns of signs; the curvature from the divergence itself."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, generator=g, dtype=torch.float64)
    z = torch.sigmoid(z) if outputs == "bernoulli" else z
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    v = _ROOTS[outputs](z.expand(32, 5), signs)

    def loss(x: Tensor) -> Tensor:
        if outputs == "categorical":
            return -(z.softmax(0) * x.log_softmax(0)).sum()
        if outputs == "bernoulli":
            return nn.functional.binary_cross_entropy(x, z, reduction="sum")
        return 0.5 * (x - z).square().sum()

    curvature = torch.autograd.functional.hessian(loss, z)
    assert_close(v.T @ v / 32, curvature, tol=1e-9)
    assert float(v.mean(0).abs().max()) < 1e-12


@pytest.mark.parametrize("outputs", KINDS)
def test_scores_are_twice_the_loss_of_closing_a_little(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, (x, *_) = gated_of(outputs), data()
    draws = 600
    scores = label_free_scores(gated, [x], outputs=outputs, draws=draws)
    gated.eval()
    with torch.no_grad():
        teacher = gated(x)
        for site, gate in gated.gates.items():
            for channel in range(gate.size):
                mask = torch.ones(gate.size, dtype=torch.float64)
                mask[channel] -= 1e-3
                with monkeypatch.context() as patch:
                    patch.setattr(Gate, "forward", lambda g, s=site, m=mask: m if g.site == s else torch.ones(g.size))
                    exact = 2e6 * divergence(outputs, gated(x), teacher)
                # Five standard deviations of the draws, and the third order of the divergence.
                assert scores[site][channel] == pytest.approx(exact, rel=5 * (2 / draws) ** 0.5 + 0.01, abs=1e-9)


@pytest.mark.parametrize("outputs", KINDS)
def test_channels_are_ranked_as_removing_them_ranks_them(outputs: Outputs) -> None:
    gated = gated_of(outputs)
    batches = data()
    scores = label_free_scores(gated, batches, outputs=outputs)
    dense, x = strip_gates(gated).eval(), torch.cat(batches)
    found, lost = [], []
    with torch.no_grad():
        for site, gate in gated.gates.items():
            for channel in range(gate.size):
                closed = close_gates(gated, {site: [c for c in range(gate.size) if c != channel]}).eval()
                found.append(scores[site][channel])
                lost.append(divergence(outputs, closed(x), dense(x)))
    assert spearmanr(found, lost).statistic > 0.95


def test_it_works_where_a_network_against_itself_teaches_nothing() -> None:
    gated = gated_of("categorical")
    with pytest.raises(SluiceError, match="compared with itself"):
        fisher_scores(gated, data(), teacher=strip_gates(gated))
    scores = label_free_scores(gated, data())
    assert set(scores) == {"body.conv1", "body.conv2"}
    assert all(s.dtype == np.float64 and (s > 0).all() for s in scores.values())


def test_a_dead_channel_is_worth_nothing() -> None:
    model = Ends("gaussian")
    state = model.body.state_dict()  # shares the tensors
    state["conv1.weight"][3], state["conv1.bias"][3] = 0.0, -1.0  # never positive
    state["fc.weight"][:, 11] = 0.0  # never read
    scores = label_free_scores(insert_gates(model, tiny.inputs(), steps=10), tiny.data_without_labels())
    assert np.flatnonzero(scores["body.conv1"] == 0).tolist() == [3]
    assert np.flatnonzero(scores["body.conv2"] == 0).tolist() == [11]


def test_a_seed_is_a_result() -> None:
    gated = gated_of("categorical")
    once, again, other = (label_free_scores(gated, data(), seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(once[g], again[g]) for g in once)
    assert all(not np.array_equal(once[g], other[g]) for g in once)


def test_labels_and_batches_beyond_the_last_are_not_read() -> None:
    gated = gated_of("categorical")
    with_labels = [(x, torch.full((len(x),), 77)) for x in data()]
    few, same = label_free_scores(gated, with_labels, batches=2), label_free_scores(gated, data(2))
    assert all(np.array_equal(few[g], same[g]) for g in few)


def test_the_size_of_a_batch_does_not_change_the_scale() -> None:
    """Of copies of one sample every batch says the same."""
    gated, x = gated_of("categorical"), data()[0][:1]
    one, many = (label_free_scores(gated, [x.expand(n, -1, -1, -1)] * 4, draws=200) for n in (1, 9))
    for site in one:
        assert one[site].sum() == pytest.approx(many[site].sum(), rel=0.25)


def test_everything_is_left_as_it_was() -> None:
    model, inputs = networks.build("plain")
    gated = insert_gates(model, inputs, steps=10).train()
    state, random = copy.deepcopy(gated.state_dict()), torch.random.get_rng_state()
    label_free_scores(gated, [inputs[0], inputs[0]], draws=2)
    assert gated.training and torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in gated.state_dict().items())
    assert all(p.grad is None for p in gated.parameters())


def test_what_cannot_be_scored_is_said() -> None:
    gated = gated_of("categorical")
    with pytest.raises(SluiceError, match="no batches"):
        label_free_scores(gated, [])
    with pytest.raises(SluiceError, match="choose one of 'categorical'"):
        label_free_scores(gated, data(), outputs="logits")  # type: ignore[arg-type]
    with pytest.raises(SluiceError, match="draws=0"):
        label_free_scores(gated, data(), draws=0)
    with pytest.raises(SluiceError, match="no probabilities"):
        label_free_scores(gated, data(), outputs="bernoulli")
    with pytest.raises(SluiceError, match="zero or not finite"):
        label_free_scores(gated, [data()[0] * float("nan")])
