"""What HiGHS prints past its switch stays away from standard output, and nothing else does."""

from __future__ import annotations

import subprocess
import sys

PRINTED = """
import ctypes, os
from sluice.solver.milp_highs import without_chatter
print("before", flush=True)
with without_chatter():
    ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
    print("meanwhile")
    os.write(1, b"HighsMipSolverData::again\\nHighs and low\\n")
print("after")
"""

CLOSED = """
import os, sys
from sluice.solver.milp_highs import without_chatter
os.close(1)
sys.stdout = None
with without_chatter():
    pass
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_lines_of_highs_are_left_out_and_others_come_late() -> None:
    done = run(PRINTED)
    assert done.returncode == 0, done.stderr
    first, *middle, last = done.stdout.splitlines()
    assert (first, sorted(middle), last) == ("before", ["Highs and low", "meanwhile"], "after")


def test_a_closed_standard_output_is_no_error() -> None:
    done = run(CLOSED)
    assert (done.returncode, done.stderr) == (0, "")
