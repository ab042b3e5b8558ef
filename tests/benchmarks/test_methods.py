"""Bookkeeping of `benchmarks.methods`: what is left to do, what is compared with what."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.methods import main, read_result, work, write_result
from benchmarks.methods_plot import dot_plot
from benchmarks.methods_results import ARMS, CELLS, LIMIT, OTHERS, SEEDS, Record, Run, Store, figures, outstanding
from benchmarks.methods_results import summary as summary_of
from benchmarks.methods_table import table
from sluice.core.errors import SluiceError

CELL = ("net", "50%")
CELLS_OF_ONE = {CELL: 3}
HERE = [arm for arm in ARMS if arm != "progressive"]  # half of the latency is reached without a stop
DENSE = 98.0


def record(
    arm: str, accuracy: float | None, seed: int = 0, *, budget: str = "50%", share: float | None = None, epochs: int = 3
) -> Record:
    run = Run("net", budget, arm, seed, epochs)
    if accuracy is None:
        return Record(run, "a device", DENSE, 1.0, reason="budget cannot be met: made up")
    return Record(run, "a device", DENSE, 1.0, accuracy, 4.0, 4.0 * (run.share if share is None else share), 77)


def complete(budget: str = "50%", share: float | None = None, **accuracies: float | None) -> list[Record]:
    """A cell without anything left: every accuracy with all seeds where they are asked for. ``tp`` is Torch-Pruning."""
    own = {**dict.fromkeys(ARMS), **{{"tp": "torch-pruning"}.get(k, k): v for k, v in accuracies.items()}}
    found = [record(arm, value, budget=budget, share=share) for arm, value in own.items()]
    reached = [arm for arm in OTHERS if own[arm] is not None]
    more = ["ours", *sorted(reached, key=lambda arm: own[arm] or 0)[-1:]]
    return found + [record(arm, own[arm], seed, budget=budget, share=share) for arm in more for seed in SEEDS[1:]]


def test_ours_is_compared_with_the_best_other_and_not_with_itself() -> None:
    found = summary_of([*complete(ours=97.5, tp=97.0, thin=90.0, gates=99.0)], CELLS_OF_ONE)
    assert (found["points"], found["runs_left"]) == (1, 0)
    assert found["ours_minus_best_other_min_50"] == 0.5
    assert found["ours_minus_best_other_min_25"] is found["ours_minus_best_other_min_15"] is None


def test_the_least_difference_over_jobs_counts() -> None:
    records = complete(ours=97.5, tp=97.0)
    other = [replace(r, run=replace(r.run, job="other")) for r in complete(ours=96.0, thin=96.2, tp=90.0)]
    found = summary_of(records + other, {**CELLS_OF_ONE, ("other", "50%"): 3})
    assert (found["points"], found["ours_minus_best_other_min_50"]) == (2, -0.2)


def test_seeds_are_averaged() -> None:
    records = [r for r in complete(ours=97.5, tp=97.0) if r.run.seed == 0]
    records += [record("ours", 96.9, seed) for seed in (1, 2)] + [record("torch-pruning", 96.4, s) for s in (1, 2)]
    assert summary_of(records, CELLS_OF_ONE)["ours_minus_best_other_min_50"] == 0.5
    changes = figures(records, CELLS_OF_ONE)[CELL]
    assert changes["ours"] == pytest.approx(97.1 - DENSE) and changes["thin"] is None


def test_a_budget_that_ours_misses_leaves_no_number() -> None:
    cells = {CELL: 3, ("other", "50%"): 3}
    good = [replace(r, run=replace(r.run, job="other")) for r in complete(ours=97.5, tp=97.0)]
    late = [record("ours", 70.0, 1, share=0.5 * LIMIT + 0.001) if r.run.arm == "ours" and r.run.seed == 1 else r
            for r in complete(ours=70.0, thin=60.0)]  # fmt: skip
    for bad in (complete(ours=None, thin=60.0), late):
        found = summary_of(good + bad, cells)
        assert (found["points"], found["ours_misses"]) == (1, ["net 50%"])
        assert found["ours_minus_best_other_min_50"] is None


def test_an_arm_beyond_the_budget_is_out() -> None:
    records = [r for r in complete(ours=97.5, thin=97.0) if r.run.arm != "torch-pruning"]
    found = summary_of([*records, record("torch-pruning", 98.0, share=0.5 * LIMIT + 0.001)], CELLS_OF_ONE)
    assert found["ours_minus_best_other_min_50"] == 0.5
    within = [*records, *(record("torch-pruning", 98.0, s, share=0.5 * LIMIT - 0.001) for s in SEEDS)]
    assert summary_of(within, CELLS_OF_ONE)["ours_minus_best_other_min_50"] == -0.5


def test_a_budget_that_only_ours_reaches_has_no_difference() -> None:
    found = summary_of(complete(ours=97.5), CELLS_OF_ONE)
    assert (found["points"], found["ours_alone"], found["ours_misses"]) == (0, ["net 50%"], [])


def test_only_ours_and_the_others_must_be_through() -> None:
    records = [r for r in complete(ours=97.5, tp=97.0) if r.run.seed == 0]
    for left, points in (("ours", 0), ("thin", 0), ("torch-pruning", 0), ("gates", 1)):
        found = summary_of([r for r in records if r.run.arm != left], CELLS_OF_ONE)
        assert found["points"] == points and found["runs_left"] > 0


def test_least_share_at_a_point_lost() -> None:
    cells = {CELL: 3, ("net", "25%"): 3}
    records = complete(ours=97.9, tp=97.8) + complete("25%", ours=97.0, tp=96.9)
    found = summary_of(records, cells)
    assert found["least_share_ratio_worst"] == found["least_share_ratio_median"] == 0.5
    hopeless = complete(ours=90.0, tp=97.8) + complete("25%", ours=80.0, tp=97.1, share=0.24)
    assert summary_of(hopeless, cells)["least_share_ratio_worst"] == pytest.approx(1 / 0.24, abs=1e-4)
    rest = [r for r in records if (r.run.budget, r.run.arm) != ("25%", "thin")]
    assert summary_of(rest, cells)["least_share_ratio_worst"] is None  # one budget is not several
    lost = complete(ours=97.9, tp=97.8) + complete("25%", ours=96.9, tp=97.0)
    assert summary_of(lost, cells)["least_share_ratio_worst"] == 2.0


def test_least_share_counts_the_budgets_at_which_all_are_through() -> None:
    cells = {CELL: 3, ("net", "25%"): 3, ("net", "15%"): 3, ("other", "50%"): 3}
    records = complete(ours=97.9, tp=97.8) + complete("25%", ours=96.0, tp=97.0) + complete("15%", ours=97.9, thin=9.0)
    found = summary_of(records, cells)
    assert found["least_share_jobs"] == {"net": {"budgets": ["50%", "25%", "15%"], "ours": 0.15, "best other": 0.25}}
    rest = [r for r in records if (r.run.budget, r.run.arm, r.run.seed) != ("15%", "thin", 0)]
    found = summary_of(rest, cells)
    assert found["least_share_jobs"] == {"net": {"budgets": ["50%", "25%"], "ours": 0.5, "best other": 0.25}}
    assert found["least_share_ratio_median"] == 2.0


def test_the_best_other_has_all_seeds_before_it_is_the_best() -> None:
    records = [record(arm, 90.0) for arm in HERE] + [record("ours", 90.0, seed) for seed in SEEDS[1:]]
    records = [record("thin", 92.0) if r.run.arm == "thin" else r for r in records]
    assert [(r.arm, r.seed) for r in outstanding(records, CELLS_OF_ONE)] == [("thin", 1), ("thin", 2)]
    records += [record("thin", 80.0, seed) for seed in SEEDS[1:]]
    assert [(r.arm, r.seed) for r in outstanding(records, CELLS_OF_ONE)] == [(OTHERS[0], 1), (OTHERS[0], 2)]
    records += [record(OTHERS[0], 90.0, seed) for seed in SEEDS[1:]]
    assert not outstanding(records, CELLS_OF_ONE)


def test_first_seeds_come_first_and_other_epochs_are_other_runs() -> None:
    tried = [record(arm, 97.0, epochs=1) for arm in HERE]
    left = outstanding(tried, {CELL: 3, ("net", "25%"): 3})
    assert [run.seed for run in left] == [0] * (len(HERE) + len(ARMS)) + [1, 2] * 2
    assert [run.budget for run in left if run.arm == "progressive"] == ["25%"]
    assert not figures(tried, CELLS_OF_ONE)


def test_finished_runs_are_not_done_again(tmp_path: Path) -> None:
    store, done = Store(tmp_path), []

    def perform(run: Run) -> Record:
        done.append(run)
        if len(done) == 4:
            raise KeyboardInterrupt
        return record(run.arm, None if run.arm == "gates" else 90.0 + len(done), run.seed)

    with pytest.raises(KeyboardInterrupt):
        work(store, CELLS_OF_ONE, perform, say=lambda text: None)
    assert len(store.load()) == 3
    assert work(store, CELLS_OF_ONE, perform, say=lambda text: None) == []
    assert len(done) == len(set(done)) + 1 == len(HERE) + 2 * 2 + 1  # only the killed one twice
    assert not outstanding(store.load(), CELLS_OF_ONE)
    assert work(store, CELLS_OF_ONE, perform, say=lambda text: None) == []
    assert len(store.load()) == len(done) - 1


def test_a_run_that_breaks_does_not_stop_the_others(tmp_path: Path) -> None:
    said: list[str] = []

    def perform(run: Run) -> Record:
        if run.arm == "thin":
            raise RuntimeError("out of luck")
        return record(run.arm, 95.0, run.seed)

    broken = work(Store(tmp_path), CELLS_OF_ONE, perform, lambda run: run.seed == 0, said.append)
    assert [run.arm for run in broken] == ["thin"]
    assert "out of luck" in "".join(said)
    assert {r.run.arm for r in Store(tmp_path).load()} == set(HERE) - {"thin"}


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    for one in (replace(record("thin", 97.25), log={"best": ["a", 0.01, "labels"]}), record("gates", None)):
        Store(tmp_path).save(one)
        assert one in Store(tmp_path).load()
        data = json.loads((tmp_path / f"{one.run.name}.json").read_text())
        assert data["met"] is (one.accuracy is not None)
    (tmp_path / "net.json").write_text('{"job": 1}')
    with pytest.raises(SluiceError, match=r"net\.json.* delete it"):
        Store(tmp_path).load()


def test_the_result_is_shown_with_json_in_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = ("ds-cnn", "25%")
    records = _in_cell(complete("25%", ours=90.0, tp=97.0, gates=95.5), cell)
    result, plot = tmp_path / "r.json", tmp_path / "p.svg"
    write_result([*records, record("ours", 12.0, epochs=1)], CELLS, result, plot)
    assert read_result(result) == records
    assert main(["--show", "--result", str(result)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = json.loads(lines[-1])
    assert (shown["points"], shown["ours_minus_best_other_min_25"]) == (1, -7.0)
    assert shown == json.loads(result.read_text())["summary"]
    assert any("ours " in line and "90.00%" in line and "-8.00" in line for line in lines)
    assert any("thin" in line and "cannot reach" in line for line in lines)
    texts = [element.text for element in ET.parse(plot).iter() if element.tag.endswith("text")]
    assert "◂ -8.00" in texts and texts.count("cannot reach") == len(ARMS) - 3


def _in_cell(records: Sequence[Record], cell: tuple[str, str]) -> list[Record]:
    return [replace(r, run=Run(*cell, r.run.arm, r.run.seed, CELLS[cell])) for r in records]


def test_wrong_words_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job", "resnet21", "--dry-run"]) == 1
    assert "there is no 'resnet21'" in capsys.readouterr().err
    assert main(["--show", "--result", str(tmp_path / "none.json")]) == 1
    assert "run the benchmark" in capsys.readouterr().err


def test_a_dry_run_lists_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--folder", str(tmp_path), "--job", "crepe-tiny", "--arm", "thin", "--budget", "15%"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["crepe-tiny-15-thin-s0-e7"] and lines[-1].startswith("1 runs")
    assert not list(tmp_path.rglob("*.json"))


def test_the_table_says_what_is_over_budget_and_how_many_seeds_there_are() -> None:
    text = table([record("thin", 97.0), record("thin", 96.0, 1, share=0.53), record("ours", None)], CELLS_OF_ONE)
    thin = next(line for line in text.splitlines() if line.strip().startswith("thin"))
    assert thin.split() == ["thin", "96.50%", "-1.50", "51.5%", "77", "2", "over", "budget"]


def test_points_beyond_the_axis_stay_in_the_picture() -> None:
    root = ET.fromstring(dot_plot("a < b", {"one": {"thin": -44.0, "ours": 0.3, "gates": None}}, ARMS))
    width = float(root.attrib["width"])
    circles = [float(e.attrib["cx"]) for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 and all(0 < cx < width for cx in circles)
