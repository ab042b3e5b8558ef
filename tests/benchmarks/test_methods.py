"""Bookkeeping of `benchmarks.methods`: what is left to do, what is compared with what, and the control's width."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods import main, read_result, work, write_result
from benchmarks.methods_jobs import Job
from benchmarks.methods_plot import dot_plot
from benchmarks.methods_results import (
    CELLS,
    METHODS,
    SINGLES,
    Record,
    Run,
    Store,
    figures,
    outstanding,
    summary,
    table,
)
from benchmarks.methods_runs import perform, widest
from sluice.core.errors import SluiceError
from sluice.training.train import default_loss, fit
from tests import tiny

CELLS_OF_ONE = {("net", "50%"): 3}
DENSE = 98.0


def record(
    method: str, accuracy: float | None, seed: int = 0, *, budget: str = "50%", ms: float = 1.9, epochs: int = 3
) -> Record:
    run = Run("net", budget, method, seed, epochs)
    if accuracy is None:
        return Record(run, "a device", DENSE, 1.0, reason="budget cannot be met: made up")
    return Record(run, "a device", DENSE, 1.0, accuracy, 4.0, 2.0, ms, 77)


def complete(budget: str = "50%", **accuracies: float | None) -> list[Record]:
    """A cell without anything left: every accuracy with both seeds where it matters."""
    own = {**dict.fromkeys(METHODS), **accuracies}
    found = [record(method, value, budget=budget) for method, value in own.items()]
    second = {"joint", max(SINGLES, key=lambda m: -math.inf if own[m] is None else float(own[m] or 0))}
    return found + [record(m, own[m], 1, budget=budget) for m in sorted(second) if m == "joint" or own[m] is not None]


def test_joint_is_compared_with_the_best_single_method() -> None:
    records = complete(filter=97.0, rank=90.0, bsr=96.0, joint=97.5, thin=99.0)
    found = summary(records, CELLS_OF_ONE)
    assert found["points"] == 1 and found["runs_left"] == 0
    assert found["joint_minus_best_single_worst"] == found["joint_minus_best_single_mean"] == 0.5


def test_worst_and_mean_over_cells() -> None:
    cells = {("net", "50%"): 3, ("net", "25%"): 3}
    records = complete(filter=97.0, joint=97.6) + complete("25%", merge=90.0, joint=89.8)
    found = summary(records, cells)
    assert (found["points"], found["joint_minus_best_single_worst"]) == (2, -0.2)
    assert found["joint_minus_best_single_mean"] == pytest.approx(0.2)


def test_seeds_are_averaged() -> None:
    records = [r for r in complete(filter=97.0, joint=97.5) if r.run.seed == 0]
    records += [record("filter", 96.0, 1), record("joint", 96.5, 1)]
    assert summary(records, CELLS_OF_ONE)["joint_minus_best_single_mean"] == 0.5
    assert figures(records, CELLS_OF_ONE)["net", "50%"] == {
        **dict.fromkeys(METHODS), "filter": 96.5 - DENSE, "joint": 97.0 - DENSE,
    }  # fmt: skip


def test_a_budget_that_joint_misses_leaves_no_number() -> None:
    cells = {("net", "50%"): 3, ("net", "25%"): 3}
    good = complete(filter=97.0, joint=97.6)
    for bad in ([*complete("25%", block=60.0, joint=None)], _over_budget(complete("25%", block=60.0, joint=70.0))):
        found = summary(good + bad, cells)
        assert found["joint_misses"] == ["net 25%"] and found["points"] == 1
        assert found["joint_minus_best_single_worst"] is found["joint_minus_best_single_mean"] is None


def _over_budget(records: Sequence[Record]) -> list[Record]:
    """The same, joint's second engine too slow."""
    late = record("joint", 70.0, 1, budget=records[0].run.budget, ms=2.01)
    return [late if r.run == late.run else r for r in records]


def test_a_budget_that_only_joint_reaches_has_no_difference() -> None:
    found = summary(complete(joint=97.6), CELLS_OF_ONE)
    assert (found["points"], found["joint_alone"], found["joint_misses"]) == (0, ["net 50%"], [])
    assert found["joint_minus_best_single_worst"] is None


