"""A runtime's timing cache is kept in the latency table: with it a rebuild is quick, and takes the same kernels again.

Without it two builds of one network may choose different kernels and differ by several percent. A runner that has such
a cache offers it as the attribute ``cache`` (bytes), see `sluice.runtime.trt.runner`.
"""

from __future__ import annotations

from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.runner import Runner

__all__ = ["keep", "restore"]

NAME = "timing cache"


def restore(runner: Runner, cache: bytes | None) -> None:
    """Give the runner what was kept, if it has a cache and there is one."""
    if cache and getattr(runner, "cache", None) is not None:
        runner.cache = cache  # type: ignore[attr-defined]


def keep(runner: Runner, table: LatencyTable) -> None:
    """Put what the runner has now into the table, if that is something new."""
    cache = getattr(runner, "cache", None)
    if cache and cache != table.get_blob(NAME):
        table.put_blob(NAME, cache)
