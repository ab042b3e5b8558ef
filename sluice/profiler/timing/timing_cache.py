"""A latency table keeps the runtime's timing cache: with it a rebuild is quick and takes the same kernels again.

1. Without it two builds of one network may choose different kernels and differ by several percent. A runner that has
   such a cache offers it as the attribute ``cache`` (bytes), see `sluice.runtime.trt.runner`.
2. It holds megabytes, so it is kept once for every call of measurements, together with what that measured. A kill
   costs the kernels of one call, whose points are measured again in any case. `Kept` counts what was written.
3. Beside it the table keeps which kernels its parts ran, a digest each. Those of an engine that is deployed should be
   among them (`sluice.commands.export`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.base.runner import Runner

__all__ = ["KERNELS", "NAME", "Kept", "digest", "keep", "keep_kernels", "known_kernels", "restore"]

NAME = "timing cache"
KERNELS = "kernels of parts"


@dataclass(slots=True)
class Kept:
    """Engines that were built, and bytes of timing cache that were written to a table."""

    engines: int = 0
    bytes: int = 0

    @property
    def mb_per_build(self) -> float:
        return self.bytes / 1e6 / max(1, self.engines)


def restore(runner: Runner, cache: bytes | None) -> None:
    """Give the runner the kept timing cache, if the runner takes one and there is one."""
    if cache and getattr(runner, "cache", None) is not None:
        runner.cache = cache  # type: ignore[attr-defined]


def keep(runner: Runner, table: LatencyTable, kept: Kept | None = None) -> None:
    """Put the timing cache of the runner into the table, if it has changed."""
    cache = getattr(runner, "cache", None)
    if cache and cache != table.get_blob(NAME):
        table.put_blob(NAME, cache)
        if kept is not None:
            kept.bytes += len(cache)


def digest(kernel: Hashable) -> str:
    """A kernel as a short text; one that came over a line is such a text already."""
    return kernel if isinstance(kernel, str) else hashlib.sha256(repr(kernel).encode()).hexdigest()[:32]


def keep_kernels(runner: Runner, table: LatencyTable, kernels: Iterable[Hashable]) -> None:
    """Add kernels to those of the table, where the runner has a timing cache."""
    if getattr(runner, "cache", None) is None:
        return
    known = known_kernels(table)
    if new := {digest(kernel) for kernel in kernels} - known:
        table.put_blob(KERNELS, json.dumps(sorted(known | new)).encode())


def known_kernels(table: LatencyTable) -> frozenset[str]:
    """Digests of the kernels that parts of networks ran; empty for tables that were filled before they were kept."""
    return frozenset(json.loads(table.get_blob(KERNELS) or b"[]"))
