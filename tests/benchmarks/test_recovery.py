"""The benchmark of trials: its cut, its data, and that a trial shortens the fine-tune."""

from __future__ import annotations

import torch

from benchmarks import recovery
from sluice.models import enliven
from sluice.models.mnist import Digits
from sluice.passes.graph.capture import capture


def digits(count: int) -> Digits:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 1, 14, 14, generator=g), torch.randint(10, (count,), generator=g)
    return Digits(x, y, x[:50], y[:50])


def test_the_channels_with_the_largest_weights_stay() -> None:
    model = enliven(recovery.network(), 0)
    with torch.no_grad():
        model.get_parameter("0.weight")[[2, 5, 11]] *= 40.0
    plan = recovery.plan_of(capture(model.eval(), digits(2).train_x), 0.2)
    (keep,) = [s.keep for s in plan.slices if (s.param, s.axis) == ("0.weight", 0)]
    assert keep == (2, 5, 11) and plan.widths and max(plan.widths.values()) == 10


def test_all_fine_tunes_of_a_cut() -> None:
    data = digits(300)
    dense = capture(enliven(recovery.network(), 0).eval(), data.train_x[:2])
    batches = recovery.Shuffled(data, torch.Generator().manual_seed(1))
    assert len(batches) == len(list(batches)) == 12
    found = recovery.one("deep", 0, 5, data, dense)
    assert found["epochs"] == {"fine-tune": 4, "trial": 0.0} and found["setting"]["lr"] == 3e-3 and not found["runs"]
    assert found["before"] == found["rates"]["0.001"] and found["oracle"] == max(found["rates"].values())
