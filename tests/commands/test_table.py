"""``sluice table`` and ``sluice profile --pack``, on hand-made tables and a network of two convolutions."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.cli import main
from sluice.core.deployment import Deployment
from sluice.profiler.job import Job, read_job
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.timing.reference_engine import KEY as ANCHOR
from tests import tiny
from tests.tiny import dense_onnx_in, words

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = Fingerprint("Some CPU", "ort-cpu", "1.2.3", 1, "fp32", 8, "thread_cpu")


def made(path: Path, points: Mapping[tuple[str, tuple[int, ...]], float], origin: Fingerprint = ORIGIN) -> Path:
    with LatencyTable.create(path, origin) as table:
        table.put(ANCHOR, (), Measurement(0.25, 0.01, 1000, origin.clock))
        table.put_many((key, at, Measurement(ms, 0.02, 40, origin.clock)) for (key, at), ms in points.items())
        table.describe("p", 'Conv 3x3, "odd" 16x28x28')
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    path = made(tmp_path / "a.db", {("p", (3, 5)): 1.0, ("p", (7, 5)): 2.0, ("q", ()): 3.0, ("j1", (4,)): -0.5})
    with LatencyTable.open(path) as table:
        table.put_engine("net", {"g": 5}, Measurement(7.5, 0.01, 40, "thread_cpu"))
        table.put_engine("net", {"g": 3}, Measurement(5.5, 0.01, 40, "thread_cpu"))
        table.put_calibration("net", 0.9, 0.125, {"median_abs_err": 0.0165, "n": 2.0})
        table.put_blob("cache", bytes(1234))
    return path


@pytest.fixture
def b(tmp_path: Path) -> Path:
    other = replace(ORIGIN, device="Other CPU")
    points = {("p", (3, 5)): 1.5, ("p", (7, 5)): 6.0, ("p", (9, 5)): 8.0, ("q", ()): 1.5, ("j1", (4,)): 0.5}
    return made(tmp_path / "b.db", points, other)


def run(capsys: pytest.CaptureFixture[str], *parts: object, status: int = 0) -> str:
    assert main(words(*parts)) == status
    out, err = capsys.readouterr()
    assert (err == "") is (status == 0)
    return out or err


def test_forget_drops_what_is_uncertain_and_nothing_else(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LatencyTable.open(a) as table:
        table.put(ANCHOR, (), Measurement(0.25, 0.3, 1000, "thread_cpu"))
        table.put("p", (7, 5), Measurement(2.0, 0.13, 40, "thread_cpu"))
        table.put("j1", (4,), Measurement(-0.5, 0.4, 40, "thread_cpu"))
        table.put_engine("net", {"g": 3}, Measurement(5.5, 0.2, 40, "thread_cpu"))
    assert "2 points and 1 engines" in run(capsys, "table", "forget", a)
    with LatencyTable.open(a) as table:
        assert list(table.points("p")) == [(3, 5)] and list(table.points("q")) == [()] and not table.points("j1")
        assert table.get(ANCHOR, ()) is not None
        assert [widths for widths, _ in table.engines("net")] == [{"g": 5}]
    assert json.loads(run(capsys, "table", "forget", a, "--json")) == {"points": 0, "engines": 0}
    assert "No such file" in run(capsys, "table", "forget", a.with_name("none.db"), status=1)


def test_show(capsys: pytest.CaptureFixture[str], a: Path) -> None:
    text = run(capsys, "table show", a)
    for line in (
        "device: Some CPU",
        "runtime version: 1.2.3",
        "reference engine: 0.25 ms",
        "5 points of 4 pieces and joints",
        '  Conv 3x3, "odd" 16x28x28: 2 at 3..7 x 5..5, 1..2 ms',
        "  q: 1, 3..3 ms",
        "network net: 2 engines, 5.5..7.5 ms",
        "  calibration: slope 0.9, intercept 0.125 ms; median_abs_err 0.0165, n 2",
        "blob cache: 1,234 bytes",
    ):
        assert f"{line}\n" in text
    data = json.loads(run(capsys, "table show --json", a))
    assert data["fingerprint"]["batch"] == 8 and data["reference_ms"] == 0.25 and data["blobs"] == {"cache": 1234}
    assert {p["key"]: (p["points"], p["ms"]) for p in data["pieces"]}["p"] == (2, [1.0, 2.0])
    (network,) = data["networks"]
    assert network["calibration"]["slope"] == 0.9 and network["engines"] == 2


def test_diff_compares_devices(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> None:
    data = json.loads(run(capsys, "table diff --json", a, b))
    assert data["differences"] == ["device is 'Other CPU', not 'Some CPU'"]
    pieces = {p["key"]: p for p in data["pieces"]}
    assert list(pieces)[:3] == ["p", "q", "j1"]  # by effect: 4.5, 1.5 and 1 ms
    assert pieces["p"]["ratio"] == pytest.approx([2.25, 1.5, 3.0])
    assert (pieces["p"]["common"], pieces["p"]["only_a"], pieces["p"]["only_b"]) == (2, 0, 1)
    assert pieces["p"]["effect_ms"] == pytest.approx(4.5) and pieces["j1"]["ratio"] is None
    text = run(capsys, "table diff", a, b)
    assert "in b the device is 'Other CPU', not 'Some CPU'\n" in text
    assert '  2.250 (1.500..3.000), 2; 0, 1: Conv 3x3, "odd" 16x28x28\n' in text
    assert "measured under equal conditions" in run(capsys, "table diff", a, a)


def test_csv(capsys: pytest.CaptureFixture[str], a: Path, tmp_path: Path) -> None:
    text = run(capsys, "table csv", a)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 5
    (row,) = [r for r in rows if r["extents"] == "7x5"]
    assert row == {
        "key": "p", "description": 'Conv 3x3, "odd" 16x28x28', "extents": "7x5", "ms": "2.0", "spread": "0.02",
        "samples": "40",
    }  # fmt: skip
    assert run(capsys, "table csv", a, "-o", tmp_path / "a.csv") == ""
    assert (tmp_path / "a.csv").read_text() == text


@pytest.mark.parametrize("verb", ["csv", "show"])
def test_a_reader_that_has_enough(a: Path, verb: str) -> None:
    """As in ``sluice table csv t.db | head -1``: the other end of the pipe is closed."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "sluice", "table", verb, str(a)], stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT,
            timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_merge(capsys: pytest.CaptureFixture[str], a: Path, b: Path, tmp_path: Path) -> None:
    more = made(tmp_path / "more.db", {("r", (2,)): 1.0})
    data = json.loads(run(capsys, "table merge", a, more, "--json -o", tmp_path / "all.db"))
    assert (data["points"], data["engines"]) == (6, 2)
    with LatencyTable.open(tmp_path / "all.db") as table:
        assert len(table) == 6 and table.blobs() == {"cache": 1234}
    text = run(capsys, "table merge", a, b, "-o", tmp_path / "none.db", status=1)
    assert "do not belong together: in" in text and "the device is 'Other CPU', not 'Some CPU'" in text
    assert text.count("\n") == 1 and not (tmp_path / "none.db").exists()
    assert "5 points, 2 engines\n" in run(capsys, "table merge", a, "-o", tmp_path / "copy.db")


