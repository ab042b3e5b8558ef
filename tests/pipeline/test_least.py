"""The search for the least latency, on curves that are known, and its whole way on a simulated device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sluice
from sluice.artifacts.report import Report
from sluice.artifacts.report_least import CurveRow, LeastRow
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.pipeline import least, prepare
from sluice.pipeline.compress import Compressed, compress
from sluice.pipeline.least import FULL, SHORT, search, shares
from sluice.solver.decide import least_ms, restricted
from tests import tiny

BUDGETS = shares(0.1)
LAST = len(BUDGETS) - 1
DENSE = 98.9


class Trials:
    """Budgets that were tried, and what they give: a drop by ``k``, which short trainings have ``foreseen``."""

    def __init__(self, drop: Callable[[int], float], foreseen: Callable[[int], float] | None = None) -> None:
        self.drop, self.foreseen = drop, foreseen or drop
        self.short, self.full = list[int](), list[int]()

    def try_briefly(self, share: float) -> CurveRow:
        self.short.append(BUDGETS.index(share))
        return CurveRow(share, forecast=DENSE - self.foreseen(self.short[-1]))

    def train(self, share: float) -> tuple[int | None, CurveRow]:
        self.full.append(k := BUDGETS.index(share))
        drop = self.drop(k)
        if drop == math.inf:
            return None, CurveRow(share, full=True, reason=f"no engine at {k}")
        return k, CurveRow(share, share, share, None if math.isnan(drop) else DENSE - drop, full=True)

    def found(self, allowed: float) -> tuple[int | None, bool]:
        """Where the search settles, and whether the figure is kept there."""
        at, curve = search(LeastRow(allowed, DENSE), BUDGETS, self.try_briefly, self.train)
        assert len(curve.tried) == len(self.short) + len(self.full) and len(self.short) <= SHORT
        assert len(self.full) == len(set(self.full)) <= FULL and {*self.short, *self.full} <= set(range(1, LAST + 1))
        return at, curve.met()


def test_budgets_fall_at_equal_ratios_from_dense_to_least() -> None:
    ratios = np.divide(BUDGETS[1:], BUDGETS[:-1])
    assert (BUDGETS[0], len(BUDGETS)) == (1.0, 2**SHORT) and BUDGETS[-1] == pytest.approx(0.1)
    assert ratios == pytest.approx(np.full(LAST, 0.1 ** (1 / LAST)))


@pytest.mark.parametrize("last", range(1, LAST + 1))
def test_where_forecasts_are_true_the_last_budget_that_keeps_the_figure_is_found(last: int) -> None:
    trials = Trials(lambda k: 1.0 if k <= last else 1.1)
    assert trials.found(1.0) == (last, True)
    assert len(trials.short) == SHORT and trials.full == [last]


def test_a_drop_that_no_budget_keeps_is_told() -> None:
    trials = Trials(lambda k: 1.1)
    assert trials.found(1.0) == (1, False) and trials.full == [1]


def test_a_drop_that_the_least_latency_keeps_ends_there() -> None:
    trials = Trials(lambda k: -0.5)
    assert trials.found(0.0) == (LAST, True) and trials.full == [LAST]


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_forecasts_are_set_right_by_the_first_fine_tune(error: float) -> None:
    """Those that are all too low by half a point, and those that are too high."""
    trials = Trials(lambda k: 0.1 * k, lambda k: 0.1 * k + error)
    assert trials.found(1.05) == (10, True)
    assert trials.full == [5 if error > 0 else 15, 10]


def test_two_that_missed_end_the_search_at_the_nearer_one() -> None:
    trials = Trials(lambda k: 2.0 + 0.1 * k, lambda k: 0.1 * k)
    assert trials.found(1.05) == (1, False) and trials.full == [10, 1]


def test_room_is_not_used_where_short_trainings_say_that_there_is_none() -> None:
    trials = Trials(lambda k: 0.9 if k <= 10 else 3.0)
    assert trials.found(1.0) == (10, True) and trials.full == [10]


@pytest.mark.parametrize("seed", range(40))
def test_a_figure_without_order_ends_as_soon(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drops, errors = rng.normal(1.0, 1.0, LAST + 1), rng.normal(0.0, 0.5, LAST + 1)
    drops[rng.random(LAST + 1) < 0.2] = math.inf
    drops[rng.random(LAST + 1) < 0.2] = math.nan
    at, kept = Trials(lambda k: drops[k], lambda k: drops[k] + errors[k]).found(1.0)
    assert kept == (at is not None and bool(drops[at] <= 1.0))


def test_budgets_without_an_engine_have_missed() -> None:
    trials = Trials(lambda k: 0.5 if k <= 12 else math.inf)
    assert trials.found(1.0) == (12, True)
    trials = Trials(lambda k: 0.5 if k <= 12 else math.inf, lambda k: 0.5 if k <= 13 else math.inf)
    assert trials.found(1.0) == (12, True) and trials.full == [13, 12]


def test_nothing_is_found_where_every_fine_tune_fails() -> None:
    assert Trials(lambda k: math.inf).found(1.0) == (None, False)


def test_steps_go_through_the_data_as_often_as_it_takes() -> None:
    steps = least._Steps("abc", 7)
    assert "".join(steps) == "".join(steps) == "abcabca" and len(steps) == 7


@pytest.fixture(autouse=True, scope="module")
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


def kept_parameters(module: nn.Module) -> float:
    """A figure that falls with every cut, whatever is trained: percent of the dense network's parameters."""
    count, dense = (sum(p.numel() for p in m.parameters()) for m in (module, tiny.model()))
    return 100.0 * count / dense


