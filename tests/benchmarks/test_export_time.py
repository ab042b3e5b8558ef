"""What is told of the operators of several files."""

from __future__ import annotations

import json

import pytest

from benchmarks import export_time


def test_operators_whose_numbers_differ() -> None:
    kinds = {
        "ours": {"Conv": 6, "Pad": 3},
        "plain": {"Conv": 6, "Identity": 2},
        "older": {"Conv": 6, "Constant": 9, "Pad": 6, "Cast": 6},
    }
    assert export_time.differing(kinds) == "ours/plain/older: Cast 0/0/6, Pad 3/0/6"
    assert export_time.differing({"ours": {"Conv": 6}, "plain": {"Conv": 6, "Constant": 1}}) == "the same operators"


def test_the_committed_result_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["export_time", "--show"])
    assert export_time.main() == 0
    lines = capsys.readouterr().out.splitlines()
    total = json.loads(lines[-1])
    assert len(lines) == 2 * len(export_time.NETWORKS) + 1
    assert 0.0 < total["median"] <= total["worst"]
