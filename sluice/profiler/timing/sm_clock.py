"""A table holds the range of the accelerator's clock while it was filled, so that throttling shows afterwards.

A runner on an accelerator whose driver tells its clock offers the clock as a method ``sm_clock_mhz``.
"""

from __future__ import annotations

import json

from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.runner import Runner

__all__ = ["clock_range", "keep"]

NAME = "clock range"


def keep(runner: Runner, table: LatencyTable) -> None:
    """Widen the range in the table by the clock right now, if there is one to read."""
    read = getattr(runner, "sm_clock_mhz", None)
    now = read() if read is not None else None
    if now is None:
        return
    known = clock_range(table)
    widened = (now, now) if known is None else (min(known[0], now), max(known[1], now))
    if widened != known:
        table.put_blob(NAME, json.dumps(widened).encode())


def clock_range(table: LatencyTable) -> tuple[int, int] | None:
    """Least and most MHz that were read right after measurements; None where none was."""
    content = table.get_blob(NAME)
    if content is None:
        return None
    least, most = json.loads(content)
    return least, most
