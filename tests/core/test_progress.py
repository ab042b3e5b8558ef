from __future__ import annotations

import threading

import pytest

from sluice.core.progress import stage


def test_a_stage_names_itself_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with stage("export", True):
        assert threading.active_count() > before
    assert "export 00:00" in capsys.readouterr().err
    assert not [t for t in threading.enumerate() if t.name.endswith("(tick)")]


def test_a_hidden_stage_says_nothing_and_errors_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), stage("export", False) as advance:
        advance(1, 2)
        raise KeyError("mine")
    assert capsys.readouterr().err == ""


def test_a_stage_that_knows_how_far_it_is_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("price", True) as advance:
        for done in (1, 2, 3):
            advance(done, 4)
    shown = capsys.readouterr().err
    assert [f"{share}%" in shown and f" {done}/4 [" in shown for done, share in ((1, 25), (2, 50), (3, 75))] == [
        True
    ] * 3
    assert "100%" not in shown and "4/4" not in shown
