"""Standard output is for results: whoever cannot take them loses nothing but the text.

1. What libraries in C print to it (HiGHS does) goes to standard error.
2. Where it is closed, results go nowhere; its number must not pass to a file that is opened later, a table for one.
3. Where it cannot be written to, a full disk, the work is done all the same: `Unwritable` says so in one sentence.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

__all__ = ["Unwritable", "give_up", "keep_stdout"]


class Unwritable(Exception):
    """Standard output cannot be written to."""


class _Results(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unwritable(
                f"the result cannot be written to standard output: {error.strerror or error}; all else is done, and "
                f"files are written"
            ) from None


def keep_stdout() -> None:
    """Keep standard output for results (rules 1 to 3)."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return
    try:
        sys.stdout.flush()
        own = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):  # no file, but something in memory
        return
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    raw = io.BufferedWriter(_Results(own, "w"))
    sys.stdout = io.TextIOWrapper(raw, encoding, errors, line_buffering=os.isatty(own))


def give_up() -> None:
    """Let what is left in the buffer go nowhere: it would be written again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
