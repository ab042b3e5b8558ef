"""Bytes that processes share: made once, the same for all, and none but their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import FOLDER, shared

SCRIPT = """
import sys
from tests.shared import shared
@shared
def made(name: str) -> bytes:
    return sys.argv[1].encode()
sys.stdout.write(made("a").decode() + made("b").decode())
"""


def test_the_first_process_makes_it_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    said = [
        subprocess.run([sys.executable, "-c", SCRIPT, text], check=True, capture_output=True, text=True).stdout
        for text in ("x", "y")
    ]
    assert said == ["xx", "xx"]
    assert len([*tmp_path.iterdir()]) == 2  # no draft stays


def test_arguments_and_functions_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))

    @shared
    def one(name: str) -> bytes:
        return b"one " + name.encode()

    @shared
    def other(name: str) -> bytes:
        return b"other " + name.encode()

    assert [one("a"), one("b"), other("a")] == [b"one a", b"one b", b"other a"]


def test_what_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    answers = [ZeroDivisionError(), b"fine"]

    @shared
    def made() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ZeroDivisionError):
        made()
    assert made() == made() == b"fine"