def test_no_table_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "no.db").write_text("ms = 1\n" * 50)
    for verb in ("show", "csv"):
        assert "is not a latency table" in run(capsys, "table", verb, tmp_path / "no.db", status=1)
    with pytest.raises(SystemExit) as usage:
        main(["table"])
    assert usage.value.code == 2


def test_pack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = tmp_path / "job.zip"
    dense = dense_onnx_in(tmp_path)
    asked = f"--batch {tiny.BATCH} --methods filter,rank --exclude fc --precision fp16 --threads 1 --quiet"
    text = run(capsys, "profile --pack", dense, "-o", job, asked)
    assert text.endswith("on the device: python job.zip -o TABLE.db\n")
    settings, model, table = read_job(job)
    assert settings == Job(Deployment("ort-cpu", tiny.BATCH, 1, "fp16"), ("filter", "rank"), ("fc",)) and table is None
    assert {init.name for init in model.graph.initializer} >= {"conv1.weight", "fc.bias"}
    # From the factory, with a table of the same conditions.
    known = made(tmp_path / "known.db", {}, replace(ORIGIN, batch=tiny.BATCH))
    more = f"--shape 3,9,9 --batch {tiny.BATCH} --quiet --json"
    data = json.loads(run(capsys, "profile --pack tests.tiny:model -o", job, "--table", known, more))
    assert data == {"out": str(job), "bytes": job.stat().st_size}
    assert read_job(job)[2] == known.read_bytes()
    before = job.read_bytes()
    for wrong, message in (
        ("--table {known} --batch 1", "does not fit the job: batch is 3, not 1"),
        ("--precision fp8", "no precision 'fp8'"),
        ("--target abacus", "no target 'abacus'"),
        ("--target ort-cpu --precision bf16", "ort-cpu cannot be timed in bf16"),
        ("--methods magic", "methods"),
    ):
        assert message in run(capsys, "profile --pack", dense, "-o", job, wrong.format(known=known), status=1)
    for usage, message in (
        (("profile --pack", dense), "--pack writes one job"),
        (("profile --pack", dense, "--shard 1/2 -o", job), "--pack writes one job"),
        (("profile", dense), "give --table TABLE.db, or --pack"),
        (("profile", dense, "--table t.db -o", job), "give --table TABLE.db, or --pack"),
    ):
        with pytest.raises(SystemExit) as wrong:
            main(words(*usage))
        assert wrong.value.code == 2 and message in capsys.readouterr().err
    assert job.read_bytes() == before


