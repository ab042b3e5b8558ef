"""What a report says of a search for the least latency."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from sluice.artifacts.report import Report
from sluice.artifacts.report_least import CurveRow, LeastRow
from sluice.artifacts.report_text import report_text
from sluice.core.schema import typed

SHORT = CurveRow(0.5, 0.48, 0.49, 95.0, 98.2, 1.5)
FAILED = CurveRow(0.1, reason="no engine within 0.1 ms was found")
KEPT, FASTER, MISSED = (CurveRow(*figures, None, 7, True) for figures in (
    (0.5, 0.48, 0.49, 98.4), (0.45, 0.43, 0.44, 97.9), (0.4, 0.38, 0.39, 97.8)))  # fmt: skip


def curve(*tried: CurveRow) -> LeastRow:
    return LeastRow(1.0, 98.9, tried)


def report(least: LeastRow | None) -> Report:
    return Report(
        budget_ms=2.5, dense_ms=5.0, promised_ms=2.4, measured_ms=2.45, parity_max_rel=None, params_dense=9,
        params_slim=4, macs_dense=9, macs_slim=4, metric_dense=98.9, metric_slim=98.4, seconds=1.5, rounds=1,
        least=least,
    )  # fmt: skip


def text_of(made: Report) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(report_text(made))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_json_round_trip_and_older_reports() -> None:
    made = report(curve(SHORT, FAILED, KEPT))
    assert Report.from_json(made.to_json()) == made
    assert typed(LeastRow | None, json.loads(json.dumps(asdict(curve(SHORT))))) == curve(SHORT)
    older = {k: v for k, v in json.loads(report(None).to_json()).items() if k not in ("least", "figure")}
    assert Report.from_json(json.dumps({**older, "version": 5})) == report(None)


def test_the_drop_may_be_used_up() -> None:
    """In floating point 0.28 - 0.18 is more than 0.1."""
    assert 0.28 - 0.18 > 0.1 and LeastRow(0.1, 0.28).keeps(0.18) and not LeastRow(0.1, 0.28).keeps(0.1799)
    assert curve().keeps(97.9) and not curve().keeps(97.8999)
    assert curve().keeps(120.0) and not curve().keeps(None) and not curve().keeps(float("nan"))
    assert replace(curve(), drop=0.0).keeps(98.9)


def test_the_fastest_that_was_fine_tuned_and_keeps_the_figure_is_settled_on() -> None:
    assert curve(SHORT, KEPT, MISSED).settled() == KEPT and curve(FASTER, KEPT, MISSED).settled() == FASTER
    assert curve(SHORT, KEPT).met() and not curve(SHORT, MISSED).met()
    assert curve(MISSED, replace(MISSED, budget=0.7, metric=97.85)).settled() == replace(
        MISSED, budget=0.7, metric=97.85
    )
    assert curve(SHORT, FAILED, replace(FAILED, full=True)).settled() is None and not curve(SHORT).met()


def test_a_report_tells_the_curve() -> None:
    text = text_of(report(curve(SHORT, FAILED, KEPT, MISSED)))
    assert "49.0% of the dense latency at a metric of 98.4000, at most 1 below the dense 98.9000\n" in text
    assert "1.5 epochs in 2 short trainings, 14 epochs in 2 fine-tunes; trials and rehearsals come on top" in text
    assert "at 10.0%: no engine within 0.1 ms was found" in text
    rows = [line.split() for line in text.splitlines() if line.lstrip()[:3] in ("50.", "40.", "10.")]
    assert rows == [
        ["50.0%", "48.0%", "49.0%", "1.5", "95.0000", "3.9", "98.2000"],
        ["50.0%", "48.0%", "49.0%", "7", "98.4000", "0.5", "fine-tuned"],
        ["40.0%", "38.0%", "39.0%", "7", "97.8000", "1.1", "fine-tuned"],
        ["10.0%", "-", "-", "0", "-", "-", "-"],
    ]
    assert "short training" not in text_of(report(None))


@pytest.mark.parametrize(("metric", "told"), [(97.8, "97.8000"), (None, "-")])
def test_a_search_that_found_nothing_says_so(metric: float | None, told: str) -> None:
    text = text_of(report(curve(SHORT, replace(MISSED, metric=metric))))
    assert f"NO NETWORK FOUND that is at most 1 below the dense 98.9000: the nearest has {told} at 39.0%" in text
