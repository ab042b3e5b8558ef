"""What an interrupted run has done is found by the same command, and comes to the same bits as an unbroken run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sluice
from sluice.core.errors import SluiceError
from sluice.training.stages import NOTHING, Stage, Stages, described, seeded, unfinished_beside, weights_of
from tests import tiny

BATCHES = 24


class Stop(BaseException):
    pass


class Shuffled:
    """Batches in an order and with noise drawn from the global generators; stops at the batch number ``stop``."""

    def __init__(self, stop: int | None = None) -> None:
        g = torch.Generator().manual_seed(7)
        self.x, self.y = torch.randn(BATCHES, 4, 3, 9, 9, generator=g), torch.randint(5, (BATCHES, 4), generator=g)
        self.left = stop

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k in torch.randperm(BATCHES).tolist():
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Stop
            yield self.x[k] + 0.1 * float(np.random.rand()) + 0.1 * random.random(), self.y[k]


def compressed(folder: Path, data: Shuffled, **more: Any) -> dict[str, bytes]:
    arguments = {"budget": "60%", "epochs": 3, "rehearsal": 1.0, "methods": ("filter",), "seed": 11, **more}
    folder.mkdir(exist_ok=True)
    with tiny.simulated_device():
        sluice.compress(
            tiny.model(), tiny.inputs(), data=data, table=folder / "t.db", out=folder / "out",
            batch=tiny.BATCH, progress=False, **arguments,
        )  # fmt: skip
    return {name: tiny.files_of(folder / "out")[name] for name in ("plan.json", "slim.safetensors")}


@cache
def unbroken(gate_epochs: int) -> tuple[dict[str, bytes], int]:
    """The files of a run without an end before its time, and how many batches it read."""
    import tempfile

    data = Shuffled(10**6)
    with tempfile.TemporaryDirectory() as name:
        found = compressed(Path(name), data, gate_epochs=gate_epochs)
    assert data.left is not None
    return found, 10**6 - data.left


@pytest.mark.slow
def test_a_run_with_stops_that_was_stopped_ends_in_the_same_bits(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"progressive": True, "budget": "30%", "epochs": 12}
    whole = Shuffled(10**6)
    expected = compressed(tmp_path / "whole", whole, **asked)
    assert whole.left is not None
    batches = 10**6 - whole.left
    for share in (0.3, 0.5, 0.9):
        folder = tmp_path / str(share)
        with pytest.raises(Stop):
            compressed(folder, Shuffled(int(share * batches)), **asked)
        assert compressed(folder, Shuffled(), **asked) == expected


@pytest.mark.parametrize("gate_epochs", [0, 1])
@settings(max_examples=6, deadline=None)
@given(at=st.floats(0.1, 0.999))
def test_a_run_that_was_stopped_anywhere_ends_in_the_same_bits(
    gate_epochs: int, at: float, tmp_path_factory: Any
) -> None:
    expected, batches = unbroken(gate_epochs)
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(Stop):
        compressed(folder, Shuffled(int(at * batches)), gate_epochs=gate_epochs)
    assert compressed(folder, Shuffled(), gate_epochs=gate_epochs) == expected
    assert sorted(p.name for p in folder.iterdir()) == ["out", "t.db"]


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _, batches = unbroken(0)
    with pytest.raises(Stop):
        compressed(tmp_path, Shuffled(batches - 2))
    rest = Shuffled(10**6)
    compressed(tmp_path, rest)
    assert rest.left is not None and 10**6 - rest.left < BATCHES + 10, "it trained again what had been trained"


def test_another_seed_gives_another_network(tmp_path: Path) -> None:
    assert compressed(tmp_path, Shuffled(), seed=12)["slim.safetensors"] != unbroken(0)[0]["slim.safetensors"]


def test_another_command_begins_anew(tmp_path: Path) -> None:
    _, batches = unbroken(0)
    with pytest.raises(Stop):
        compressed(tmp_path, Shuffled(batches - 2))
    whole = Shuffled(10**6)
    compressed(tmp_path, whole, epochs=2)
    assert whole.left is not None and 10**6 - whole.left > 2 * BATCHES


def test_the_callers_random_numbers_go_on(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = drawn()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with seeded(5):
        inside = drawn()
    assert drawn() == expected
    with seeded(5):
        assert drawn() == inside
    for seed in (-1, 2**32, 1.5, True):
        with pytest.raises(SluiceError, match="is no seed"), seeded(seed):  # type: ignore[arg-type]
            pass


def test_a_damaged_stage_is_not_found(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "x.unfinished").for_("a")
    stages.keep("one", Stage({"a": np.arange(3.0)}, [1, float("inf")]))
    found = stages.find("one")
    assert found is not None and found.words == [1, float("inf")] and found.arrays["a"].tolist() == [0.0, 1.0, 2.0]
    assert stages.for_("b").find("one") is None
    content = (tmp_path / "x.unfinished" / "one.safetensors").read_bytes()
    before = torch.get_rng_state()
    for damaged in (b"", content[:40], content[:-8], content.replace(b"MT19937", b"MT19936"), b"\xff" * 99):
        (tmp_path / "x.unfinished" / "one.safetensors").write_bytes(damaged)
        assert stages.find("one") is None
    assert torch.equal(torch.get_rng_state(), before)
    stages.end()
    assert not (tmp_path / "x.unfinished").exists()


def test_a_stage_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.unfinished").write_text("mine")
    Stages(tmp_path / "x.unfinished").keep("one", Stage({}, 1))
    NOTHING.keep("one", Stage({}, 1))
    assert NOTHING.find("one") is None and (tmp_path / "x.unfinished").read_text() == "mine"
    assert unfinished_beside(Path("a/out")) == Path("a/out.unfinished")


def test_what_a_command_is_about() -> None:
    model = tiny.model()
    same = weights_of(tiny.model())
    assert weights_of(model) == same
    next(model.parameters()).data.view(-1)[3] += 1e-3
    assert weights_of(model) != same
    assert weights_of(nn.Linear(3, 2)) != weights_of(nn.Linear(3, 3))
    assert described(weights_of) == described(weights_of) != described(described)
    assert described(torch.zeros(3, 2)) == ["torch.float32", 3, 2]
