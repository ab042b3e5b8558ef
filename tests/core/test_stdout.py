"""A result that cannot be printed costs neither the work nor a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import table_in

SHOW = f'"{sys.executable}" -m sluice table show'


@pytest.mark.parametrize(
    ("where", "status", "says"),
    [
        ("> /dev/full", 1, "the result cannot be written to standard output: No space left on device"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("--json > /dev/full", 1, "the result cannot be written to standard output"),
        ("| true", 0, ""),
    ],
)
def test_closed_and_full(where: str, status: int, says: str, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    before = table.read_bytes()
    done = subprocess.run(["bash", "-c", f"{SHOW} {table} {where}"], capture_output=True, text=True)
    assert done.returncode == status and done.stdout == ""
    assert "Traceback" not in done.stderr and says in done.stderr and done.stderr.count("\n") == bool(says)
    assert table.read_bytes() == before
