"""Capture: same names, same numbers, both modes, any batch, and the caller's module as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import insert_gates, strip_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.runtime.base.compare import assert_close
from tests.networks import NETWORKS, build


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_same_names_and_numbers_for_every_batch(name: str) -> None:
    model, inputs = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = capture(model, inputs)
    assert list(gm.state_dict()) == list(before)
    assert [n for n, _ in gm.named_parameters()] == [n for n, _ in model.named_parameters()]
    for batch in (3, 1, 5):
        x = tuple(torch.randn(batch, *i.shape[1:]) for i in inputs)
        assert_close(gm(*x), model(*x), 1e-6)
    with torch.no_grad():
        for p in gm.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_one_example_is_not_one_for_ever() -> None:
    model, (x,) = build("plain", batch=1)
    gm = capture(model, x)
    more = torch.randn(4, *x.shape[1:])
    assert_close(gm(more), model(more), 1e-6)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_batch_norm_in_both_modes(momentum: float | None) -> None:
    model, (x,) = build("plain")
    model.bn1.momentum = momentum  # type: ignore[union-attr,assignment]
    model.train()
    gm = capture(model, x)
    assert gm.training and isinstance(gm.bn1, BatchNorm) and gm.bn1.training
    for _ in range(3):
        batch = torch.randn(5, *x.shape[1:])
        with torch.no_grad():
            assert_close(gm(batch), model(batch), 1e-5)
    for key, value in model.state_dict().items():
        assert_close(gm.state_dict()[key], value, 1e-6, key)
    assert int(gm.bn1.num_batches_tracked) == 3
    with torch.no_grad():
        assert_close(gm.eval()(x), model.eval()(x), 1e-5)


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.drop2 = nn.Conv2d(2, 3, 1), nn.Dropout(0.5), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop2(self.drop(self.conv(x))), 0.5, self.training)


def test_dropout_in_both_modes() -> None:
    model, x = Drops(), torch.rand(3, 2, 5, 4) + 1
    gm = capture(model, x)
    modules = [m for m in gm.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]
    assert len(modules) == 3 and isinstance(gm.drop, nn.Dropout) and all(m.training for m in modules)
    assert (gm(x) == 0).any()
    gm.eval()
    assert_close(gm(x), model.eval()(x), 1e-6)
    assert list(gm.state_dict()) == list(model.state_dict())


class Forms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> dict[str, Any]:
        y = self.a(left) * scale + self.b(right)
        return {"sum": y, "rest": [y.relu(), (y.abs(), y.neg())]}


@torch.no_grad()
def test_forms_of_inputs_and_outputs() -> None:
    model = Forms()
    left, right = torch.rand(3, 3), torch.rand(3, 5)
    expected = model(left, right)
    for gm, call in (
        (capture(model, (left, right)), lambda m: m(left, right)),
        (capture(model, [left, right]), lambda m: m(left, right)),
        (capture(model, {"left": left, "right": right}), lambda m: m(left=left, right=right)),
    ):
        out = call(gm)
        assert_close(out, expected, 1e-6)
        assert isinstance(out["rest"], list) and isinstance(out["rest"][1], tuple)
    single = capture(nn.Linear(3, 2), left)
    assert single(torch.rand(7, 3)).shape == (7, 2)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.arange(6.0).reshape(2, 3)


@torch.no_grad()
def test_a_model_that_fixes_its_batch() -> None:
    model, x = FixedBatch(), torch.rand(2, 4)
    gm = capture(model, x)
    assert_close(gm(x), model(x), 1e-6)
    assert not gm.meta["sluice_capture"]["dynamic"]
    assert capture(nn.Linear(4, 3), x).meta["sluice_capture"]["dynamic"], "the example is not marked by the attempt"
    assert not capture(nn.Linear(4, 3), x, dynamic_batch=False).meta["sluice_capture"]["dynamic"]


@torch.no_grad()
def test_graph_modules() -> None:
    model, inputs = build("plain")
    traced = fx.symbolic_trace(model)
    gm = capture(traced, inputs)
    assert_close(gm(*inputs), model(*inputs), 1e-6)
    again = capture(gm, inputs)
    assert again is not gm and again.code == gm.code
    assert again.conv1.weight is not gm.conv1.weight
    assert_close(again(*inputs), gm(*inputs), 0.0)


def test_unused_and_tied_parameters() -> None:
    model, inputs = build("tied")
    gm = capture(model, inputs)
    for network in (gm, clone(gm), clone(clone(gm))):
        assert torch.equal(network.unused, model.unused)  # type: ignore[arg-type]
        assert network.encode.weight is network.decode.weight
        assert list(network.state_dict()) == list(model.state_dict())


class Ordered(nn.Linear):
    """A buffer that is not saved, and a constant that capture lifts."""

    def __init__(self) -> None:
        super().__init__(3, 5)
        self.register_buffer("order", torch.tensor([3, 0, 4, 1, 2]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order] + torch.tensor([0.5, 1.5, 2.0, 3.0, 4.0])


def test_what_is_not_saved_stays_so() -> None:
    x = torch.randn(2, 3)
    model = Ordered()
    gm = capture(model, x)
    for network in (gm, clone(gm), clone(clone(gm))):
        assert set(network.state_dict()) == {"weight", "bias"}
        assert_close(network(x), model(x))


def test_frozen_parameters_stay_frozen() -> None:
    model, inputs = build("plain")
    model.fc1.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    gm = clone(capture(model, inputs))
    assert not gm.fc1.weight.requires_grad and gm.fc2.weight.requires_grad


def test_gradients_reach_every_parameter() -> None:
    model, inputs = build("norms")
    gm = capture(model.train(), inputs)
    gm(*inputs).square().sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_inputs_that_do_not_fit() -> None:
    model, _ = build("plain")
    with pytest.raises(SluiceError, match=r"does not run on the example inputs \(2, 4, 8, 6\)"):
        capture(model, torch.rand(2, 4, 8, 6))
    with pytest.raises(SluiceError, match="does not run on the example inputs"):
        capture(model, {"image": torch.rand(2, 3, 8, 6)})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def test_control_flow_on_data() -> None:
    with pytest.raises(SluiceError, match=r"torch\.export cannot capture Branching"):
        capture(Branching(), torch.rand(2, 3))


class TwoBranches(nn.Module):
    """Inputs of one shape that are treated differently."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 7)
        self.two = nn.Linear(5, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.one(left).relu() - 3 * self.two(right))