def sought(table: Path, **changes: Any) -> Compressed:
    settings: dict[str, Any] = dict(
        budget="-40", data=tiny.data(), table=table, batch=tiny.BATCH, methods=("filter",), epochs=5, rehearsal=0,
        lr=1e-3, evaluate=kept_parameters, progress=False,
    )  # fmt: skip
    return compress(tiny.model(), tiny.inputs(), **{**settings, **changes})


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest network with 60% of the parameters, from one set of prices, in as many steps as are stated."""
    steps, priced = [0], [0]
    step, price = torch.optim.AdamW.step, prepare.price_problem

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        steps[0] += 1
        return step(self, *args, **options)

    def pricing(*args: Any, **options: Any) -> Any:
        priced[0] += 1
        return price(*args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    monkeypatch.setattr(prepare, "price_problem", pricing)
    done = sought(tiny.table_in(tmp_path), out=tmp_path / "out")
    report, curve = done.report, done.report.least
    assert curve is not None and curve.met() and report.met() and priced == [1]
    assert (curve.drop, curve.dense) == (40.0, 100.0)
    short, full = ([row for row in curve.tried if row.full is whole] for whole in (False, True))
    assert len(short) == SHORT and 1 <= len(full) <= FULL
    assert steps[0] == len(short) * 9 + len(full) * 30  # of 30 steps a tenth and two; no trial, as a rate is given
    assert {row.epochs for row in short} == {1.5} and {row.epochs for row in full} == {5}
    for row in short:  # a figure that training leaves alone is its own forecast
        assert row.metric == row.forecast and row.measured is not None and row.promised is not None
        assert row.measured == pytest.approx(row.promised, rel=0.02) and row.measured <= row.budget
    settled = curve.settled()
    assert settled is not None and settled.metric == report.metric_slim == kept_parameters(done.module) >= 60.0
    assert settled.measured == pytest.approx((report.measured_ms or 0.0) / report.dense_ms)
    assert report.budget_ms == pytest.approx(settled.budget * report.dense_ms)
    # The next of the shares that were told apart is too small.
    misses = [row.budget for row in curve.tried if not curve.keeps(row.metric)]
    assert settled.budget > max(misses) > 0.8 * settled.budget
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == report
    assert Plan.load(tmp_path / "out" / "plan.json") == done.plan


def test_the_ends_of_the_curve(tmp_path: Path) -> None:
    """Without training: all may be lost, and nothing."""
    table = tiny.table_in(tmp_path)
    fastest = sought(table, budget="-100", epochs=0).report
    assert fastest.least is not None and fastest.least.met() and fastest.met()
    measured = sluice.profile(tiny.model(), tiny.inputs(), table, batch=tiny.BATCH, progress=False)
    sites = measured.options.sites(measured.latency, ["filter"])
    reached = least_ms(restricted(measured.latency, sites)).promised_ms
    assert fastest.promised_ms == pytest.approx(reached, rel=0.02)
    kept = sought(table, budget="-0", epochs=0, out=tmp_path / "out")
    curve = kept.report.least
    assert curve is not None and not curve.met() and curve.settled() is not None
    assert (tmp_path / "out" / "slim.onnx").exists()


def test_what_a_search_lacks_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.pipeline.compress.prepare", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(SluiceError, match=r"a drop of 40 is allowed, but of no figure; give evaluate="):
        sought(tmp_path / "t.db", evaluate=None)
    with pytest.raises(SluiceError, match="gate_epochs=2 trains gates for one budget"):
        sought(tmp_path / "t.db", gate_epochs=2)


def test_a_dense_network_without_a_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="evaluate gives nan for the dense network; let it return a number"):
        sought(tiny.table_in(tmp_path), evaluate=lambda module: math.nan)


def test_a_network_that_gets_no_faster_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.Problem, "least_from", lambda self, target_ms: self.profile.latency.dense_ms())
    with pytest.raises(
        SluiceError, match=r"no plan is faster than the dense network .* so there is no latency to seek"
    ):
        sought(tiny.table_in(tmp_path))
