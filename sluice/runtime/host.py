"""What the machine is called that the runtimes of its CPU run on.

A hypervisor may give CPUs of several generations one model name ("AMD EPYC"), of which one takes half the time of the
other, and an Arm system may give none. So the numbers by which the maker tells its CPUs apart are part of the name.
"""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["host_device"]

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")
NUMBERS = {
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
    "CPU variant": "variant",
    "CPU revision": "revision",
}


def host_device(cpuinfo: Path = CPUINFO, board: Path = BOARD) -> str:
    """The model name of this machine's CPU, or of its board, or its architecture, with the maker's numbers.

    Of a CPU with cores of several kinds each number is of all kinds, as ``part 0xd05/0xd0a``.
    """
    values: dict[str, list[str]] = {}
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), []).append(" ".join(value.split()))
    named = [*values.get("model name", ()), " ".join(_text(board).strip("\0").split()), platform.processor()]
    device = next(filter(None, named), platform.machine() or "unknown CPU")
    numbers = [f"{short} {'/'.join(dict.fromkeys(values[name]))}" for name, short in NUMBERS.items() if name in values]
    return f"{device} ({' '.join(numbers)})" if numbers else device


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
