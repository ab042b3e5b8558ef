"""The benchmark of promises: what is kept, what the figures say, and one network on a simulated device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from benchmarks import fidelity, fidelity_results, fidelity_runs
from benchmarks.fidelity import main, work
from benchmarks.fidelity_results import (
    BATCHES,
    STANDARD,
    Outcome,
    Record,
    Run,
    Store,
    detail,
    product,
    read_result,
    summary,
    table,
    write_result,
)
from benchmarks.fidelity_runs import NETWORKS, Network
from sluice import models
from sluice.core.errors import SluiceError
from sluice.solver.options import METHODS
from tests import tiny
from tests.device import FakeRunner, profile_on, staircase

ONE, TWO, OTHER = product(["resnet20"]) + product(["crepe_tiny"], [2])


def record(run: Run, *ratios: float) -> Record:
    """Plans that take 2, 3, 4 .. ms, and promise ``ratios`` of that."""
    found = [Outcome(ratio * ms, float(ms), ms, 0, 1) for ms, ratio in enumerate(ratios, 2)]
    return Record(run, "a device", "1.2", 7.5, 90, 3000, 4, tuple(found))


def test_the_standard_runs_are_every_network_on_one_and_on_two_threads() -> None:
    runs = STANDARD
    assert len(runs) == len(set(runs)) == 16 and set(BATCHES) == set(NETWORKS)
    assert {run.threads for run in runs} == {1, 2}
    assert all(run.plans == 40 and run.methods == METHODS for run in runs)
    assert {run.network for run in runs if run.batch == 1} == {"resnet50"}
    assert {run.batch for run in runs} == {1, 8}
    assert len({run.name for run in runs}) == len({run.table for run in runs}) == 16
    assert NETWORKS["resnet50"].shape == (3, 224, 224)
    assert all(NETWORKS[name].shape == models.EXAMPLE_SHAPES[name] for name in set(BATCHES) - {"crepe_tiny"})


def test_what_is_asked_for_twice_is_done_once_and_methods_have_no_order() -> None:
    found = product(["vgg16_bn", "vgg16_bn"], [2, 1, 2], ["merge", "filter", "merge"], batch=3)
    assert [(run.threads, run.batch, run.methods) for run in found] == [(n, 3, ("filter", "merge")) for n in (2, 1)]


def test_totals_pool_all_plans_and_take_the_worst_rank_correlation() -> None:
    found = summary([record(ONE, 1.01, 0.98, 1.02), record(TWO, 1.0, 1.1, 0.6)], [ONE, TWO, OTHER])
    assert (found["n"], found["runs_left"]) == (6, 1)
    assert found["median_abs_err"] == pytest.approx(0.02)  # of 0, 0.01, 0.02, 0.02, 0.1, 0.4
    assert found["p95_abs_err"] == pytest.approx(0.1 + 0.75 * 0.3)
    assert found["spearman"] == pytest.approx(0.5)  # 2.0, 3.3 and 2.4 ms promised, 2, 3 and 4 taken
    one, two = (found["per_network"]["resnet20"][threads] for threads in ("1", "2"))
    assert (one["spearman"], two["spearman"]) == pytest.approx((1.0, 0.5)) and one["profile_seconds"] == 7.5
    assert one["p95_abs_err"] == pytest.approx(0.02) and two["median_abs_err"] == pytest.approx(0.1)
    assert found["machines"] == ["a device, runtime 1.2"]


def test_no_total_where_a_run_has_no_rank_correlation_or_none_is_finished() -> None:
    found = summary([record(ONE, 1.01, 0.98), record(TWO, 1.1)], [ONE, TWO])
    assert found["spearman"] is None and found["median_abs_err"] is not None
    found = summary([record(OTHER, 1.0)], [ONE])
    assert found["median_abs_err"] is found["p95_abs_err"] is found["spearman"] is None
    assert (found["n"], found["runs_left"], found["per_network"]) == (0, 1, {})
    assert table([record(OTHER, 1.0)], [ONE]).count("\n") == 0


def test_the_worst_plans_say_what_was_edited() -> None:
    lines = detail(record(ONE, 1.0, 0.9, 1.05, 1.3, 0.99)).splitlines()
    assert lines[0].split() == ["promised/measured", "1.000", "0.900", "1.050", "1.300", "0.990"]
    assert [line.split()[1] for line in lines[1:]] == ["1.300", "0.900", "1.050"]
    assert lines[1].endswith("1.300 (6.500 of 5.000 ms): 5 ranks, 0 drops, 1 merges")


def test_finished_runs_are_not_done_again(tmp_path: Path) -> None:
    done: list[Run] = []
    said: list[str] = []

    def perform(run: Run) -> Record:
        done.append(run)
        if done == [ONE, TWO]:
            raise KeyboardInterrupt
        return record(run, 1.0, 0.9)

    store, runs = Store(tmp_path), [ONE, TWO, OTHER]
    with pytest.raises(KeyboardInterrupt):
        work(store, runs, perform, said.append)
    assert [store.get(run) is None for run in runs] == [False, True, True]
    assert work(store, runs, perform, said.append) == []
    assert done == [ONE, TWO, TWO, OTHER]
    # Other settings are other runs.
    for run in (replace(ONE, batch=1), replace(ONE, plans=3), replace(ONE, seed=1), replace(ONE, methods=("rank",))):
        assert store.get(run) is None
    assert f"{ONE.name} (1 of 3, kept)" in said and sum("promised/measured 1.000 0.900" in text for text in said) == 4


@pytest.mark.parametrize(
    ("failure", "told"),
    [(SluiceError("nothing can be cut; take another"), "error: nothing can"), (ZeroDivisionError("no"), "Traceback")],
)
def test_a_network_that_breaks_does_not_stop_the_others(failure: Exception, told: str, tmp_path: Path) -> None:
    said: list[str] = []

    def perform(run: Run) -> Record:
        if run == ONE:
            raise failure
        return record(run, 1.0)

    assert work(Store(tmp_path), [ONE, TWO], perform, said.append) == [ONE]
    assert told in "".join(said) and str(failure) in "".join(said)
    assert Store(tmp_path).get(ONE) is None and Store(tmp_path).get(TWO) == record(TWO, 1.0)


def test_records_come_back_as_they_were_or_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(record(ONE, 1.0, 1 / 3))
    assert store.get(ONE) == record(ONE, 1.0, 1 / 3)
    path = tmp_path / f"{ONE.name}.json"
    path.rename(tmp_path / f"{TWO.name}.json")
    with pytest.raises(SluiceError, match=r"is the record of another run, resnet20-b8-t1-"):
        store.get(TWO)
    for content in ('{"run": 1}', "[]", "{"):
        path.write_text(content)
        with pytest.raises(SluiceError, match=r"resnet20-b8-t1-.*\.json' is no record of a run .* delete it"):
            store.get(ONE)


def test_a_result_comes_back_and_is_shown_with_json_in_its_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, records = tmp_path / "r.json", [record(ONE, 1.01, 0.98), record(OTHER, 1.04, 0.99)]
    write_result([*records, record(replace(ONE, plans=2), 0.1)], STANDARD, path)
    assert read_result(path) == records
    assert main(["--show", "--result", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = json.loads(lines[-1])
    assert shown == json.loads(path.read_text())["summary"] and shown["runs_left"] == 14 and shown["n"] == 4
    assert lines[1].split() == ["resnet20", "8", "1", "2", "1.50%", "1.95%", "2.00%", "1.0000"]
    assert lines[2].split()[:4] == ["crepe_tiny", "8", "2", "2"] and len(lines) == 4


def test_what_cannot_be_shown_or_published_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    older = {"median_abs_err": 0.01, "n": 2.0, "per_network": {"resnet20": {"n": 2.0}}}
    for content, reason in (
        (None, "cannot read the result"),
        ("[1]", "cannot read the result"),
        (json.dumps(older), "is an older one, of totals without plans; run the benchmark"),
    ):
        if content is not None:
            path.write_text(content)
        assert main(["--show", "--result", str(path)]) == 1
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert reason in printed.err and "run the benchmark" in printed.err
    assert main(["--publish", "--result", str(path), "--tables", str(tmp_path)]) == 1
    assert "no run of the result is finished" in capsys.readouterr().err
    assert json.loads(path.read_text()) == older
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{OTHER.name}.json").write_text("{")
    assert main(["--tables", str(tmp_path), "--networks", "resnet20", "--result", str(path)]) == 1  # before any work
    assert f"{OTHER.name}.json' is no record of a run" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize("wrong", [["--networks", "resnet21"], ["--threads", "0"], ["--plans", "-1"], ["--plans", "x"]])
def test_wrong_words_are_wrong_usage(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    return Network(tiny.residual, (3, 9, 9)).export()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, exported: onnx.ModelProto) -> FakeRunner:
    """A device that computes channels in blocks of four, and one network to try on it."""
    runner = FakeRunner(staircase(4))
    profile_on(lambda target, threads=1: runner, monkeypatch)
    monkeypatch.setattr(fidelity_results, "BATCHES", {"net": 2})
    monkeypatch.setattr(fidelity, "BATCHES", {"net": 2})
    monkeypatch.setattr(fidelity_runs, "NETWORKS", {"net": Network(tiny.residual, (3, 9, 9))})
    monkeypatch.setattr(Network, "export", lambda self: exported)  # once, not for every call
    return runner


def called(tmp_path: Path, *arguments: str) -> int:
    places = ("--tables", tmp_path / "tables", "--result", tmp_path / "result.json")
    return main(["--networks", "net", "--plans", "9", *map(str, places), *arguments])


def test_promises_hold_where_times_add_up(
    simulated: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--threads", "1", "--plans", "12")  # of which one drops a block
    assert called(tmp_path, *asked) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert (found["n"], found["runs_left"]) == (12, 0) and found["p95_abs_err"] < 1e-6
    assert found["spearman"] == found["per_network"]["net"]["1"]["spearman"] > 1 - 1e-9
    assert printed.err.count("  worst: ") == 3
    run = product(["net"], [1], plans=12)[0]
    kept = Store(tmp_path / "tables" / "runs").get(run)
    assert kept is not None and kept.device == simulated.device and (tmp_path / "tables" / run.table).is_file()
    # Every kind of edit is among the plans, and they differ.
    assert all(any(getattr(outcome, kind) for outcome in kept.outcomes) for kind in ("ranks", "drops", "merges"))
    assert len({outcome.measured_ms for outcome in kept.outcomes}) > 5
    assert not (tmp_path / "result.json").exists()  # not the standard settings

    engines = simulated.built
    assert called(tmp_path, *asked) == 0
    assert simulated.built == engines
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert called(tmp_path, *asked, "--seed", "2") == 0
    assert 12 < simulated.built - engines < engines  # what the plans use, and nothing of the profile again
    others = Store(tmp_path / "tables" / "runs").get(replace(run, seed=2))
    assert others is not None and {o.measured_ms for o in others.outcomes} != {o.measured_ms for o in kept.outcomes}


def test_a_wrong_promise_shows(simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole engines of random plans that take a quarter longer than their pieces: the figures must say so."""
    measured = fidelity_runs.measure_engines
    monkeypatch.setattr(
        fidelity_runs, "measure_engines", lambda *given, **more: [1.25 * ms for ms in measured(*given, **more)]
    )
    assert called(tmp_path, "--threads", "1", "--methods", "filter") == 0
    (path,) = (tmp_path / "tables" / "runs").iterdir()
    found = Record.from_dict(json.loads(path.read_text()))
    assert found.figures["median_abs_err"] == pytest.approx(0.2, abs=1e-3)
    assert all(outcome.ranks == outcome.drops == outcome.merges == 0 for outcome in found.outcomes)


def test_the_standard_runs_are_published_when_none_is_left(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    standard = product(["net"], methods=["filter"], plans=9)
    monkeypatch.setattr(fidelity, "STANDARD", standard)
    result = tmp_path / "result.json"
    assert called(tmp_path, "--methods", "filter", "--threads", "1") == 0
    assert not result.exists()
    assert called(tmp_path, "--publish") == 0
    assert json.loads(result.read_text())["summary"]["runs_left"] == 1
    assert called(tmp_path, "--methods", "filter", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [standard[1].name, "1 of 2 runs left"]
    assert called(tmp_path, "--methods", "filter") == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown == json.loads(result.read_text())["summary"] and shown["runs_left"] == 0
    assert set(shown["per_network"]["net"]) == {"1", "2"}
