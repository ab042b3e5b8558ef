"""What is no function of its inputs, or trains otherwise, is refused before it is captured; all else goes through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sluice
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.capture import capture
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.runtime.base.compare import assert_close


class Net(nn.Module):
    """(N, 5) to (N, 3), by a function between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def between(self, y: Tensor) -> Tensor:
        return y.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


X = torch.linspace(-1.0, 2.0, 20).reshape(4, 5)


class Replaced(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(1, 7))

    def between(self, y: Tensor) -> Tensor:
        y = y + self.past
        self.past = y.mean(0, keepdim=True).detach()
        return y


class InPlace(Replaced):
    def between(self, y: Tensor) -> Tensor:
        self.past.mul_(0.9).add_(0.1 * y.mean(0))
        return y - self.past


class Attribute(Net):
    past: Any = 0.0

    def between(self, y: Tensor) -> Tensor:
        y, self.past = y + self.past, y.mean(0).detach()
        return y


class Counted(Net):
    past = 0

    def between(self, y: Tensor) -> Tensor:
        self.past += 1
        return y * self.past


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.past: list[Tensor] = []

    def between(self, y: Tensor) -> Tensor:
        self.past.append(y.detach())
        return torch.stack(self.past).sum(0)


@pytest.mark.parametrize("kind", [Replaced, InPlace, Attribute, Counted, Listed])
def test_state_that_forward_writes(kind: type[Net]) -> None:
    for run in (lambda m: capture(m, X), lambda m: sluice.insert_gates(m, X), lambda m: to_onnx(m, X)):
        model = kind()
        with pytest.raises(SluiceError, match=rf"forward\(\) of {kind.__name__} writes 'past' and computes with it"):
            run(model)
        assert not isinstance(model.past, list) or not model.past, "the caller's network is as it was"


class Sampled(Net):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y)


class AlwaysDropped(Net):
    def between(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5)


class Chosen(Net):
    def between(self, y: Tensor) -> Tensor:
        return y * torch.bernoulli(y.sigmoid())


class FromNumpy(Net):
    def between(self, y: Tensor) -> Tensor:
        return y * float(np.random.default_rng().normal())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Sampled, r"draws random numbers in eval mode \(randn_like\)"),
        (AlwaysDropped, "draws random numbers in eval mode"),
        (Chosen, r"draws random numbers in eval mode \(bernoulli"),
        (FromNumpy, "FromNumpy is not deterministic"),
    ],
)
def test_random_networks(kind: type[Net], reason: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(SluiceError, match=reason):
        capture(kind().eval(), X)
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    with pytest.raises(SluiceError):
        capture(made := fixed(kind), X)
    assert torch.equal(torch.rand(1), wanted) and made.training
    torch.set_rng_state(before)


def fixed(kind: type[Net]) -> Net:
    with torch.random.fork_rng():
        return kind()


class Watched(Net):
    """A table that the first call makes, a count of calls, a draw, and the last result, kept to look at."""

    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(7), persistent=False)

    def between(self, y: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(7.0)
        self.calls += 1
        self.seen = y.detach().mean(0) + torch.rand(())
        return y + self.table


def test_what_later_outputs_do_not_depend_on_is_left_alone() -> None:
    model = Watched()
    gm = capture(model, X)
    assert model.table is None and float(model.get_buffer("calls")) == 0.0
    assert not [n for n in gm.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert list(gm.state_dict()) == list(model.state_dict())
    assert_close(gm(X), model(X), 1e-6)
    assert len(to_onnx(gm, X).graph.output) == 1


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Swish(torch.autograd.Function):
    """Saves memory, and has the gradient of its operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        s = ctx.saved_tensors[0].sigmoid()
        return grad * (s + ctx.saved_tensors[0] * s * (1 - s))


class Custom(Net):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def between(self, y: Tensor) -> Tensor:
        return self.function.apply(y)


@pytest.mark.parametrize("function", [Sign, Reversed])
def test_a_backward_of_ones_own_is_not_lost_silently(function: type[torch.autograd.Function]) -> None:
    model = Custom(function)
    with pytest.raises(SluiceError, match=rf"the backward\(\) of '{function.__name__}' is lost in the graph"):
        capture(model, X)
    assert to_onnx(model, X).graph.output, "a file is not trained"
    assert capture(model.requires_grad_(False), X)


def test_a_backward_that_is_that_of_the_operators() -> None:
    model = Custom(Swish)
    gm = capture(model, X)
    ours, theirs = (torch.autograd.grad(m(X).square().sum(), m.get_parameter("a.weight"))[0] for m in (gm, model))
    assert_close(ours, theirs, 1e-5)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.norm(self.a(x))))


class Held(Norms):
    """Its norm and its dropout stay in eval mode, as in a detector."""

    def train(self, mode: bool = True) -> Held:
        super().train(mode)
        self.norm.eval(), self.drop.eval()
        return self


def test_norms_that_stay_in_eval_mode_stay_so() -> None:
    by_hand = Norms().train()
    by_hand.norm.eval(), by_hand.drop.eval()
    for model in (Held(), Held().eval(), by_hand):
        gm = sluice.insert_gates(model, X).train()
        before = {name: t.clone() for name, t in gm.state_dict().items()}
        assert_close(gm(X), model.eval()(X), 1e-5)
        assert isinstance(gm.norm, BatchNorm) and torch.equal(gm.norm.running_mean, before["norm.running_mean"])
    trained = capture(Norms(), X).train()
    trained(X)
    assert trained.norm.running_mean.abs().sum() > 0


def test_what_is_no_module() -> None:
    for given, reason in ((Net().state_dict(), "a state_dict, which holds tensors"), (7, "the model is int")):
        for run in (
            lambda m: capture(m, X),
            lambda m: sluice.compress(m, X, budget="50%", data=[X]),
            lambda m: sluice.profile(m, X),
        ):
            with pytest.raises(SluiceError, match=reason):
                run(given)


def test_a_network_that_cannot_be_copied() -> None:
    model = Net()
    model.cache = model.a.weight * 2.0  # type: ignore[assignment]
    with pytest.raises(SluiceError, match="Net cannot be copied"):
        capture(model, X)


class Nothing(Net):
    def forward(self, x: Tensor) -> Any:
        return 3


def test_a_network_without_outputs() -> None:
    with pytest.raises(SluiceError, match="returns no tensor"):
        capture(Nothing(), X)