def test_a_cell_with_runs_left_does_not_count_but_the_control_may_be_missing() -> None:
    records = complete(filter=97.0, joint=97.5)
    for left, points in (("joint", 0), ("filter", 0), ("thin", 1)):
        rest = [r for r in records if r.run.method != left]
        found = summary(rest, CELLS_OF_ONE)
        assert found["points"] == points and found["runs_left"] > 0


def test_the_best_single_method_has_two_seeds_before_it_is_the_best() -> None:
    records = [record(m, None if m == "block" else 90.0) for m in METHODS] + [record("joint", 90.0, 1)]
    records = [record("rank", 92.0) if r.run.method == "rank" else r for r in records]
    assert outstanding(records, CELLS_OF_ONE) == [record("rank", None, 1).run]
    records.append(record("rank", 84.0, 1))  # a mean of 88: now filter leads
    assert outstanding(records, CELLS_OF_ONE) == [record("filter", None, 1).run]
    records.append(record("filter", 90.0, 1))
    assert not outstanding(records, CELLS_OF_ONE)


def test_runs_of_other_epochs_are_other_runs() -> None:
    tried = [record(method, 97.0, epochs=1) for method in METHODS]
    assert len(outstanding(tried, CELLS_OF_ONE)) == len(METHODS) + 1
    assert not figures(tried, CELLS_OF_ONE)


def test_finished_runs_are_not_done_again(tmp_path: Path) -> None:
    store, done = Store(tmp_path), []

    def perform(run: Run) -> Record:
        done.append(run)
        if len(done) == 4:
            raise KeyboardInterrupt
        return record(run.method, None if run.method == "block" else 90.0 + len(done), run.seed)

    with pytest.raises(KeyboardInterrupt):
        work(store, CELLS_OF_ONE, perform, say=lambda text: None)
    assert len(store.load()) == 3
    assert work(store, CELLS_OF_ONE, perform, say=lambda text: None) == []
    assert len(done) == len(set(done)) + 1 == len(METHODS) + 2 + 1  # only the killed one twice; two second seeds
    assert not outstanding(store.load(), CELLS_OF_ONE)
    assert work(store, CELLS_OF_ONE, perform, say=lambda text: None) == []
    assert len(store.load()) == len(done) - 1


def test_a_run_that_breaks_does_not_stop_the_others(tmp_path: Path) -> None:
    said: list[str] = []

    def perform(run: Run) -> Record:
        if run.method == "rank":
            raise RuntimeError("out of luck")
        return record(run.method, 95.0, run.seed)

    broken = work(Store(tmp_path), CELLS_OF_ONE, perform, lambda run: run.seed == 0, said.append)
    assert [run.method for run in broken] == ["rank"]
    assert "out of luck" in "".join(said)
    assert {r.run.method for r in Store(tmp_path).load()} == set(METHODS) - {"rank"}


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    for one in (record("filter", 97.25), record("rank", None)):
        Store(tmp_path).save(one)
        assert one in Store(tmp_path).load()
        data = json.loads((tmp_path / f"{one.run.name}.json").read_text())
        assert data["met"] is (one.accuracy is not None)
    (tmp_path / "net.json").write_text('{"job": 1}')
    with pytest.raises(SluiceError, match=r"net\.json.* delete it"):
        Store(tmp_path).load()


