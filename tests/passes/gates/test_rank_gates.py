"""Rank and block gates: what they compute, decide and collect; in a network; and under a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice import models
from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.core.plan import FORMS
from sluice.passes.gates.filter_gates import BETA_MAX, BlockGate, Gate, Gates, gate_parameters, other_parameters
from sluice.passes.gates.gating import Gated, close_gates, insert_gates, strip_gates
from sluice.passes.gates.rank_gates import HIGHEST_THRESHOLD, MEMORY, RankGate
from sluice.passes.gates.svt import matricize, svt, unmatricize
from sluice.passes.graph.capture import capture
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.solver.decide import least_ms
from sluice.training.budget import Budget
from sluice.training.expected_latency import TEMPERATURE, ExpectedLatency, alternatives, configured
from sluice.training.train import late
from tests.networks import random_kept

FORM = FORMS[0]


def spectrum(values: list[float], columns: int = 9, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(len(values), columns), full_matrices=False)
    return left @ (torch.tensor(values)[:, None] * right)


def rank_gate(values: list[float], threshold: float) -> tuple[RankGate, Tensor]:
    weight = spectrum(values)
    gate = RankGate("fc.weight", FORM, weight)
    nn.init.constant_(gate.theta, math.log(threshold))
    return gate, weight


# -- one gate


@pytest.mark.parametrize(
    ("values", "start"),
    [([2.0, 1.0, 0.5, 0.1], 5e-3), ([2.0, 1.0, 0.5, 0.5], 1e-2), ([2.0, 1.0, 0.5, 0.0], 1e-3), ([0.0, 0.0], 1e-3)],
)
def test_starts_almost_as_identity(values: list[float], start: float) -> None:
    weight = spectrum(values)
    gate = RankGate("w", FORM, weight)
    assert math.exp(gate.theta.item()) == pytest.approx(start, rel=1e-3)
    full = sum(v > 0 for v in values)
    assert gate.size == len(values) and gate.width() == gate.soft_width().item() == max(full, 1)
    assert_close(gate(weight), weight, 0.03)
    if full:
        assert relative_error(gate(weight), weight) > 1e-4
        (slope,) = torch.autograd.grad(gate.soft_width(), gate.theta)
        assert slope.item() < -0.002, "a budget must be able to pull from the start"


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_definition(form: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    gate = RankGate("w", form, weight)
    nn.init.constant_(gate.theta, math.log(0.6))
    matrix = matricize(weight, form)
    top = torch.linalg.svdvals(matrix)[0]
    assert gate.size == min(matrix.shape)
    assert_close(matricize(gate(weight), form), svt(matrix, 0.6 * top), 1e-6)
    assert 1 < gate.width() == int((torch.linalg.svdvals(matrix) > 0.6 * top).sum()) < gate.size
    assert int(torch.linalg.matrix_rank(matricize(gate(weight), form), rtol=1e-6)) == gate.width()


def test_gradients_treat_the_largest_singular_value_as_a_constant() -> None:
    gate, weight = rank_gate([2.0, 1.4, 0.9, 0.3], 0.5)
    g = torch.randn(4, 9)
    w = weight.clone().requires_grad_()
    by_theta, by_weight = torch.autograd.grad((g * gate(w)).sum(), (gate.theta, w))
    m, tau = weight.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    by_tau, expected = torch.autograd.grad((g * svt(m, tau)).sum(), (tau, m))
    assert_close(by_weight, expected, 1e-4)
    assert_close(by_theta, by_tau * 1.0, 1e-4)  # d tau / d theta = tau = 1


def test_soft_rank_counts_decisions_and_has_the_gradient_of_the_sigmoids() -> None:
    values = [2.0, 1.4, 0.9, 0.3]
    gate, _ = rank_gate(values, 0.5)
    gate.sharpen(3.0)
    rank = gate.soft_width()
    assert rank.item() == gate.width() == 2
    (found,) = torch.autograd.grad(rank, gate.theta)

    def soft(theta: float) -> float:
        return sum(1 / (1 + math.exp(-3.0 * (math.log(v / 2.0) - theta))) for v in values)

    at = math.log(0.5)
    assert found.item() == pytest.approx((soft(at + 1e-4) - soft(at - 1e-4)) / 2e-4, rel=1e-3)


def test_a_rank_is_left_whatever_the_threshold() -> None:
    gate, weight = rank_gate([2.0, 2.0 - 1e-3, 1.0], 0.9)
    nn.init.constant_(gate.theta, 3.0)
    assert gate.width() == 2
    assert gate(weight).norm() > 0
    (gradient,) = torch.autograd.grad(gate.soft_width(), gate.theta)
    assert gradient.item() < 0, "beyond the cap the threshold must be able to come back"
    gate.sharpen(1.0)
    assert gate.theta.item() == pytest.approx(math.log(HIGHEST_THRESHOLD))


def test_hard_rank() -> None:
    gate, weight = rank_gate([2.0, 1.4, 0.9, 0.3], 0.2)
    gate.eval()
    free = gate(weight)
    for rank in (4, 3, 2, 1):
        gate.set_decision(rank)
        cut = gate(weight)
        assert gate.width() == min(rank, 3)
        left, values, right = torch.linalg.svd(free)
        assert_close(cut, left[:, :rank] @ (values[:rank, None] * right[:rank]), 1e-5)
    with pytest.raises(SluiceError, match=r"rank 5 of 'fc\.weight' is not within 1 to 4"):
        gate.set_decision(5)
    tall = RankGate("w", FORM, weight.T)
    tall.set_decision(2)
    assert int(torch.linalg.matrix_rank(tall(weight.T).detach(), rtol=1e-5)) == 2


def test_importance_of_directions() -> None:
    gate, weight = rank_gate([2.0, 1.4, 0.9, 0.3], 0.5)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    g = torch.randn(4, 9)
    effect = torch.stack([(s - 1.0).clamp(min=0) * (u @ g @ v) for s, u, v in zip(values, left.T, right, strict=True)])
    w = weight.clone().requires_grad_()
    ((g * gate(w)).sum() + 100.0 * gate.soft_width()).backward()
    assert_close(gate.fisher, effect**2, 1e-4)
    (g * gate(w)).sum().backward()
    assert_close(gate.fisher, (1 + MEMORY) * effect**2, 1e-4)
    seen = gate.fisher.clone()
    gate.eval()
    (g * gate(w)).sum().backward()
    assert torch.equal(gate.fisher, seen)


def test_directions_are_kept_between_refreshes_and_never_in_eval() -> None:
    gate, weight = rank_gate([2.0, 1.4, 0.9, 0.3], 0.3)
    moved = weight + 0.05 * torch.randn(4, 9)

    def fresh() -> Tensor:
        return svt(moved, 0.3 * float(torch.linalg.svdvals(moved)[0]))

    gate.train()
    gate(weight)
    kept = gate.basis.clone()
    old = gate(moved)
    assert torch.equal(gate.basis, kept)
    assert 1e-4 < relative_error(old.detach(), fresh()) < 0.1
    gates = Gates({}, 10, [gate], refresh=2)
    gates.step()
    gates.refresh(lambda name: {"fc.weight": moved}[name])
    assert torch.equal(gate.basis, kept), "not due"
    gates.step()
    gates.refresh(lambda name: {"fc.weight": moved}[name])
    assert_close(gate(moved).detach(), fresh(), 1e-5)
    gate.eval()
    assert_close(gate(weight).detach(), svt(weight, 0.6), 1e-4)
    assert_close(gate(moved).detach(), fresh(), 1e-5)
    with pytest.raises(SluiceError, match=r"'fc\.weight' is not finite"):
        gate.train()(moved * math.nan)


def test_block_gate() -> None:
    gate = BlockGate("layer1.0")
    assert gate.site == "layer1.0|drop" and gate.width() == 0 and gate.soft_width().item() == 0.0
    assert gate().tolist() == [1.0]
    (2.0 * gate()).sum().backward()
    assert gate.fisher.tolist() == [4.0]
    nn.init.constant_(gate.open.logit, -1.0)
    assert gate.width() == 1 and gate.soft_width().item() == 1.0
    (slope,) = torch.autograd.grad(gate.soft_width(), gate.open.logit)
    assert float(slope) < 0
    gate.set_decision(True)
    assert gate().tolist() == [0.0]
    gate.set_decision(False)
    assert gate().tolist() == [1.0]


def test_all_kinds_share_schedule_state_and_parameter_groups() -> None:
    def make() -> Gates:
        return Gates({"a": 3}, 4, [RankGate("w", FORM, spectrum([2.0, 1.0, 0.5]))], ["b.0"])

    gates, again = make(), make()
    assert list(gates) == ["a", f"w|{FORM}|rank", "b.0|drop"]
    rank, block = gates[f"w|{FORM}|rank"], gates["b.0|drop"]
    assert isinstance(rank, RankGate) and isinstance(block, BlockGate)
    for beta in [BETA_MAX**f for f in (0.0, 0.0, 0.5, 1.0)]:
        gates.step()
        assert float(rank.kappa) == float(block.open.beta) == pytest.approx(beta)
    nn.init.constant_(rank.theta, math.log(0.4))
    rank.fisher.uniform_()
    block.set_decision(True)
    rank.set_decision(1)
    again.load_state_dict(gates.state_dict())
    assert again.widths() == gates.widths() == {"a": 3, f"w|{FORM}|rank": 1, "b.0|drop": 1}
    assert int(again.progress) == 4
    for key, value in gates.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert [tuple(p.shape) for p in gate_parameters(gates)] == [(3,), (), (1,)]
    assert not other_parameters(gates)
    with pytest.raises(SluiceError, match="refresh=0"):
        Gates({}, 4, refresh=0)


# -- in a network


class Residual(nn.Module):
    """A stem, two residual branches (one ends in a norm, one in a bare convolution) and a head of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.a1, self.n1 = nn.Conv2d(7, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.a2, self.n2 = nn.Conv2d(5, 7, (3, 5), padding=(1, 2), bias=False), nn.BatchNorm2d(7)
        self.b1 = nn.Conv2d(7, 6, 3, padding=1)
        self.b2 = nn.Conv2d(6, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.n2(self.a2(torch.relu(self.n1(self.a1(x)))))
        x = x + self.b2(torch.relu(self.b1(x)))
        logits: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits


RANKS = {"a1.weight": FORMS[0], "a2.weight": FORMS[2], "b1.weight": FORMS[1], "b2.weight": FORMS[0]}
BLOCKS = {"a": ("n2.weight", "n2.bias"), "b": ("b2.weight", "b2.bias")}


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 8, 7)
    model = Residual()
    for norm in (model.n1, model.n2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        for _ in range(20):
            model(inputs)
    return model.eval(), inputs


def rank_gates(gated: Gated) -> Iterator[RankGate]:
    return (gate for _, gate in gated.gates.items() if isinstance(gate, RankGate))


def set_shares(gated: Gated, shares: list[float]) -> None:
    for gate, share in zip(rank_gates(gated), itertools.cycle(shares)):
        nn.init.constant_(gate.theta, math.log(share))


def test_stripping_gives_the_captured_network_back() -> None:
    model, inputs = network()
    gated = insert_gates(model, inputs, ranks=RANKS, blocks=BLOCKS)
    captured, stripped = capture(model, inputs), strip_gates(gated)
    assert stripped.code == captured.code
    assert [n.name for n in stripped.graph.nodes] == [n.name for n in captured.graph.nodes]
    assert stripped.state_dict().keys() == model.state_dict().keys()
    assert_close(stripped(inputs), model(inputs))
    assert relative_error(gated(inputs), model(inputs)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_closing_is_exact(seed: int) -> None:
    """Filters, ranks and blocks closed by hand, against the hard gated network; and none of them is idle."""
    model, inputs = network()
    gated = insert_gates(model, inputs, ranks=RANKS, blocks=BLOCKS)
    for gate in rank_gates(gated):  # between two singular values
        above, below = gate.values[gate.size - 3 : gate.size - 1] / gate.values[0]
        nn.init.constant_(gate.theta, 0.5 * math.log(above * below))
    kept = random_kept(gated.meta["space"].analysis, seed)
    ranks, dropped = {}, [name for k, name in enumerate(BLOCKS) if seed & (1 << k)]
    for site, gate in gated.gates.items():
        if isinstance(gate, RankGate):
            gate(model.get_parameter(gate.param))
            gate.set_decision(rank := gate.width())
            assert rank < gate.size
            ranks[gate.param] = (gate.form, rank)
        elif isinstance(gate, BlockGate):
            gate.set_decision(site.removesuffix("|drop") in dropped)
        else:
            gate.set_decision(torch.isin(torch.arange(gate.size), torch.tensor(kept[site])))
    closed = close_gates(gated, kept, ranks=ranks, blocks=dropped)
    assert_close(closed(inputs), gated(inputs))
    assert closed.state_dict().keys() == model.state_dict().keys()
    for param, (form, rank) in ranks.items():
        found = torch.linalg.matrix_rank(matricize(closed.get_parameter(param), form), rtol=1e-5)
        assert int(found) <= rank
    for name in dropped:
        assert not any(closed.get_parameter(tensor).any() for tensor in BLOCKS[name])
    looser = {param: (form, rank + 1) for param, (form, rank) in ranks.items()}
    assert_close(close_gates(gated, kept, ranks=looser, blocks=dropped)(inputs), gated(inputs))
    tighter = {**ranks, "a1.weight": (FORMS[0], ranks["a1.weight"][1] - 1)}
    wrong = [close_gates(gated, kept, ranks=ranks, blocks=[n for n in BLOCKS if n not in dropped])]
    wrong += [close_gates(gated, {}, ranks=ranks, blocks=dropped)]
    wrong += [close_gates(gated, kept, ranks=tighter, blocks=dropped)] if "a" not in dropped else []
    assert all(relative_error(other(inputs), gated(inputs)) > 1e-3 for other in wrong)


def test_a_rank_is_cut_from_what_the_masks_leave() -> None:
    model, inputs = network()
    gated = insert_gates(model, inputs)
    kept = {"a1": [0, 3], "stem": [1, 2, 4]}
    closed = close_gates(gated, kept, ranks={"a1.weight": (FORM, 1)})
    own = model.get_parameter("a1.weight")[[0, 3]][:, [1, 2, 4]]
    left, values, right = torch.linalg.svd(own.flatten(1), full_matrices=False)
    best = (left[:, :1] @ (values[:1, None] * right[:1])).reshape(own.shape)
    assert_close(closed.get_parameter("a1.weight")[[0, 3]][:, [1, 2, 4]], best, 1e-5)


def test_refresh_at_every_step_is_exact_and_otherwise_close() -> None:
    """Gradients of every parameter after steps of training, against the definition on the plain network."""
    torch.manual_seed(1)
    worst = {}
    for refresh in (1, 4):
        model, inputs = network()
        gated = insert_gates(model.train(), inputs, ranks=RANKS, refresh=refresh, kinds=())
        set_shares(gated, [0.5])
        optimizer = torch.optim.SGD(other_parameters(gated), 0.02)
        labels = torch.arange(6) % 4
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(gated(inputs), labels).backward()
            optimizer.step()
            gated.step()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gated(inputs), labels)
        loss.backward()
        plain = strip_gates(gated).train()
        state = {}
        for name, parameter in plain.named_parameters():
            state[name] = parameter
            if name in RANKS:
                matrix = matricize(parameter, RANKS[name])
                low = svt(matrix, 0.5 * float(torch.linalg.svdvals(matrix.detach())[0]))
                state[name] = unmatricize(low, RANKS[name], parameter.shape)
        reference = nn.functional.cross_entropy(torch.func.functional_call(plain, state, (inputs,)), labels)
        reference.backward()
        errors = [relative_error(loss.detach(), reference.detach())]
        errors += [
            relative_error(gated.get_parameter(n).grad, p.grad)
            for n, p in plain.named_parameters()
            if p.grad is not None
        ]
        worst[refresh] = max(errors)
    assert worst[1] < 1e-4
    assert 1e-4 < worst[4] < 0.2


def test_gates_of_all_kinds_learn_and_collect() -> None:
    model, inputs = network()
    gated = insert_gates(model.train(), inputs, steps=5, ranks=RANKS, blocks=BLOCKS, kinds=("filter", "rank", "block"))
    nn.functional.cross_entropy(gated(inputs), torch.arange(6) % 4).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gated.parameters())
    assert all(float(gate.fisher.sum()) > 0 for _, gate in gated.gates.items())
    assert len(gate_parameters(gated)) == len(gated.gates) == 3 + 4 + 2


def test_shared_weight_is_thresholded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))))
            return out

    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(3, 5)
    gated = insert_gates(model, inputs, ranks={"again.weight": FORM})
    set_shares(gated, [0.6])
    calls = [n for n in gated.graph.nodes if n.op == "call_module" and "rank" in str(n.target)]
    assert len(calls) == 1
    assert_close(strip_gates(gated)(inputs), model(inputs))
    low = svt(model.again.weight.detach(), 0.6 * float(torch.linalg.svdvals(model.again.weight.detach())[0]))
    model.again.weight.data.copy_(low)
    assert_close(gated(inputs), model(inputs), 1e-4)


