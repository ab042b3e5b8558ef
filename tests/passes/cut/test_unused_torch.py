"""What goes with the last reader of a tensor, and what stays because something still reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.plan import Factorize
from sluice.passes.cut.factor_torch import factorize_torch, truncate_torch
from sluice.passes.cut.unused_torch import read_tensors, remove_unused
from sluice.passes.graph.capture import capture
from sluice.runtime.base.compare import assert_close


class Branches(nn.Module):
    """Two branches with one weight in common; the first ends in a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 7), nn.Linear(5, 7), nn.BatchNorm1d(7)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.a(x))) + self.b(y)


class Named(nn.Module):
    """One weight under two names, one of them outside of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.held = nn.Linear(9, 7), nn.Module()
        self.held.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def captured() -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Branches().eval(), (torch.randn(3, 5), torch.randn(3, 5)))


def left_with(gm: fx.GraphModule, side: int) -> None:
    """Only one operand of the addition is still computed."""
    (add,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    add.replace_all_uses_with(add.args[side])
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("call_function", "call_module") and not node.users:
            gm.graph.erase_node(node)


def names(gm: fx.GraphModule, starts: Sequence[str]) -> set[str]:
    return {n for n in gm.state_dict() if n.startswith(tuple(starts))}


def test_nothing_goes_while_it_is_read() -> None:
    gm = captured()
    before = dict(gm.state_dict(keep_vars=True))
    remove_unused(gm, before)
    assert gm.state_dict(keep_vars=True).keys() == before.keys()
    assert read_tensors(gm) >= {"a.bias", "b.bias", "norm.weight", "norm.bias", "norm.running_mean"}


def test_a_norm_goes_with_its_count_and_a_weight_read_elsewhere_stays_under_both_names() -> None:
    gm = captured()
    before, y = read_tensors(gm), torch.randn(4, 5)
    left_with(gm, 1)
    remove_unused(gm, before)
    gm.recompile()
    assert gm.state_dict().keys() == {"a.weight", "b.weight", "b.bias"}
    assert dict(gm.named_modules()).keys() == {"", "a", "b"}
    assert_close(gm(torch.randn(4, 5), y), F.linear(y, gm.get_parameter("b.weight"), gm.get_parameter("b.bias")), 1e-6)


def test_only_what_is_named_goes() -> None:
    gm = captured()
    left_with(gm, 1)
    remove_unused(gm, ["norm.running_mean", "a.weight"])
    assert names(gm, ["norm."]) == {"norm.weight", "norm.bias", "norm.running_var"}
    assert names(gm, ["a."]) == {"a.weight", "a.bias"}


def test_a_weight_goes_under_every_name() -> None:
    gm = captured()
    before = read_tensors(gm)
    left_with(gm, 0)
    remove_unused(gm, before)
    assert names(gm, ["b."]) == {"b.weight"}, "the first branch reads it"
    left = [n for n in gm.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    left[0].replace_all_uses_with(left[0].args[0])
    gm.graph.erase_node(left[0])
    remove_unused(gm, ["a.weight", "a.bias"])
    assert not names(gm, ["a.", "b."]) and names(gm, ["norm."])
    assert dict(gm.named_modules()).keys() == {"", "norm"}, "what is called stays"


def test_factors_leave_no_name_of_the_dense_weight_behind() -> None:
    x = torch.randn(3, 9)
    for name in ("a.weight", "held.weight"):
        gm, edit = capture(Named().eval(), x), Factorize(name, "kxk-1x1", 4)
        closed = capture(gm, x)
        truncate_torch(closed, [edit])
        factorize_torch(gm, [edit])
        assert gm.state_dict().keys() == {f"{name}_v", f"{name}_u", "a.bias"}
        assert_close(gm(x), closed(x), 1e-5)
