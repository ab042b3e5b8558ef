"""Every wrong argument of the Python interface ends in one sentence, before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sluice
from sluice.core.errors import SluiceError
from sluice.pipeline.arguments import numeric, patterns
from tests import tiny

NAN = torch.full((3, 3, 9, 9), float("nan"))
WRONG: list[dict[str, Any]] = [
    *({"epochs": value} for value in (1.5, "3", -1, None, True)),
    *({"gate_epochs": value} for value in (0.5, "1", -2)),
    *({"batch": value} for value in ("3", 0, 2.0, None, True)),
    *({"threads": value} for value in ("1", -1)),
    *({"exclude": value} for value in (3, [3], {"a": 1}.items(), ["no such layer"])),
    *({"model": value} for value in (tiny.Tiny, None, {}, tiny.model().state_dict(), "resnet20")),
    *({"example_inputs": value} for value in (None, 3, [], "x", NAN, torch.ones(3, 2, 9, 9))),
    *({"budget": value} for value in (None, 50, "", "half", {}, {"ms": 2}, ["50%"])),
    *({"data": value} for value in (None, 3, [], tiny.inputs, [3], [(tiny.inputs(), 2, 3)], iter([tiny.inputs()]))),
    *({"table": value} for value in (None, 3, b"\0")),
    *({"out": value} for value in (3, object())),
    *({"target": value} for value in (None, "gpu", 3, "ort-cpu@")),
    *({"precision": value} for value in (None, "fp8", 16)),
    *({"methods": value} for value in (None, "filter", (), ("width",), 3)),
    *({"rehearsal": value} for value in (-1, "1", None, float("nan"))),
    *({"lr": value} for value in ("fast", -1, None, float("inf"))),
    *({"recovery": value} for value in ({}, "sgd", 3)),
    *({"loss": value} for value in (3, "l1", nn.MSELoss, lambda x: x)),
    *({"evaluate": value} for value in (3, "top1", nn.Linear, lambda m: "94%", lambda m: None, lambda m: 1 / 0)),
    *({"minutes": value} for value in (0, -1, "2", None, float("nan"))),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: "-".join(f"{k}={v!r:.18}" for k, v in w.items()))
def test_one_sentence_before_anything_is_measured(wrong: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "model": tiny.model(), "example_inputs": tiny.inputs(), "budget": "60%", "data": tiny.data(), "batch": 3,
        "table": tmp_path / "t.db", "out": tmp_path / "out", "epochs": 1, "progress": False, **wrong,
    }  # fmt: skip
    model, inputs = given.pop("model"), given.pop("example_inputs")
    with pytest.raises(SluiceError) as told:
        sluice.compress(model, inputs, **given)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "t.db").exists()


def test_figures() -> None:
    for value in (1, 0.5, np.float32(0.5), np.array(0.5), torch.tensor([0.5]), True):
        assert numeric(lambda module, value=value: value)(nn.Identity()) == float(value)
    for value in (None, "1", [1.0], np.ones(2), torch.ones(2), 1j):
        with pytest.raises(SluiceError, match="evaluate returned"):
            numeric(lambda module, value=value: value)(nn.Identity())


def test_patterns() -> None:
    model = tiny.model()
    assert patterns(None, model) == () and patterns("conv*", model) == ("conv*",)
    assert patterns(["a", "b"], model) == ("a", "b") and patterns(nn.Linear, model) == ("fc",)
