"""Rates, losses and weights found by short runs: against the full grid, and what a trial costs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.training.recovery import RATES, Recovery
from sluice.training.rehearse import held_out_loss
from sluice.training.train import default_loss, fit, label_loss
from sluice.training.trial import (
    BONUS,
    FINALISTS,
    LEAST,
    SHARE,
    UTMOST,
    WHOLE,
    Run,
    Setting,
    _Judge,
    _second,
    lengths,
    quick_rate,
    try_settings,
)

EPOCHS = 6
LONG = 64  # enough for losses and weights


def network(width: int, seed: int, scale: float = 1.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))
    with torch.no_grad():
        module[2].weight.mul_(scale)
    return module


@cache
def teacher() -> nn.Module:
    return network(37, 1, 6.0).eval()


@cache
def data(count: int = 50, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labels are drawn from what the teacher says, so its weights are the best that there are."""
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(11, 6, generator=g) for _ in range(count)]
    with torch.no_grad():
        return [(x, teacher()(x).softmax(1).multinomial(1, generator=g)[:, 0]) for x in inputs]


def deep() -> nn.Module:
    """Nothing of the teacher is left."""
    return network(9, 2)


def light() -> nn.Module:
    """Almost the teacher; what training does to it on few noisy labels is harm."""
    module, g = copy.deepcopy(teacher()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.03 * p.std() * torch.randn(p.shape, generator=g))
    return module


