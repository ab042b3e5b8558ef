"""Dense weights start as the slim network, train, and merge into it exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sluice.core.plan import Factorize, Plan, Slice
from sluice.models import enliven
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.training.dense_parametrisation import merge_dense, narrowed, widened


class Mixed1d(nn.Module):
    """(N, 3, 17) to (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv1d(3, 11, 3), nn.BatchNorm1d(11), nn.Conv1d(11, 7, 5)
        self.hidden, self.fc = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(self.stem(x)).relu()).relu().mean(2)
        return self.fc(self.hidden(x).relu())


class Mixed2d(nn.Module):
    """(N, 2, 9, 8) to (N, 5), a depthwise convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(2, 10, 3, padding=1), nn.Conv2d(10, 10, 3, groups=10)
        self.norm, self.point, self.fc = nn.BatchNorm2d(10), nn.Conv2d(10, 9, 1), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.point(self.norm(self.depth(self.stem(x).relu())).relu()).relu().mean((2, 3)))


def inputs(kind: type[nn.Module]) -> Tensor:
    return torch.randn(4, *((3, 17) if kind is Mixed1d else (2, 9, 8)), generator=torch.Generator().manual_seed(2))


def dense_of(kind: type[nn.Module]) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = kind()
    return capture(enliven(model, 6, (inputs(kind),)).eval(), inputs(kind))


def cut_of(dense: fx.GraphModule, *groups: int) -> tuple[fx.GraphModule, Plan]:
    """Every second channel of some groups, the first not among them."""
    analysis = analyze(dense)
    kept = {g.name: range(1, g.size, 2) for k, g in enumerate(analysis.groups) if not groups or k in groups}
    plan, slim = make_plan(analysis, kept), clone(dense)
    rewrite_captured(slim, plan)
    return slim, plan


def trained(module: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    optimizer = torch.optim.AdamW(module.train().parameters(), lr=0.03)
    for _ in range(4):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    return module.eval()


CASES = [(kind, groups) for kind in (Mixed1d, Mixed2d) for groups in ((), (0,), (1,))]


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_the_start_is_the_slim_network(kind: type[nn.Module], groups: tuple[int, ...]) -> None:
    dense = dense_of(kind)
    slim, plan = cut_of(dense, *groups)
    wide = widened(slim, dense, plan)
    with torch.no_grad():
        assert torch.equal(wide.eval()(inputs(kind)), slim.eval()(inputs(kind)))
    names = narrowed(slim, dense)
    assert set(names) == {s.param for s in plan.slices if len(plan.fingerprint[s.param]) > 1} and len(names) >= 2
    for name in names:
        form = wide.get_submodule(name.replace("weight", "parametrizations.weight.0"))
        rest = wide.get_parameter(name.replace("weight", "parametrizations.weight.original"))
        assert torch.count_nonzero(rest) == 0 and rest.shape == slim.get_parameter(name).shape
        assert torch.equal(form.dense, dense.get_parameter(name))
        assert (form.columns is None) == (dense.get_parameter(name).shape[1] == 1)


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_what_was_trained_is_merged_exactly(kind: type[nn.Module], groups: tuple[int, ...]) -> None:
    dense = dense_of(kind)
    slim, plan = cut_of(dense, *groups)
    names, before = list(slim.state_dict()), {n: t.clone() for n, t in slim.state_dict().items()}
    wide = widened(slim, dense, plan)
    start = {n: p.detach().clone() for n, p in wide.named_parameters()}
    trained(wide, inputs(kind))
    assert all(not torch.equal(p, start[n]) for n, p in wide.named_parameters() if "parametrizations" in n)
    assert all(torch.equal(t, before[n]) for n, t in slim.state_dict().items())
    merge_dense(wide, slim)
    with torch.no_grad():
        want = wide(inputs(kind))
        assert_close(slim.eval()(inputs(kind)), want, 1e-6)
        assert relative_error(want, dense(inputs(kind))) > 0.01
    assert list(slim.state_dict()) == names and all(p.requires_grad for p in slim.parameters())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in slim.parameters())


def test_the_gradient_reaches_channels_that_were_cut() -> None:
    dense = dense_of(Mixed2d)
    slim, plan = cut_of(dense)
    wide = widened(slim, dense, plan)
    wide.train()(inputs(Mixed2d)).square().sum().backward()
    form = wide.get_submodule("point.parametrizations.weight.0")
    (keep,) = [s.keep for s in plan.slices if (s.param, s.axis) == ("point.weight", 1)]
    cut = [k for k in range(10) if k not in keep]
    assert form.columns.grad[cut].abs().min() > 0 and form.dense.grad[:, keep].abs().max() > 0
    assert form.dense.grad[:, cut].abs().max() == 0  # not before the selection has moved


def sequence(*layers: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*layers))


def test_grouped_convolutions_and_selections_that_are_not_known() -> None:
    """No plan tells what was kept, and the slim weights are others: the rest makes up for it."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        dense = sequence(nn.Conv2d(6, 10, 3, groups=2), nn.Conv2d(10, 7, 1))
        slim = sequence(nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 7, 1))
        x = torch.randn(3, 6, 5, 5)
    assert narrowed(slim, dense) == ["0.weight", "1.weight"]
    wide = widened(slim, dense, Plan({}))
    assert_close(wide(x), slim(x).detach(), 1e-6)
    rest = wide.get_parameter("0.parametrizations.weight.original")
    assert rest.shape == (4, 3, 3, 3) and torch.count_nonzero(rest) == rest.numel()
    trained(wide, x)
    merge_dense(wide, slim)
    assert_close(slim(x).detach(), wide(x).detach(), 1e-6)


def test_what_has_no_such_form_stays_plain() -> None:
    """Factors, weights under two names, frozen ones, those that kept their shape."""

    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)
            self.b.weight = self.a.weight

    slim, dense = Tied(4), Tied(6)
    assert narrowed(slim, dense) == ["c.weight"]
    slim.c.weight.requires_grad_(False)
    assert narrowed(slim, dense) == [] == narrowed(dense, dense)
    mixed = dense_of(Mixed1d)
    tensors = {n: tuple(t.shape) for n, t in mixed.state_dict().items()}
    keep = tuple(range(1, 13, 2))
    cut = [("hidden.weight", 0), ("hidden.bias", 0), ("fc.weight", 1)]
    plan = Plan(
        tensors,
        tuple(Slice(n, a, 13, keep) for n, a in cut),
        factorizations=(Factorize("hidden.weight", "kxk-1x1", 2),),
    )
    lean = clone(mixed)
    rewrite_captured(lean, plan)
    assert narrowed(lean, mixed) == ["fc.weight"] and "hidden.weight" not in lean.state_dict()