def test_half_precision_and_autocast() -> None:
    model, inputs = network()
    gated = insert_gates(model.train(), inputs, ranks=RANKS, blocks=BLOCKS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.cross_entropy(gated(inputs), torch.arange(6) % 4).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gated.parameters())
    half = insert_gates(model.to(torch.bfloat16), inputs.to(torch.bfloat16), ranks=RANKS, blocks=BLOCKS)
    assert half(inputs.to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    model, inputs = network()
    with pytest.raises(SluiceError, match="'layer' is no kind of gate"):
        insert_gates(model, inputs, kinds=("filter", "layer"))
    with pytest.raises(SluiceError, match="kind 'rank' has no place to go"):
        insert_gates(model, inputs, kinds=("rank",))
    with pytest.raises(SluiceError, match=r"cannot gate 'a9\.weight'"):
        insert_gates(model, inputs, ranks={"a9.weight": FORM})
    with pytest.raises(SluiceError, match=r"cannot gate 'n1\.running_mean'"):
        insert_gates(model, inputs, blocks={"a": ("n1.running_mean",)})
    with pytest.raises(SluiceError, match="has no form"):
        insert_gates(model, inputs, ranks={"head.weight": FORMS[2]})
    gated = insert_gates(model, inputs, ranks=RANKS, blocks=BLOCKS)
    with pytest.raises(SluiceError, match="block 'c' has no gate"):
        close_gates(gated, {}, blocks=["c"])
    with pytest.raises(SluiceError, match=r"cannot factorize 'a9\.weight'"):
        close_gates(gated, {}, ranks={"a9.weight": (FORM, 1)})
    with pytest.raises(SluiceError, match=r"bad factorization of 'a1\.weight': .* rank 0"):
        close_gates(gated, {}, ranks={"a1.weight": (FORM, 0)})


def test_resnet_with_gates_of_all_kinds() -> None:
    model, inputs = models.resnet20().eval(), torch.randn(2, 1, 28, 28)
    weights = {n: FORMS[0] for n, p in model.named_parameters() if p.ndim == 4 and p.shape[1] > 1}
    gated = insert_gates(model, inputs, ranks=weights)
    assert relative_error(gated(inputs), model(inputs)) < 0.2
    assert_close(strip_gates(gated)(inputs), model(inputs))


# -- expected latency


def structured() -> LatencyModel:
    """Two layers, each dense or factorised; the second lies in a block; both in a merge; and something always there."""
    p, q = f"p|{FORM}", f"q|{FORM}"
    dense = {"a": 16, "b": 12, f"{p}|rank": 12, f"{q}|rank": 9}
    switches = {"p|dense": 1, p: 0, "q|dense": 1, q: 0, "blk|drop": 0, "p..q|merge": 0}
    one = {name: Extent(((name, 1),)) for name in dense}

    def term(name: str, sites: list[str], unit: float, base: float, *when: str, weight: float = 1.0) -> Term:
        knots = tuple(np.array([1.0, 0.25 * dense[s], 0.6 * dense[s], dense[s]]) for s in sites)
        ms = base + unit * np.asarray(1.0 if not knots else math.prod(np.meshgrid(*knots, indexing="ij")))
        return Term(name, tuple(one[s] for s in sites), knots, ms, weight, when)

    terms = (
        term("always", ["a"], 0.01, 0.1),
        term("p dense", ["a", "b"], 0.01, 0.05, "p|dense"),
        term("p low", [f"{p}|rank", "b"], 0.02, 0.1, p),
        term("q dense", ["b"], 0.1, 0.1, "q|dense", weight=2.0),
        term("q low", [f"{q}|rank", "b"], 0.03, 0.1, q),
        term("joint", ["b"], 0.002, 0.0, "q|dense", q, weight=-1.0),
        term("gone", [], 0.0, 0.03, "blk|drop"),
        term("merged", ["a"], 0.05, 0.1, "p..q|merge"),
    )
    rules = (
        Rule((("p|dense", 1), (p, 1), ("p..q|merge", 1))),
        Rule((("q|dense", 1), (q, 1), ("blk|drop", 1), ("p..q|merge", 1))),
    )
    levels = {g: tuple(sorted({max(1, n // 4), n // 2, n})) for g, n in dense.items()} | {s: (0, 1) for s in switches}
    return LatencyModel(terms, dense | switches, levels, 0.2, 1.1, rules=rules, switches=frozenset(switches))


def test_values_and_gradients_with_given_switches() -> None:
    model = structured()
    expected = ExpectedLatency(model, smooth=False)
    rng = np.random.default_rng(0)
    for k in range(30):
        sizes = rng.uniform(1, 12, 4) + 0.013
        switches = rng.integers(0, 2, 6).astype(float) if k % 2 else rng.uniform(0.1, 0.9, 6)
        at = dict(zip(model.dense, [*sizes.tolist(), *switches.tolist()], strict=True))
        w = torch.tensor(list(at.values()), dtype=torch.float64, requires_grad=True)
        value = expected(w)
        assert value.item() == pytest.approx(model.ms(at), rel=1e-9)
        (slope,) = torch.autograd.grad(value, w)
        for index, site in enumerate(model.dense):
            numeric = (model.ms({**at, site: at[site] + 1e-6}) - model.ms({**at, site: at[site] - 1e-6})) / 2e-6
            assert slope[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_only_what_a_gate_leaves_open_is_settled() -> None:
    model = structured()
    layers = alternatives(model, {f"p|{FORM}|rank", f"q|{FORM}|rank", "blk|drop", "p..q|merge"})
    assert [(layer.options, layer.drops) for layer in layers] == [
        (("p|dense", f"p|{FORM}"), ("p..q|merge",)),
        (("q|dense", f"q|{FORM}"), ("blk|drop", "p..q|merge")),
    ]
    budget = Budget({"a": Gate("a", 16)}, model, "90%", steps=5)
    assert budget._layers == ()
    assert budget.expected_ms().item() == pytest.approx(model.dense_ms())


def test_layers_take_the_cheapest_alternative_with_the_softmins_slope() -> None:
    model = structured()
    free = {"a", "b", f"p|{FORM}|rank", f"q|{FORM}|rank", "blk|drop"}
    layers = alternatives(model, free | {"p..q|merge"})
    expected = ExpectedLatency(model, smooth=False, layers=layers)
    rng = np.random.default_rng(3)
    chosen = set()

    def priced(at: Mapping[str, float], low: tuple[bool, bool], drop: float) -> float:
        switches = {}
        for layer, factorised, on in (("p", low[0], 1.0), ("q", low[1], 1.0 - drop)):
            switches |= {f"{layer}|dense": on * (not factorised), f"{layer}|{FORM}": on * factorised}
        return model.ms({**model.dense, **at, **switches, "blk|drop": drop})

    def cost(layer: str, low: bool, at: Mapping[str, float]) -> float:
        switch = f"{layer}|{FORM}" if low else f"{layer}|dense"
        return model.slope * sum(t.weight * t.at({**model.dense, **at}) for t in model.terms if switch in t.when)

    def softmin(at: Mapping[str, float], drop: float, unit: Mapping[str, float]) -> float:
        total = priced(at, (False, False), drop) - cost("p", False, at) - (1 - drop) * cost("q", False, at)
        for layer, on in (("p", 1.0), ("q", 1 - drop)):
            shares = [math.exp(-cost(layer, low, at) / unit[layer]) for low in (False, True)]
            total -= on * unit[layer] * math.log(sum(shares))
        return total

    for k in range(25):
        sizes = dict(zip(list(model.dense)[:4], (rng.uniform(1, 12, 4) + 0.013).tolist(), strict=True))
        drop = float(k % 5 == 0)
        values = {**sizes, "blk|drop": drop}
        w = {s: torch.tensor(v, dtype=torch.float64, requires_grad=True) for s, v in values.items()}
        total = expected(w)
        prices = [priced(sizes, low, drop) for low in itertools.product((False, True), repeat=2)]
        assert total.item() == pytest.approx(min(prices), rel=1e-9)
        full = configured(model, values, layers)
        assert model.ms(full) == pytest.approx(total.item(), rel=1e-9)
        assert all(rule.holds(full) for rule in model.rules)
        chosen.add((full["p|dense"], full["q|dense"]))
        unit = {layer: TEMPERATURE * cost(layer, False, sizes) for layer in "pq"}
        slopes = dict(zip(w, torch.autograd.grad(total, list(w.values())), strict=True))
        by_drop = slopes.pop("blk|drop").item()
        both = np.array([cost("q", low, sizes) for low in (False, True)])
        shares = np.exp(-both / unit["q"]) / np.exp(-both / unit["q"]).sum()
        gone = model.slope * next(float(t.ms) for t in model.terms if t.name == "gone")
        assert by_drop == pytest.approx(gone - float(shares @ both), rel=1e-6)
        for site, slope in slopes.items():
            up, down = ({**sizes, site: sizes[site] + e} for e in (1e-6, -1e-6))
            numeric = (softmin(up, drop, unit) - softmin(down, drop, unit)) / 2e-6
            assert slope.item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)
            assert slope.item() >= 0
    assert len(chosen) >= 3


def test_what_is_read_again_counts_in_the_value_of_what_would_be_built() -> None:
    """Beyond what the caches hold it has a gradient; up to there value and gradient are those without."""
    plain = structured()
    terms = tuple(replace(t, reload=0.5 * t.ms) if t.weight > 0 else t for t in plain.terms)
    model = replace(plain, terms=terms)
    model = replace(model, cached_ms=0.6 * model.reload_ms(model.dense))
    layers = alternatives(model, {"a", "b", f"p|{FORM}|rank", f"q|{FORM}|rank", "blk|drop", "p..q|merge"})
    expected, without = (ExpectedLatency(m, smooth=False, layers=layers) for m in (model, plain))
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(40):
        at = dict(zip(list(model.dense)[:4], (rng.uniform(1, 16, 4) + 0.013).tolist(), strict=True))
        w = {s: torch.tensor(v, dtype=torch.float64, requires_grad=True) for s, v in at.items()}
        full = configured(model, at, layers)
        value = expected(w)
        assert value.item() == pytest.approx(model.ms(full), rel=1e-9)
        seen.add(beyond := model.reload_ms(full) > 0)
        slopes, other = (torch.autograd.grad(f(w), list(w.values())) for f in (expected, without))
        for slope, less in zip(slopes, other, strict=True):
            assert slope.item() >= less.item() - 1e-12 if beyond else slope.item() == pytest.approx(less.item())
        assert not beyond or sum(slopes).item() > 1.01 * sum(other).item()
    assert seen == {True, False}


def test_expected_latency_is_monotone() -> None:
    model = structured()
    free = ["a", "b", f"p|{FORM}|rank", f"q|{FORM}|rank"]
    layers = alternatives(model, {*free, "blk|drop", "p..q|merge"})
    for smooth in (False, True):
        expected = ExpectedLatency(model, smooth=smooth, layers=layers)
        rng = np.random.default_rng(1)
        for _ in range(20):
            at = {s: torch.tensor(v, dtype=torch.float64) for s, v in zip(free, rng.uniform(1, 11, 4), strict=True)}
            for site in free:
                assert expected({**at, site: at[site] + 1.0}) >= expected(at) - 1e-12


# -- under a budget


def bench(layers: int, blocks: bool) -> tuple[LatencyModel, dict[str, Tensor]]:
    """A chain of layers with random weights, each of which may be factorised and, if ``blocks``, dropped."""
    dense: dict[str, int] = {}
    switches: dict[str, int] = {}
    terms, rules, weights = [Term("fixed", (), (), np.asarray(0.1))], [], {}
    for k in range(layers):
        name, n = f"l{k}.weight", 6 + 2 * k
        rank = f"{name}|{FORM}|rank"
        weights[name] = spectrum([2.0 * 0.8**i for i in range(n)], columns=3 * n + 1, seed=k)
        dense |= {f"g{k}": n, rank: n}
        knots = (np.arange(1.0, n + 1),) * 2
        wide, low = (Extent(((s, 1),)) for s in (f"g{k}", rank))
        terms.append(Term(f"{name} dense", (wide,), knots[:1], 0.1 * knots[0], 1.0, (f"{name}|dense",)))
        ms = 0.07 * np.outer(knots[0], 1 + knots[1] / n)
        terms.append(Term(f"{name} low", (low, wide), knots, ms, 1.0, (f"{name}|{FORM}",)))
        own = [f"{name}|dense", f"{name}|{FORM}", *([f"b{k}|drop"] if blocks else [])]
        switches |= {s: int(s.endswith("dense")) for s in own}
        rules.append(Rule(tuple((s, 1) for s in own)))
    levels = {g: tuple(range(1, n + 1)) for g, n in dense.items()} | {s: (0, 1) for s in switches}
    model = LatencyModel(tuple(terms), dense | switches, levels, rules=tuple(rules), switches=frozenset(switches))
    return model, weights


SLOWLY = [pytest.param(kinds, marks=pytest.mark.slow) for kinds in (("rank",), ("filter", "rank"))]


@pytest.mark.parametrize("kinds", [("block",), ("filter", "rank", "block"), *SLOWLY])
def test_budget_is_met_by(kinds: tuple[str, ...]) -> None:
    steps, layers = 300, 7
    torch.manual_seed(0)
    model, weights = bench(layers, "block" in kinds)
    gates = Gates(
        {f"g{k}": 6 + 2 * k for k in range(layers)} if "filter" in kinds else {},
        steps,
        [RankGate(name, FORM, w) for name, w in weights.items()] if "rank" in kinds else [],
        [f"b{k}" for k in range(layers)] if "block" in kinds else [],
    )
    budget = Budget(dict(gates.items()), model, "55%", steps=steps)
    assert budget.expected_ms().item() == pytest.approx(budget.dense_ms)
    assert budget.model.ms(budget.configuration()) == pytest.approx(budget.dense_ms)
    assert budget.least_ms == pytest.approx(least_ms(budget.model).promised_ms)
    utility = {s: torch.rand(gate.size) + 0.2 for s, gate in gates.items()}
    optimizer = torch.optim.Adam(gate_parameters(gates), 0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, late(steps))
    for _ in range(steps):
        loss = torch.zeros(())
        for site, gate in gates.items():
            if isinstance(gate, RankGate):
                w = weights[gate.param]
                loss = loss + (gate(w) - w).square().sum() / w.square().sum()
            else:
                loss = loss + (utility[site] * (1 - gate()) ** 2).sum()
        optimizer.zero_grad()
        (loss + budget.penalty()).backward()
        optimizer.step()
        schedule.step()
        budget.step()
        gates.step()
    found = budget.configuration()
    assert all(rule.holds(found) for rule in model.rules)
    assert budget.model.ms(budget.configuration()) == pytest.approx(model.ms(found))
    # Whole blocks cannot come closer to a budget than one of them.
    slack = 0.1 * (6 + 2 * (layers - 1)) if "block" in kinds else 0.03 * budget.target_ms
    assert abs(budget.model.ms(budget.configuration()) - budget.target_ms) <= slack
    low = sum(found[s] for s in found if s.endswith(FORM))
    gone = sum(found[s] for s in found if s.endswith("drop"))
    assert (low >= 2) == ("rank" in kinds)
    assert (1 <= gone < layers) == ("block" in kinds)
    if "filter" not in kinds:
        assert all(found[f"g{k}"] == 6 + 2 * k for k in range(layers))


def test_reachability_counts_only_what_has_a_gate() -> None:
    model, weights = bench(3, True)
    gates = Gates({}, 5, [RankGate(name, FORM, w) for name, w in weights.items()])
    least = least_ms(model).promised_ms
    budget = Budget(dict(gates.items()), model, "90%", steps=5)
    assert least < budget.least_ms < budget.target_ms
    with pytest.raises(SluiceError, match="cannot be met: widths, ranks and depth together reach"):
        Budget(dict(gates.items()), model, f"{(least + budget.least_ms) / 2}ms", steps=5)
    with pytest.raises(SluiceError, match=r"gate 'x\|drop' has no place"):
        Budget({"x|drop": BlockGate("x")}, model, "90%", steps=5)


def test_gated_network_under_a_budget() -> None:
    """All kinds at once through the public calls; what closes is what the budget counts."""
    model, inputs = network()
    gated = insert_gates(model.train(), inputs, steps=60, ranks=RANKS, blocks=BLOCKS)
    sizes = {s: g.size for s, g in gated.gates.items() if isinstance(g, Gate)}
    ranks = {s: g.size for s, g in gated.gates.items() if isinstance(g, RankGate)}
    dense, levels, terms, rules = dict(sizes), {}, [], []
    for site, n in ranks.items():
        param = site.split("|")[0]
        switch, whole = site.removesuffix("|rank"), f"{param}|dense"
        knots = np.arange(1.0, n + 1)
        terms.append(Term(site, (Extent(((site, 1),)),), (knots,), knots / n, 1.2, (switch,)))
        terms.append(Term(param, (), (), np.asarray(1.0), 1.0, (whole,)))
        drop = ["a|drop"] if param[0] == "a" else ["b|drop"]
        rules.append(Rule(tuple((s, 1) for s in (whole, switch, *drop))))
        dense |= {site: n}
    switches = {s: int(s.endswith("dense")) for rule in rules for s, _ in rule.coefs}
    for group, n in sizes.items():
        knots = np.arange(1.0, n + 1)
        terms.append(Term(group, (Extent(((group, 1),)),), (knots,), knots / n))
    levels = {g: tuple(range(1, n + 1)) for g, n in dense.items()} | {s: (0, 1) for s in switches}
    latency = LatencyModel(tuple(terms), dense | switches, levels, rules=tuple(rules), switches=frozenset(switches))
    budget = Budget(gated, latency, "60%")
    optimizer = torch.optim.Adam(
        [{"params": other_parameters(gated), "lr": 1e-3}, {"params": gate_parameters(gated), "lr": 0.1}]
    )
    labels = torch.arange(6) % 4
    for _ in range(60):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(gated(inputs), labels) + budget.penalty()).backward()
        optimizer.step()
        gated.step()
    assert budget.expected_ms().item() <= 1.05 * budget.target_ms
    assert budget.model.ms(budget.configuration()) < 0.75 * budget.dense_ms