def own(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


def trial(slim: nn.Module, batches: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        teacher=teacher(), recovery=Recovery(), loss=own, epochs=EPOCHS, progress=False,
    )  # fmt: skip
    return try_settings(slim, data() if batches is None else batches, **settings | options)


def after(slim: nn.Module, lr: float) -> float:
    """Loss on other data after the whole training."""
    module = copy.deepcopy(slim)
    fit(module, data(), epochs=EPOCHS, teacher=teacher(), loss=own, recovery=Recovery(lr), progress=False)
    return held_out_loss(module, data(40, 5), teacher(), own)


@pytest.mark.parametrize("slim", [deep, light])
def test_the_rate_is_near_the_best_of_the_grid(slim: Any) -> None:
    """And far from the other end, which is far from the best: no constant serves both."""
    full = {lr: after(slim(), lr) for lr in RATES["adamw"]}
    best, worst = (pick(full, key=full.__getitem__) for pick in (min, max))
    found = trial(slim()).chosen.lr
    assert abs(RATES["adamw"].index(found) - RATES["adamw"].index(best)) <= 1
    room = full[worst] - full[best]
    assert full[found] - full[best] < 0.3 * room
    former = full[1e-3] - full[best]  # the rate that was the default
    assert former > 0.5 * room if slim is deep else former < 0.5 * room < full[1e-2] - full[best]


class Counting(nn.Module):
    """A layer; all copies note the steps that they are trained for, and on what."""

    def __init__(self, log: list[int]) -> None:
        super().__init__()
        self.layer, self.log = nn.Linear(6, 5), log

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.log.append(int(1e6 * float(x.sum())))
        return self.layer(x)

    def __deepcopy__(self, memo: Any) -> Counting:
        made = Counting(self.log)
        made.load_state_dict(self.state_dict())
        return made


@pytest.mark.parametrize(("epochs", "rungs"), [(LONG, 3), (20, 2), (EPOCHS, 2), (2, 0)])
def test_a_trial_costs_what_it_says(epochs: int, rungs: int) -> None:
    log: list[int] = []
    found = trial(Counting(log), loss=default_loss, epochs=epochs)
    share = UTMOST if epochs == EPOCHS else SHARE
    assert len(log) == found.steps <= share * found.total and found.total == 50 * epochs
    assert found.steps > 0.6 * share * found.total or not rungs
    assert len({run.steps for run in found.runs}) == rungs
    if not rungs:
        assert found.chosen == Setting(3e-3, "default loss")


def test_lengths() -> None:
    for total in (0, 50, 300, 1000, 10**5):
        for others in (0, 3):
            steps = lengths(total, 5, others)
            runs = (5, FINALISTS + (others if len(steps) > 2 else 0), FINALISTS)
            assert sum(n * s for n, s in zip(runs, steps, strict=False)) <= max(SHARE * total, 9 * LEAST)
            assert all(s >= LEAST for s in steps) and all(b == 2 * a for a, b in itertools.pairwise(steps))
            assert not steps or sum(n * s for n, s in zip(runs, steps, strict=False)) <= UTMOST * total
            assert len(steps) < 3 or steps[0] >= WHOLE
    assert lengths(250, 5, 0) == () and lengths(300, 5, 3) == (LEAST, 2 * LEAST)
    # Long runs of the rates alone go before short ones of everything.
    assert lengths(3000, 5, 3) == (50, 100) and lengths(3100, 5, 3) == (20, 40, 80)


def test_a_rung_takes_the_same_batches_and_none_that_is_judged_on() -> None:
    log: list[int] = []
    found = trial(Counting(log), epochs=LONG)
    at = 0
    held = {int(1e6 * float(x.sum())) for x, _ in data()[:8]}
    assert not held & set(log)
    for steps in sorted({run.steps for run in found.runs}):
        count = sum(run.steps == steps for run in found.runs)
        rung = log[at : at + steps * count]
        assert all(len(set(rung[k * count : (k + 1) * count])) == 1 for k in range(steps))
        assert len(set(rung)) == min(steps, 50 - 8)
        at += steps * count
    assert at == len(log)


def test_three_rungs_try_losses_and_weights() -> None:
    found = trial(deep(), loss=default_loss, epochs=LONG, widen=deep)
    steps = sorted({run.steps for run in found.runs})
    first, second, third = ([run.setting for run in found.runs if run.steps == s] for s in steps)
    assert [s.lr for s in first] == list(RATES["adamw"]) and {(s.loss, s.dense) for s in first} == {
        ("default loss", False)
    }
    leader = second[0]
    assert [(s.loss, s.dense) for s in second[1:]] == [
        ("default loss", False), ("labels", False), ("logits", False), ("default loss", True),
    ]  # fmt: skip
    assert {s.lr for s in second[2:4]} == {leader.lr} and second[4].lr < leader.lr and second[1].lr != leader.lr
    assert len(third) == 2 and set(third) <= set(second) and found.chosen in third and found.measure == "labels"


def test_the_best_two_rates_go_on() -> None:
    best = [Setting(lr, "a") for lr in (1e-2, 3e-2, 3e-3)]
    assert _second(best, Recovery(), ["b"], True) == [
        *best[:2], Setting(1e-2, "b"), Setting(3e-3, "a", dense=True),
    ]  # fmt: skip
    assert _second(best[:1], Recovery(), [], False) == best[:1]


@pytest.mark.parametrize("seed", [7, 8])
def test_a_teacher_that_is_wrong_is_not_followed(seed: int) -> None:
    assert trial(deep(), loss=default_loss, epochs=LONG, teacher=network(8, seed, 9.0)).chosen.loss == "labels"


def test_without_labels_there_is_distillation_alone() -> None:
    found = trial(deep(), [x for x, _ in data()], loss=default_loss, epochs=LONG)
    assert {run.setting.loss for run in found.runs} == {"default loss"} == {found.measure} and found.dense == 0.0


def test_no_other_loss_is_tried_beside_ones_own() -> None:
    seen = []

    def noted(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        seen.append(float(own(outputs, taught, labels).detach()))
        return own(outputs, taught, labels)

    found = trial(deep(), loss=noted, epochs=LONG)
    assert {run.setting.loss for run in found.runs} == {"own loss"} and len(seen) > found.steps
    assert found.before == pytest.approx(held_out_loss(deep(), data()[:8], teacher(), own))


def test_a_number_is_obeyed_without_a_trial() -> None:
    log: list[int] = []
    for form, dense in (("auto", False), ("dense", True)):
        found = trial(Counting(log), recovery=Recovery(0.02, parametrisation=form), epochs=LONG, widen=deep)
        assert found.chosen == Setting(0.02, "own loss", dense) and not found.runs and not log


def test_runs_that_are_not_finite_are_out() -> None:
    def breaks(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        value = own(outputs, taught, labels)
        return value * math.nan if float(outputs.detach().abs().max()) > 0.9 else value

    found = trial(network(9, 2, 0.1), loss=breaks)
    first = [run for run in found.runs if run.steps == min(r.steps for r in found.runs)]
    assert [math.isfinite(run.held_out) for run in first][::4] == [True, False]
    assert math.isfinite(next(r.held_out for r in found.runs[::-1] if r.setting == found.chosen))

    with pytest.raises(SluiceError, match="gives no finite loss on the first batches of data; check the data"):
        trial(deep(), [(x * math.nan, y) for x, y in data()])


def judge(total: int = 64, before: float = 9.0) -> _Judge:
    return _Judge(deep(), None, {}, own, [], iter(()), teacher(), Recovery(), Setting(3e-3, "a"), before, total)


def test_larger_rates_have_a_bonus_and_the_default_a_margin() -> None:
    small, large, largest, other = (
        Setting(lr, name) for lr, name in zip((3e-3, 1e-2, 3e-2, 3e-3), "aaab", strict=True)
    )
    dense = replace(small, dense=True)

    def winner(*runs: tuple[Setting, float], total: int = 64, before: float = 9.0) -> Setting:
        return judge(total, before).best([Run(setting, 8, value) for setting, value in runs])[0]

    allowed = BONUS**3  # three doublings from 8 to 64 steps
    assert (
        winner((small, 1.0), (large, 0.99 * allowed)) == large
        and winner((small, 1.0), (large, 1.01 * allowed)) == small
    )
    assert winner((small, 1.0), (large, 1.01), total=8) == small
    assert winner((large, 1.0), (largest, 1.01)) == largest and winner((large, 1.0), (dense, 1.01)) == large
    # Of a loss below zero, or where little was to be won, shares of it or of what was won count.
    assert winner((small, -1.0), (large, -0.99)) == large and winner((small, -1.0), (large, -0.6)) == small
    assert winner((small, 1.0), (large, 1.2), before=1.2) == small
    assert winner((large, 1.0), (small, math.inf)) == large
    assert winner((small, 1.0), (other, 0.92)) == small and winner((small, 1.0), (other, 0.9)) == other


def test_the_last_rung_compares_the_best_with_another_loss() -> None:
    small, large, other = Setting(3e-3, "a"), Setting(1e-2, "a"), Setting(3e-3, "b")
    rung = [Run(small, 8, 1.0), Run(large, 8, 1.6), Run(other, 8, 1.8)]
    assert judge().finalists(rung) == [small, other] and judge().finalists(rung[:2]) == [small, large]


def test_the_same_seed_finds_the_same_and_draws_what_it_drew() -> None:
    class Loader:
        def __len__(self) -> int:
            return 50

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return (data()[int(k)] for k in torch.randperm(50))

    def dropping() -> nn.Module:
        return nn.Sequential(deep()[0], nn.Dropout(0.3), deep()[2])  # type: ignore[index]

    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append((trial(dropping(), Loader()).runs, torch.rand(3).tolist()))
    torch.manual_seed(5)
    assert found[0] == found[1] and found[0][1] == torch.rand(3).tolist()


def test_the_network_stays_as_it_is() -> None:
    slim, before = deep(), deep().state_dict()
    trial(slim)
    assert all(torch.equal(t, before[n]) for n, t in slim.state_dict().items())


def test_data_without_a_length_are_counted_and_a_single_reading_is_left() -> None:
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(data())

    assert trial(deep(), Stream()) == trial(deep())
    once = iter(data())
    assert not trial(deep(), once).runs and len(list(once)) == 50


def test_short_runs_of_a_deep_cut_take_a_larger_rate() -> None:
    rates = [
        quick_rate(m, data(), teacher=teacher(), loss=label_loss, recovery=Recovery(), steps=15, progress=False)
        for m in (deep(), light())
    ]
    assert rates == [1e-2, 1e-3]
    assert quick_rate(
        deep(), data(), teacher=teacher(), loss=own, recovery=Recovery(0.5), steps=15, progress=False
    ) == 0.5  # fmt: skip


def test_a_short_run_forgets_the_old_statistics() -> None:
    norm = nn.BatchNorm1d(6, momentum=0.1)
    with torch.no_grad():
        norm.running_mean.add_(50.0)  # type: ignore[union-attr]
    judge = _Judge(norm, None, {"own": lambda o, t, y: 0 * o.sum()}, lambda o, t, y: o.abs().mean(),
                   data()[:1], iter(data()[1:]), nn.Identity(), Recovery(), Setting(1e-3, "own"), 9.0, 15)  # fmt: skip
    (run,) = judge.rung([Setting(1e-3, "own")], 15, progress=False)
    assert run.held_out < 3.0 and norm.momentum == 0.1
