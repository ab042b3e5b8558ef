"""Further members of the kinds of networks that users reported: odd names, tied and loose tensors, complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from tests.passes.cut.test_attention_weights import check_plans


class Named(nn.Module):
    """Submodules that are called as attributes of captured networks are."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in (("graph", nn.Linear(5, 9)), ("code", nn.BatchNorm1d(9)), ("recompile", nn.Linear(9, 7))):
            self.add_module(name, layer)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for name in ("graph", "code", "recompile"):
            x = torch.relu(self.get_submodule(name)(x))
        return (self.out(x),)


class Undone(nn.Module):
    """The decoder convolves back with the weights of the encoder, whose layers are apart in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.between = nn.Conv1d(5, 9, 3), nn.Conv1d(9, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = torch.relu(self.between(torch.relu(self.narrow(torch.relu(self.wide(x))))))
        y = torch.relu(F.conv_transpose1d(y, self.narrow.weight))
        return (F.conv_transpose1d(y, self.wide.weight),)


class Loose(nn.Module):
    """Tensors that are no parameters: an attribute, one in a list, one that is written in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 3)
        self.mean, self.scales = torch.linspace(-1, 1, 5), [torch.tensor(0.5), torch.tensor([2.0])]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = torch.relu(self.first(x - self.mean)) * self.scales[0]
        return (self.out(torch.relu(self.second(x) * self.scales[1])) + torch.tensor([0.1, 0.2, 0.3]),)


class Filtered(nn.Module):
    """A filter of complex numbers over positions; what is behind it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix, self.out = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 3)
        self.filter = nn.Parameter(torch.randn(5, 9, 2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        spectrum = torch.fft.rfft(torch.relu(self.wide(x)), dim=1) * torch.view_as_complex(self.filter)
        return (self.out(torch.relu(self.mix(torch.fft.irfft(spectrum, n=8, dim=1)))),)


@pytest.mark.parametrize(
    ("kind", "shape", "sizes"),
    [
        (Named, (5,), {"graph_": 9, "recompile_": 7}),
        (Undone, (5, 8), {"wide": 9, "narrow": 4}),
        (Loose, (5,), {"first": 9, "second": 7}),
        (Filtered, (8, 5), {"mix": 7}),
    ],
)
def test_cut(kind: Callable[[], nn.Module], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    model, x = enliven(kind(), 0).eval(), torch.randn(2, *shape)
    exported, exact = to_onnx(model, x), capture(model.double(), x.double())
    assert {group.name: group.size for group in analyze(exact).groups} == sizes
    check_plans(exact, model, exported, x)
