"""HiGHS on a mixed-integer program, and what it prints kept out of the user's standard output.

HiGHS writes some lines past its own switch for output ("HighsMipSolverData::transformNew..."), from C, to descriptor 1.
While it runs, that descriptor is a file. Afterwards all of it that is not of HiGHS goes where it was meant to: what
other threads print meanwhile is late, but not lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from sluice.core.errors import SluiceError
from sluice.solver.milp import MixedIntegerProgram

__all__ = ["OutOfTime", "solve", "without_chatter"]

CHATTER = re.compile(rb"Highs\w*::.*\n?")
_ONE = threading.Lock()  # descriptor 1 is the process's


class OutOfTime(SluiceError):
    """The solver has neither found a configuration nor proved that there is none."""


def solve(
    program: MixedIntegerProgram, objective: np.ndarray, bound_ms: float | None, gap: float, time_limit_s: float
) -> tuple[dict[str, int], float] | None:
    """Values of the sites and proved gap, or None where none satisfy the bound."""
    model = program.model
    constraints = [program.rows()]
    # Milliseconds may be tiny; HiGHS' feasibility tolerance is absolute, so both rows are put on a scale of one.
    unit = max(abs(model.slope) * float(np.abs(program.cost).max(initial=0.0)), 1e-12)
    if bound_ms is not None:
        room = bound_ms - model.intercept - model.slope * program.constant
        constraints.append(LinearConstraint(model.slope / unit * program.cost[None, :], -np.inf, room / unit))
    else:
        objective = model.slope / unit * objective
    with without_chatter():
        result = milp(
            objective,
            integrality=program.integrality,
            bounds=Bounds(0, program.most),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
    if result.x is None and "nfeasible" in result.message:
        return None
    if result.x is None:
        raise OutOfTime(
            f"no configuration found in {time_limit_s:.0f} s for {len(model.dense)} sites ({result.message.strip()}); "
            "raise time_limit_s or offer fewer levels per group"
        )
    return program.widths(result.x), float(result.mip_gap or 0.0)


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keep the lines of HiGHS from descriptor 1, and nothing else."""
    with _ONE, contextlib.ExitStack() as undo:
        try:
            _flush()
            own = os.dup(1)
            undo.callback(os.close, own)
            kept = undo.enter_context(tempfile.TemporaryFile())
            os.dup2(kept.fileno(), 1)
        except OSError:  # standard output is closed, or there is no room for the file
            yield
            return
        try:
            yield
        finally:
            _flush()
            os.dup2(own, 1)
            kept.seek(0)
            rest = memoryview(CHATTER.sub(b"", kept.read()))
            while rest:
                rest = rest[os.write(1, rest) :]


def _flush() -> None:
    """Hand over what Python and C hold back."""
    if sys.stdout is not None:
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