def test_keyword_inputs_in_any_order_do_not_swap_positional_ones() -> None:
    """Training loops pass batches by position, whatever the example inputs were."""
    model = TwoBranches().eval()
    left, right = torch.randn(3, 5), torch.randn(3, 5)
    example = {"right": right, "left": left}
    gated = insert_gates(model, example)
    assert_close(gated(left, right), model(left, right))
    assert_close(gated(right=right, left=left), model(left, right))
    assert_close(strip_gates(gated)(left, right), model(left, right))
    assert_close(capture(model, example)(right=right, left=left), model(left, right))


class Tabled(nn.Module):
    """Positions and a constant of the class, computed without gradients, as sinusoidal tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(7, 6), nn.Linear(5, 6), nn.Linear(6, 4)
        self.scale = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5])

    @torch.no_grad()
    def positions(self, count: int) -> Tensor:
        return self.table(torch.arange(count)) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh() * self.positions(x.shape[1]) + self.table.weight)


def test_operators_without_gradients_are_read() -> None:
    """They stand in the graph itself, the widths behind them can be cut, and their gradient stays zero."""
    torch.manual_seed(0)
    model, x = Tabled(), torch.randn(3, 7, 5)
    captured = capture(model, x)
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in captured.graph.nodes if n.op == "call_function")
    assert captured.state_dict().keys() == model.state_dict().keys()
    analysis = analyze(captured)
    (group,) = analysis.groups
    refs = {(ref.param, ref.axis) for ref in group.refs}
    assert refs == {("one.weight", 0), ("one.bias", 0), ("table.weight", 1), ("two.weight", 1)}
    for made in (model, captured):
        made(x).square().sum().backward()
    wanted = dict(model.named_parameters())
    assert_close([p.grad for p in captured.parameters()], [wanted[n].grad for n, _ in captured.named_parameters()])
    plan = make_plan(analysis, {group.name: [0, 2, 5]})
    with torch.no_grad():
        slim = rewrite_torch(captured, plan, x)(x)
        gone = [1, 3, 4]
        model.two.weight[:, gone] = 0
        assert_close(slim, model(x))


@pytest.mark.parametrize("kind", ["attention", "lstm", "gru"])
def test_training_drops_what_the_model_drops(kind: str) -> None:
    """Attention weights and the outputs between stacked layers, with the same random numbers."""
    layers = {
        "attention": lambda: nn.TransformerEncoderLayer(10, 5, 13, dropout=0.4, batch_first=True),
        "lstm": lambda: nn.LSTM(10, 6, num_layers=2, dropout=0.4, batch_first=True),
        "gru": lambda: nn.GRU(10, 6, num_layers=3, dropout=0.4, bidirectional=True),
    }
    model, x = layers[kind](), torch.randn(3, 7, 10)
    gm = capture(model, x)
    for training in (True, False):
        found = []
        for network in (model, gm):
            torch.manual_seed(0)
            out = network.train(training)(x)
            found.append(out if kind == "attention" else out[0])
        assert_close(found[1], found[0], 1e-6)


def test_the_last_states_of_stacked_layers() -> None:
    """Of all layers at once, and of given ones; and states that are given."""

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            y, (h, c) = self.inner(x, (h.transpose(0, 1).contiguous(), torch.zeros_like(h.transpose(0, 1))))
            return y, h, c[-3], h[1]

    model, inputs = States().eval(), (torch.randn(3, 7, 5), torch.randn(3, 4, 6))
    for ours, theirs in zip(capture(model, inputs)(*inputs), model(*inputs), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_what_is_computed_without_gradients_has_none() -> None:
    class Without(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.a(x).sigmoid()
            return self.b(x) * scale

    model, x = Without(), torch.randn(3, 5)
    gm = capture(model, x)
    assert_close(gm(x), model(x), 1e-6)
    gm(x).sum().backward()
    assert gm.a.weight.grad is None and gm.b.weight.grad is not None
