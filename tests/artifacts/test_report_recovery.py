"""What a report says about the training of the slim network, and when it asks for more of it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from sluice.artifacts.report import Report
from sluice.artifacts.report_recovery import RecoveryRow, TrialRow
from sluice.artifacts.report_text import report_text
from sluice.core.errors import SluiceError
from sluice.core.schema import typed


def row(*figures: float | None, end: int = 640, **changes: object) -> RecoveryRow:
    """The chosen rate after 10, 20, 40 ... steps, and another rate after 10."""
    own = [TrialRow(0.01, "default loss", "plain", 10 * 2**k, value) for k, value in enumerate(figures)]
    other = TrialRow(0.03, "default loss", "plain", 10, None)
    made = RecoveryRow(0.01, "default loss", "plain", end, (other, *own), "labels", 3.0, 0.01)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    for made in (row(2.0, 1.0), RecoveryRow(0.003, "own loss", "dense", 7)):
        assert typed(RecoveryRow | None, json.loads(json.dumps(asdict(made)))) == made


def report(recovery: RecoveryRow | None) -> Report:
    return Report(
        budget_ms=2.5, dense_ms=5.0, promised_ms=2.4, measured_ms=2.45, parity_max_rel=None, params_dense=9,
        params_slim=4, macs_dense=9, macs_slim=4, metric_dense=None, metric_slim=None, seconds=1.5, rounds=1,
        recovery=recovery,
    )  # fmt: skip


def test_a_report_holds_it_and_older_ones_load() -> None:
    made = report(row(2.0, None, 1.0))
    assert Report.from_json(made.to_json()) == made
    older = {k: v for k, v in json.loads(report(None).to_json()).items() if k not in ("recovery", "least", "figure")}
    assert Report.from_json(json.dumps({**older, "version": 4})) == report(None)
    with pytest.raises(SluiceError, match=r"lacks or adds \['figure', 'least', 'recovery'\]"):
        Report.from_json(json.dumps(older))


def text_of(made: Report) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(report_text(made))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_report_tells_it() -> None:
    text = text_of(report(row(2.0, 1.5, 1.2)))
    assert "tried rate" in text and "\nfine-tuned at a learning rate of 0.01 on default loss" in text
    assert "more epochs may help\n" in text
    assert "tried rate" not in text_of(report(RecoveryRow(0.003, "own loss", "plain", 7)))
    assert "fine-tuned" not in text_of(report(None))
    assert "foresaw" not in text
    foreseen = RecoveryRow(0.003, "own loss", "plain", 7, foreseen=0.5, ended=0.25)
    assert "the rehearsal foresaw a loss of 0.5 at the end of the fine-tune, and it is 0.25," in text_of(
        report(foreseen)
    )


def test_the_fall_is_that_of_the_last_doubling() -> None:
    made = row(2.0, 1.5, 1.2)
    assert made.fall() == pytest.approx(0.2) and made.share() == pytest.approx(80 / 640)
    assert made.at_end() == pytest.approx(1.2 * 0.8**4)
    assert row(2.0).fall() is row(2.0).at_end() is row().fall() is None
    assert row(2.0, None, 1.0).fall() is None
    assert row(2.0, 1.0, end=0).at_end() is None and row(2.0, 1.0, end=0).share() == 0.0


def test_more_epochs_are_spoken_of_where_they_may_help() -> None:
    assert row(2.0, 1.5, 1.2).may_want_epochs()  # ends at 0.49
    assert not row(2.0, 0.5, 0.125).may_want_epochs()  # recovered: ends at 0.0005
    assert not row(2.0, 1.5, 1.2, end=640 * 10**4).may_want_epochs()
    assert not row(1.0, 0.99, 0.98).may_want_epochs()  # training hardly helps: the plan limits
    assert not row(2.0, 1.5, 1.2, dense=0.4).may_want_epochs()  # the dense network is not much better
    assert not row(2.0).may_want_epochs() and not row(1.0, 1.1).may_want_epochs()


def test_the_lines_say_what_was_measured() -> None:
    first, second = row(2.0, 1.5, 1.2).lines()
    assert first == (
        "fine-tuned at a learning rate of 0.01 on default loss, plain weights, as tried in 12% of the steps of the "
        "fine-tune"
    )
    assert second.startswith("held-out loss fell 20.0% when the steps of a trial doubled to 40 (fine-tune: 640); ")
    assert second.endswith(
        "ends at 0.492, the dense network has 0.01: training may limit the result more than the plan, and more epochs "
        "may help"
    )
    assert "epochs" not in " ".join(row(2.0, 0.5, 0.125).lines()) and len([*row(2.0).lines()]) == 1
    (alone,) = RecoveryRow(0.003, "own loss", "dense", 7).lines()
    assert alone == "fine-tuned at a learning rate of 0.003 on own loss, dense weights"


def test_the_table_has_a_row_for_every_setting() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(row(2.0, 1.5).table())
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["0.03", "default", "loss", "plain", "not", "finite"] in lines
    assert ["0.01", "default", "loss", "plain", "2", "1.5"] in lines and len(lines) == 3