def test_nothing_is_written_over_what_it_is_made_from(
    a: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dense = dense_onnx_in(tmp_path)
    before = a.read_bytes(), Path(dense).read_bytes()
    assert "is the latency table itself" in run(capsys, "table csv", a, "-o", a, status=1)
    assert "No such file" in run(capsys, "table csv", tmp_path / "missing.db", "-o", a, status=1)
    for taken in (a, dense):
        pack = words("profile --pack", dense, f"--batch {tiny.BATCH} --methods filter -o", taken)
        assert main(pack) == 1 and "not a zip file, as jobs are; choose another file" in capsys.readouterr().err
    assert (a.read_bytes(), Path(dense).read_bytes()) == before


@pytest.mark.parametrize("pack", ["", "--pack -o job.zip"])
def test_an_empty_shard_is_wrong_usage(pack: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As ``--shard "$SHARD"`` gives it on a host where that is not set, which then measured the whole."""
    with pytest.raises(SystemExit) as wrong:
        main(["profile", str(dense_onnx_in(tmp_path)), "--table", str(tmp_path / "t.db"), "--shard", "", *pack.split()])
    assert wrong.value.code == 2 and "is no shard" in capsys.readouterr().err and not (tmp_path / "t.db").exists()


def test_profile_of_a_shard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dense = dense_onnx_in(tmp_path)
    asked = f"--batch {tiny.BATCH} --quiet --methods filter --table"
    with tiny.simulated_device():
        found = json.loads(run(capsys, "profile --json", dense, "--shard 2/2", asked, tmp_path / "t.db"))
        assert found["shard"] == "2/2" and found["points"] > 0 and not found["complete"]
        with pytest.raises(SystemExit) as wrong:
            main(words("profile", dense, "--shard 3/2", asked, tmp_path / "t.db"))
        assert wrong.value.code == 2 and "no shard 3/2" in capsys.readouterr().err
        text = run(capsys, "profile", dense, asked, tmp_path / "t.db")
    assert text.startswith("dense ") and "least reachable" in text and "without scipy" not in text
