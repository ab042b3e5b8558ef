"""Networks as users write them go the whole way: gates, budget, cut, file; at batches other than the profiled one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sluice
from sluice.artifacts.check import check
from sluice.models import enliven
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests import tiny
from tests.networks import build


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


class Swish(nn.Module):
    """(N, 3, 9, 9) to (N, 5): an activation written out between convolutions that may merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 11, 3, padding=1), nn.Conv2d(11, 11, 3, padding=1)
        self.last, self.fc = nn.Conv2d(11, 13, 1), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.mid(x * torch.sigmoid(x))
        x = self.last(torch.sigmoid(x) * x)
        return self.fc(torch.relu(x).mean((2, 3)))


def test_a_written_activation_is_merged_away() -> None:
    """The profiler offers the merge from the file; the torch graph must know it too."""
    model = enliven(Swish(), 5, (tiny.inputs(),))
    done = sluice.compress(
        model, tiny.inputs(), budget="45%", data=tiny.data(), batch=tiny.BATCH, epochs=1, rehearsal=10, progress=False,
    )  # fmt: skip
    assert done.report.met() and done.report.parity_max_rel < 1e-4
    only = sluice.compress(
        model, tiny.inputs(), budget="70%", data=tiny.data(), batch=tiny.BATCH, methods=("merge",), epochs=0,
        progress=False,
    )  # fmt: skip
    assert only.plan.merges and only.report.parity_max_rel < 1e-4


@pytest.mark.parametrize("name", ["conv_next", pytest.param("class_token", marks=pytest.mark.slow)])
def test_widths_of_attention_and_channels_last_networks(name: str, tmp_path: Path) -> None:
    """Both graphs have the same groups, so every gate has a place; the file runs at any batch."""
    model, inputs = build(name, batch=2)
    with torch.no_grad():
        classes = model.eval()(*inputs).shape[1]
    data = [(*inputs, torch.randint(classes, (2,)))]
    table = tmp_path / "t.db"
    measured = sluice.profile(model, inputs, table, batch=2, methods=("filter",), progress=False)
    gated = sluice.insert_gates(model, inputs, steps=2)
    assert set(sluice.Budget(gated, measured, "70%").gates) == set(gated.gates)

    done = sluice.compress(
        model, inputs, budget="70%", data=data, table=table, batch=2, methods=("filter",), epochs=0, progress=False
    )  # fmt: skip
    assert done.report.met() and done.report.parity_max_rel < 1e-4
    assert any(row.kept < row.dense for row in done.report.groups)
    session = OrtRunner().build(done.onnx)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *inputs[0].shape[1:])
        with torch.no_grad():
            wanted = done.module(x).numpy()
        (found,) = session.run({done.onnx.graph.input[0].name: x.numpy()}).values()
        assert_close(found, wanted)


class Several(nn.Module):
    """Keywords alone, a state beside the batch, a layer that stands in the tree twice, a number among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv1d(2, 11, 3), nn.ReLU(), nn.Conv1d(11, 13, 3))
        self.first, self.second = self.stages[0], self.stages[2]
        self.steps = nn.Parameter(torch.zeros((), dtype=torch.long), requires_grad=False)
        self.out = nn.Linear(13, 4)

    def forward(self, *, sound: Tensor, state: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.second(torch.relu(self.first(sound))).relu().mean(2)
        y = self.out(y) + state[0] * state[1]
        return y, torch.stack([y, state[0]]), sound.shape[-1]


def several(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"state": (2, batch, 4), "sound": (batch, 2, 12)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_named_inputs_with_a_state_beside_the_batch(batch: int, tmp_path: Path) -> None:
    model = Several()
    done = sluice.compress(
        model, several(batch), budget="80%", data=[several(batch, seed) for seed in range(4)], batch=batch, epochs=1,
        rehearsal=0, methods=("filter",), progress=False, out=tmp_path,
        loss=lambda outputs, taught, _: (outputs[0] - taught[0]).square().mean(),
    )  # fmt: skip
    state = done.module.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert state["first.weight"].shape == state["stages.0.weight"].shape and done.plan.slices
    loaded = sluice.load(Several, tmp_path)
    inputs = several(batch, 9)
    with torch.no_grad():
        left, right = loaded(**inputs), done.module(**inputs)
    assert left[2] == 12
    assert_close(left[:2], right[:2])
    assert max(check(Several(), tmp_path).values()) < 1e-5
