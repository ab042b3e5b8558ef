"""A latency table keeps the runtime's timing cache: with it a rebuild is quick and takes the same kernels again.

Without it two builds of one network may choose different kernels and differ by several percent. A runner that has such
a cache offers it as the attribute ``cache`` (bytes), see `sluice.runtime.trt.runner`.
"""

from __future__ import annotations

from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.runner import Runner

__all__ = ["keep", "restore"]

NAME = "timing cache"


def restore(runner: Runner, cache: bytes | None) -> None:
    """Give the runner the kept timing cache, if the runner takes one and there is one."""
    if cache and getattr(runner, "cache", None) is not None:
        runner.cache = cache  # type: ignore[attr-defined]


def keep(runner: Runner, table: LatencyTable) -> None:
    """Put the timing cache of the runner into the table, if it has changed."""
    cache = getattr(runner, "cache", None)
    if cache and cache != table.get_blob(NAME):
        table.put_blob(NAME, cache)
