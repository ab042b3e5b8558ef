"""The basis of attention heads is changed, and the network computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sluice.passes.cut.rotate_torch import Rotation, rotate
from sluice.passes.graph import heads_torch
from sluice.passes.graph.capture import capture
from sluice.runtime.base.compare import relative_error
from tests.sequence_forms import ALL
from tests.sequences import sequence

BOTH, FOLDED = ("scores", "values"), ("scores", "values and bias")
FOUND = {
    "sdpa": FOLDED,
    "fused, by hand": ("values and bias",),  # q and k are normed
    "masked": BOTH,  # a mask may hide a row
    "multihead, positions first": FOLDED,
    "grouped": FOLDED,
    "encoder": BOTH,  # attention weights are dropped in training
    "llama, grouped": ("values",),  # rotary positions
    "t5": (*BOTH, *BOTH),
    "covariance": (),
    "shared": (),  # one weight, read three times
    "columns": FOLDED,
    "shifted": ("values and bias",),  # q is read beside the scores
    "repeated": FOLDED,
    "pooled": (*FOLDED, *FOLDED),
    "einsum": (),
}


def told(done: tuple[Rotation, ...]) -> tuple[str, ...]:
    return tuple(each.kind + (" and bias" if each.folded else "") for each in done)


def distance(one: object, two: object) -> float:
    return max(relative_error(a, b) for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True))


@pytest.fixture
def double() -> Iterator[None]:
    """All numbers in 64 bits, so that what is exact is told from what is near."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", FOUND)
def test_it_computes_the_same(name: str) -> None:
    model, inputs = sequence(name, ALL)
    captured = capture(model.eval(), inputs).eval()
    others = pytree.tree_map(lambda x: x.flip(0).flip(1) if x.ndim > 1 else x, inputs)
    with torch.no_grad():
        before = [captured(*given) for given in (inputs, others)]
        weights = {key: value.clone() for key, value in captured.state_dict().items()}
        done = rotate(captured)
        after = [captured(*given) for given in (inputs, others)]
    assert told(done) == FOUND[name]
    assert distance(after, before) < 1e-12
    changed = {key for key, value in captured.state_dict().items() if not torch.equal(value, weights[key])}
    assert {each.inner for each in done} | {each.outer for each in done} <= changed
    assert bool(changed) == bool(done)


class Attending(nn.Module):
    """Three heads of four; ``before`` and ``behind`` change v and the context, ``same``: keys are the queries."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor], *, same: bool = False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(*sizes) for sizes in ((7, 12), (7, 12), (7, 12), (12, 5)))
        self.before, self.behind, self.same = before, behind, same
        with torch.no_grad():
            self.v.bias.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        layers = (self.q, self.q if self.same else self.k, self.v)
        q, k, v = (layer(x).view(n, tokens, 3, 4).transpose(1, 2) for layer in layers)
        context = F.scaled_dot_product_attention(q, k, self.before(v))
        return self.out(self.behind(context).transpose(1, 2).reshape(n, tokens, 12))


def keep(x: Tensor) -> Tensor:
    return x


def attending(*args: Callable[[Tensor], Tensor], same: bool = False) -> tuple[tuple[str, ...], float]:
    torch.manual_seed(0)
    model = capture(Attending(*args, same=same), torch.randn(2, 6, 7)).eval()
    x = torch.randn(3, 6, 7)
    with torch.no_grad():
        before = model(x)
        done = told(rotate(model))
        return done, distance(model(x), before)


@pytest.mark.parametrize(
    ("before", "behind", "same", "found"),
    [
        (keep, keep, False, FOLDED),
        (lambda v: v * 0.5, keep, False, BOTH),  # a constant, but not that one
        (keep, lambda c: c / 3.0, False, BOTH),
        (torch.relu, keep, False, FOLDED[:1]),
        (keep, torch.tanh, False, FOLDED[:1]),
        (lambda v: v + v.mean(-1, keepdim=True), keep, False, FOLDED[:1]),
        (lambda v: v.flip(-2), keep, False, FOLDED[:1]),
        (keep, keep, True, FOLDED[1:]),  # queries are keys
    ],
)
def test_what_lies_between_decides(
    before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor], same: bool, found: tuple[str, ...]
) -> None:
    done, error = attending(before, behind, same=same)
    assert done == found
    assert error < 1e-6


@torch.no_grad()
def test_leading_dimensions_are_nearest() -> None:
    torch.manual_seed(0)
    dense = Attending(keep, keep)
    model = capture(dense, torch.randn(2, 6, 7)).eval()
    rotate(model)
    own = model.state_dict()
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        whole = dense.out.weight[:, rows] @ torch.cat([dense.v.weight[rows], torch.zeros(4, 1)], 1)
        value = torch.cat([own["v.weight"][rows], own["v.bias"][rows, None]], 1)
        out = own["out.weight"][:, rows]
        energy = torch.linalg.svdvals(whole.double())
        for kept in range(5):
            missed = torch.linalg.norm((whole - out[:, :kept] @ value[:kept]).double())
            assert float(missed) == pytest.approx(float(energy[kept:].square().sum().sqrt()), abs=1e-6)


def test_a_wrong_change_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault put in on purpose: a bias becomes a constant where a row of attention weights is hidden as a whole."""
    model, (x, seen) = sequence("padded")
    inputs = (x, torch.cat([-torch.ones_like(seen[:1]), seen[1:]]))
    captured = capture(model, inputs).eval()
    weights = {key: value.clone() for key, value in captured.state_dict().items()}
    monkeypatch.setattr(heads_torch, "_sums_to_one", lambda product: True)
    assert rotate(captured) == ()
    assert all(torch.equal(value, weights[key]) for key, value in captured.state_dict().items())
    monkeypatch.undo()
    assert told(rotate(captured)) == BOTH