def test_the_result_is_shown_with_json_in_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = ("resnet20-mnist", "25%")
    records = [
        Record(Run(*cell, r.run.method, r.run.seed, CELLS[cell]), *r_fields(r))
        for r in complete(filter=97.0, joint=90.0, thin=95.5)
    ]
    result, plot = tmp_path / "r.json", tmp_path / "p.svg"
    write_result([*records, record("joint", 12.0, epochs=1)], CELLS, result, plot)
    assert read_result(result) == records
    assert main(["--show", "--result", str(result)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = json.loads(lines[-1])
    assert (shown["points"], shown["joint_minus_best_single_worst"]) == (1, -7.0)
    assert shown == json.loads(result.read_text())["summary"]
    assert any("joint" in line and "90.00%" in line and "-8.00" in line for line in lines)
    assert any("block" in line and "cannot reach" in line for line in lines)
    texts = [element.text for element in ET.parse(plot).iter() if element.tag.endswith("text")]
    assert "◂ -8.00" in texts and texts.count("cannot reach") == 4


def r_fields(r: Record) -> tuple:
    names = ("device", "dense_accuracy", "seconds", "accuracy", "dense_ms", "budget_ms", "measured_ms", "params")
    return (*(getattr(r, name) for name in names), r.detail, r.reason)


def test_wrong_words_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job", "resnet21", "--dry-run"]) == 1
    assert "there is no 'resnet21'" in capsys.readouterr().err
    assert main(["--show", "--result", str(tmp_path / "none.json")]) == 1
    assert "run the benchmark" in capsys.readouterr().err


def test_a_dry_run_lists_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--folder", str(tmp_path), "--job", "crepe-tiny", "--method", "thin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["crepe-tiny-50-thin-s0-e6", "crepe-tiny-25-thin-s0-e6"] and lines[-1].startswith("2 runs")
    assert not list(tmp_path.rglob("*.json"))


def test_the_table_says_what_is_over_budget_and_how_many_seeds_there_are() -> None:
    text = table([record("filter", 97.0), record("filter", 96.0, 1, ms=2.1), record("rank", None)], CELLS_OF_ONE)
    filters = next(line for line in text.splitlines() if line.strip().startswith("filter"))
    assert filters.split() == ["filter", "96.50%", "-1.50", "50.0%", "77", "2", "over", "budget"]


@pytest.mark.parametrize(("budget", "share"), [(1.0, 1.0), (0.5, 0.625), (0.3, 0.4375), (0.01, None)])
def test_the_control_is_the_widest_that_fits_on_a_staircase(budget: float, share: float | None) -> None:
    """A simulated device that computes channels in blocks of 8: 40 wide costs as much as 36, but 32 more than 28."""

    def ms(share: float) -> float:
        width = 64 * share
        return (8 * math.ceil(width / 8) / 64) ** 2 * (1.6 if width == 32 else 1.0)

    shares = tuple(k / 16 for k in range(16, 0, -1))
    assert widest(shares, lambda s: ms(s) <= budget) == share
    assert share is None or all(ms(s) > budget for s in shares if s > share)


class Net(nn.Module):
    """(N, 3, 9, 9) to (N, 5), 12 channels at full width."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, round(12 * share), 3), nn.Conv2d(round(12 * share), round(12 * share), 3)
        self.fc = nn.Linear(round(12 * share), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def tiny_job(trained: list[int]) -> Job:
    torch.manual_seed(0)
    dense = Net()

    def scratch(model: nn.Module, seed: int) -> nn.Module:
        trained.append(seed)
        return fit(model, tiny.data(), epochs=2, teacher=dense, progress=False)

    return Job(
        name="tiny",
        model=dense,
        example=tiny.inputs(),
        data=lambda seed: tiny.data(),
        loss=default_loss,
        evaluate=lambda model: 7.0,
        thin=Net,
        shares=(0.75, 0.5),
        scratch=scratch,
        dense_epochs=2,
        batch=tiny.BATCH,
    )


def test_the_control_meets_the_budget_on_the_device(tmp_path: Path) -> None:
    trained: list[int] = []
    job = tiny_job(trained)
    with tiny.simulated_device():
        found = perform(job, Run("tiny", "40%", "thin", 7, 1), tmp_path)
        hopeless = perform(replace(job, shares=(0.5,)), Run("tiny", "10%", "thin", 7, 1), tmp_path)
    macs = {w: 49 * 27 * w + 25 * 9 * w * w + 5 * w for w in (6, 9, 12)}
    width = max(w for w in macs if macs[w] <= 0.4 * macs[12])
    assert trained == [7] and found.met and not found.reason
    assert found.detail == f"width {width / 12:g}, 2 + 1 epochs"
    assert found.params == 28 * width + (9 * width + 1) * width + 5 * (width + 1)
    assert found.measured_ms == pytest.approx(tiny.CALL_MS + tiny.MAC_MS * tiny.BATCH * macs[width], rel=1e-6)
    assert hopeless.accuracy is hopeless.measured_ms is None and "10% cannot be met" in hopeless.reason


def test_points_beyond_the_axis_stay_in_the_picture() -> None:
    root = ET.fromstring(dot_plot("a < b", {"one": {"filter": -44.0, "joint": 0.3, "rank": None}}, METHODS))
    width = float(root.attrib["width"])
    circles = [float(e.attrib["cx"]) for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 and all(0 < cx < width for cx in circles)
