"""What the machine is called that the runtimes of its CPU run on."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["host_device"]

CPUINFO = Path("/proc/cpuinfo")


def host_device(cpuinfo: Path = CPUINFO) -> str:
    """The model name of this machine's CPU, and its architecture where the system gives no name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown CPU"
