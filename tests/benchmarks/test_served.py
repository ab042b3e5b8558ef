"""Tables, promises and plans of a device that is served, against those of the same device at hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.served import Planned, compared, main, summary


class Told(Planned):
    """A plan by what it promises and costs; it holds no problem."""

    def __init__(self, points: dict[Any, float], width: int, ms: float) -> None:
        object.__setattr__(self, "solution", SimpleNamespace(choice=SimpleNamespace(widths={"a": width})))
        object.__setattr__(self, "told", (points, ms))

    told: Any

    def points(self) -> dict[Any, float]:
        found: dict[Any, float] = self.told[0]
        return found

    def promise(self, widths: dict[str, int]) -> float:
        return float(self.told[1] * widths["a"])

    def loss(self, widths: dict[str, int]) -> float:
        return 10.0 / widths["a"]


def test_tables_are_compared_at_common_points_and_plans_by_the_losses_of_one() -> None:
    one = Told({("p", (1,)): 0.11, ("p", (2,)): 0.2, ("q", (1,)): 1.0}, 4, 0.103)
    other = Told({("p", (1,)): 0.1, ("p", (2,)): 0.2}, 5, 0.1)
    found = compared(one, other)
    assert found["common"] == 2 and found["points"] == pytest.approx(0.0953 / 2, rel=1e-3)
    assert found["promise"] == pytest.approx(0.03) and found["loss"] == pytest.approx(0.25)
    rows = {"x": {"again": found, "served": compared(other, other)}, "y": dict.fromkeys(("again", "served"), found)}
    told = summary(rows)
    assert told["points_again"] == told["points_served"] == round(found["points"], 4) and told["loss_served"] == 0.25


def test_wrong_words_end_in_one_sentence() -> None:
    with pytest.raises(SystemExit):
        main(["--networks", "resnet21"])
