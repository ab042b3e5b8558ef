"""Round trip, atomic save, and the figures a reader looks for."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sluice.errors import SluiceError
from sluice.report import GroupRow, PieceRow, Report

number = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 10**12)
extents = st.lists(st.integers(1, 4096), max_size=3).map(tuple)
reports = st.builds(
    Report,
    budget_ms=number,
    dense_ms=number,
    promised_ms=number,
    measured_ms=st.none() | number,
    parity_max_rel=st.none() | number,
    params_dense=count,
    params_slim=count,
    macs_dense=count,
    macs_slim=count,
    metric_dense=st.none() | number,
    metric_slim=st.none() | number,
    seconds=number,
    rounds=count,
    fingerprint=st.dictionaries(st.text(), st.text() | st.integers() | number, max_size=3),
    pieces=st.lists(st.builds(PieceRow, st.text(), st.text(), count, number, number, extents, extents), max_size=3).map(
        tuple
    ),
    groups=st.lists(st.builds(GroupRow, st.text(), count, count), max_size=3).map(tuple),
    skipped=st.lists(st.tuples(st.text(), st.text()), max_size=3).map(tuple),
    error=st.dictionaries(st.text(), number, max_size=3),
)


@pytest.fixture
def report() -> Report:
    return Report(
        budget_ms=2.5,
        dense_ms=4.96,
        promised_ms=2.437,
        measured_ms=2.461,
        parity_max_rel=3.2e-7,
        params_dense=11173962,
        params_slim=3391234,
        macs_dense=555422720,
        macs_slim=201334455,
        metric_dense=0.9512,
        metric_slim=0.9467,
        seconds=12.34,
        rounds=2,
        fingerprint={"device": "cpu"},
        pieces=(
            PieceRow("layer1.conv", "Conv 3x3", 1, 0.50, 0.41, (64, 64), (64, 48)),
            PieceRow("[layer4.conv]", "Conv 3x3", 3, 0.90, 0.30, (512, 511), (512, 160)),
        ),
        groups=(GroupRow("layer1", 64, 48), GroupRow("stem", 64, 64)),
        skipped=(("fc", "the model's output is never cut"),),
        error={"p95": 0.052},
    )


def text_of(report: Report) -> str:
    console = Console(file=io.StringIO(), width=140)
    report.render(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(reports)
def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_save_and_load(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    report.save(path)
    assert Report.from_json(path.read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_failed_save_leaves_the_old_file(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(report, seconds=math.nan).save(path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(SluiceError, match="disk full"):
            replace(report, rounds=7).save(path)
    assert Report.from_json(path.read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_table_has_the_figures_in_order(report: Report) -> None:
    text = text_of(report)
    for figure in ("4.960", "2.437", "2.461", "49.1%", "11,173,962", "30.3%", "201,334,455", "0.9467", "-0.0045"):
        assert figure in text
    assert "budget 2.500 ms met as measured" in text
    assert "parity 3.2e-07" in text
    assert "512x511 -> 512x160" in text
    assert "1.800" in text
    assert "1 of 2 groups cut, 112 of 128 channels kept" in text
    marks = ["parameters", "[layer4.conv]", "layer1.conv", "fc: the model's output is never cut"]
    assert [text.index(m) for m in marks] == sorted(text.index(m) for m in marks)


def test_missing_figures_and_missed_budgets_are_said(report: Report) -> None:
    missed = replace(report, measured_ms=2.6)
    assert not missed.met()
    assert "MISSED as measured" in text_of(missed)
    bare = replace(report, measured_ms=None, parity_max_rel=None, metric_dense=None, metric_slim=None, pieces=())
    assert bare.met()
    text = text_of(bare)
    assert "met as promised" in text
    assert "metric" not in text


def test_other_files_are_refused(report: Report) -> None:
    data = json.loads(report.to_json())
    with pytest.raises(SluiceError, match="no report"):
        Report.from_json("{")
    with pytest.raises(SluiceError, match="version 2"):
        Report.from_json(json.dumps({**data, "version": 2}))
    with pytest.raises(SluiceError, match=r"lacks or adds \['rounds'\]"):
        Report.from_json(json.dumps({k: v for k, v in data.items() if k != "rounds"}))


def test_torch_is_not_imported() -> None:
    code = "import sys, sluice.report; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
