"""The torch and the ONNX reading of one network find the same groups, and freeze the same layers."""

from __future__ import annotations

from collections.abc import Callable, Container

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import Inputs, capture
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_axes import analyze_onnx
from tests.networks import build


def groups(analysis: Analysis, named: Container[str]) -> list[tuple[object, ...]]:
    """Names, sizes, and where each lies on the tensors of the network; an exporter may add constants of its own."""
    refs = [sorted((r.param, r.axis, r.channels.tolist()) for r in g.refs if r.param in named) for g in analysis.groups]
    return [(g.name, g.size, r) for g, r in zip(analysis.groups, refs, strict=True)]


def both(model: nn.Module, inputs: Inputs) -> tuple[Analysis, Analysis]:
    captured = capture(model, inputs)
    ours, theirs = analyze(captured, needed=False), analyze_onnx(to_onnx(captured, inputs))
    assert groups(ours, ours.tensors) == groups(theirs, ours.tensors)
    assert set(ours.frozen) == set(theirs.frozen)
    return ours, theirs


@pytest.mark.parametrize("name", ["plain", "tokens", "class_token", "conv_next"])
def test_networks(name: str) -> None:
    ours, _ = both(*build(name))
    widths = {g.name: g.size for g in ours.groups}
    if name == "class_token":
        assert widths == {"patch": 10, "attention": 5, "up": 13}
    if name == "conv_next":
        assert widths == {"stem": 6, "block1.up": 11, "down": 9, "block2.up": 14}


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor], columns: int = 6):
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(3, 6, 1), nn.Conv2d(columns, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def channels_last(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int, bool]] = {
    "select": (lambda y: y.select(2, -1)[:, :, None], 6, True),
    "select a channel": (lambda y: y.select(1, 2)[:, None], 1, False),
    "index_select": (lambda y: y.index_select(3, torch.tensor([2, 0])), 6, True),
    "index_select of channels": (lambda y: y.index_select(1, torch.tensor([2, 0])), 2, False),
    "zeros_like": (lambda y: y + torch.zeros_like(y), 6, True),
    "full_like": (lambda y: y * torch.full_like(y, 0.6), 6, True),
    "zeros": (lambda y: torch.cat([y, torch.zeros(y.shape[0], 6, 1, 4)], 2), 6, True),
    "new_zeros": (lambda y: torch.cat([y, y.new_zeros(y.shape[0], 6, 1, 4)], 2), 6, True),
    "pool to one": (lambda y: F.adaptive_avg_pool2d(y, 1), 6, True),
    "pool to one, channels last": (lambda y: F.adaptive_avg_pool2d(channels_last(y), (1, 1)), 6, True),
    "pool a line to one": (lambda y: F.adaptive_avg_pool1d(channels_last(y).flatten(2), 1)[..., None], 6, True),
    "mean": (lambda y: channels_last(y).mean((2, 3), keepdim=True), 6, True),
}


class Beside(nn.Module):
    """All of them side by side, since an export costs more than what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({name: Between(function, into) for name, (function, into, _) in BETWEEN.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [side(x) for side in self.sides.values()]


def test_operators() -> None:
    ours, theirs = both(Beside(), torch.rand(2, 3, 5, 4))
    free = [f"sides.{name}.a" for name, (_, _, free) in BETWEEN.items() if free]
    whole = {f"sides.{name}.a" for name, (_, _, free) in BETWEEN.items() if not free}
    assert [g.name for g in ours.groups] == free
    assert whole <= set(ours.frozen) and not {*ours.frozen, *theirs.frozen} & set(free)
