"""The harness of hostile inputs sees what it is there to see: a sound command line, and one of each fault."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import hostile

INPUTS = 4


def fails(words: list[str]) -> int:
    raise ZeroDivisionError


def ends_the_process(words: list[str]) -> int:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def says_many_lines(words: list[str]) -> int:
    print("sluice: error: one\ntwo", file=sys.stderr)
    return 1


def hangs(words: list[str]) -> int:
    time.sleep(5)
    return 0


def writes_elsewhere(words: list[str]) -> int:
    (Path.cwd().parent / "mine").write_text("x")
    return 0


def removes(words: list[str]) -> int:
    (Path.cwd() / "dense.onnx").unlink()
    return 0


def test_inputs_of_every_kind_end_well() -> None:
    each = len(hostile.KINDS)
    assert hostile.run(3 * each, seed=5) == {"inputs": 3 * each, "tracebacks": 0, "hangs": 0, "outside": 0}


@pytest.mark.parametrize(
    ("fault", "verb"),
    [
        ("tracebacks", fails),
        ("tracebacks", ends_the_process),
        ("tracebacks", says_many_lines),
        ("hangs", hangs),
        ("outside", writes_elsewhere),
        ("outside", removes),
    ],
)
def test_a_planted_fault_is_counted(
    fault: str, verb: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "main", verb)
    monkeypatch.setattr(hostile, "HANG_S", 1)
    found = hostile.run(INPUTS, ("plan",), show=0)
    assert found["inputs"] == INPUTS and found[fault] > 0
    assert not any(found[other] for other in {"tracebacks", "hangs", "outside"} - {fault})
