"""Standard output is for results alone."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["keep_stdout"]


def keep_stdout() -> None:
    """Keep standard output for results: what libraries in C print to it (HiGHS does) goes to standard error."""
    if sys.stdout is None or sys.stderr is None:  # closed
        return
    try:
        sys.stdout.flush()
        own = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):  # no file, but something in memory
        return
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = io.TextIOWrapper(os.fdopen(own, "wb"), encoding, errors, line_buffering=os.isatty(own))
