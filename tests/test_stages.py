from __future__ import annotations

import threading

import pytest

from sluice.stages import stage


def test_a_stage_names_itself_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with stage("export", True):
        assert threading.active_count() > before
    assert "export 00:00" in capsys.readouterr().err
    assert not [t for t in threading.enumerate() if t.name.endswith("(tick)")]


def test_a_hidden_stage_says_nothing_and_errors_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), stage("export", False):
        raise KeyError("mine")
    assert capsys.readouterr().err == ""
