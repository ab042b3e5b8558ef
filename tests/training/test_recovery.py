"""The value that says how to train: schedules, optimizers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sluice.core.errors import SluiceError
from sluice.pipeline.recipe import Recipe, recovery_of
from sluice.training.recovery import RATES, Recovery
from sluice.training.train import fit


def test_the_rate_rises_and_falls() -> None:
    rate = Recovery(warmup=0.2).factor(20)
    assert [rate(k) for k in (0, 1, 3)] == pytest.approx([0.25, 0.5, 1.0])
    assert [rate(k) for k in (4, 12, 20, 25)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    linear = Recovery(warmup=0.0, schedule="linear").factor(10)
    assert [linear(k) for k in (0, 4, 10)] == pytest.approx([1.0, 0.6, 0.0])
    constant = Recovery(warmup=0.5, schedule="constant").factor(4)
    assert [constant(k) for k in (0, 1, 2, 3)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert Recovery().factor(None)(1000) == 1.0


def test_a_warm_up_of_less_than_a_step_is_none() -> None:
    rate = Recovery(warmup=0.05).factor(10)
    assert rate(0) == 1.0 and rate(9) > 0


def test_optimizers() -> None:
    module = nn.Linear(3, 2)
    parameters = list(module.parameters())
    adamw = Recovery(weight_decay=0.125).optimizer_of(parameters, 0.25)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.25, 0.125)
    sgd = Recovery(optimizer="sgd").optimizer_of(parameters, 0.5)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9 and sgd.defaults["nesterov"]
    own = Recovery(optimizer=lambda p, lr: torch.optim.Adagrad(p, lr=lr)).optimizer_of(parameters, 0.5)
    assert isinstance(own, torch.optim.Adagrad)
    assert Recovery(optimizer="sgd").rates() == RATES["sgd"] and Recovery().rates() == RATES["adamw"]
    assert Recovery(0.007).rates() == (0.007,) and Recovery(0.007).middle() == 0.007


def test_the_optimizer_trains() -> None:
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(7, 3, generator=g), torch.randint(2, (7,), generator=g)) for _ in range(5)]
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.zero_()
    fit(
        module, data, epochs=1, teacher=nn.Linear(3, 2), loss=lambda out, taught, labels: out.sum(),
        recovery=Recovery(0.5, lambda p, lr: torch.optim.SGD(p, lr=lr), warmup=0.0, schedule="constant"),
        progress=False,
    )  # fmt: skip
    assert torch.allclose(module.weight, -0.5 * sum(x.sum(0) for x, _ in data).expand(2, 3), atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": "fast"}, "lr='fast' is no positive number"),
        ({"lr": 0.0}, "lr=0.0 is no positive number"),
        ({"lr": float("nan")}, "lr=nan is no positive number"),
        ({"optimizer": "adam"}, r"optimizer='adam' is unknown; give one of \['adamw', 'sgd'\]"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"warmup": 1.0}, "warmup=1.0 is no share"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"parametrisation": "sparse"}, "parametrisation='sparse' is unknown"),
    ],
)
def test_mistakes(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SluiceError, match=said):
        Recovery(**wrong)


def test_a_rate_is_a_shortcut() -> None:
    assert recovery_of(0.02, None) == Recovery(0.02) and recovery_of("auto", None) == Recovery()
    asked = Recovery(optimizer="sgd")
    assert recovery_of("auto", asked) is asked and Recipe(recovery=asked).lr == "auto"
    with pytest.raises(SluiceError, match=r"lr=0.02 and recovery= both say how to train; give the rate as recovery="):
        recovery_of(0.02, asked)
