"""The name of the machine whose CPU runs the runtimes, and the identity that tells it from others of its kind.

1. A hypervisor may give CPUs of several generations one model name ("AMD EPYC"), of which one takes half the time of
   the other, and an Arm system may give none. So the numbers by which the maker tells its CPUs apart are part of it.
2. Containers on one host share its boot. A machine's own number and name outlive the boot; containers may lack the
   number or have that of their image, but then have names of their own. So a host is known by its boot, or by both.
3. Where one thread computes, in the thread that calls, the CPU time of that thread is the latency on an idle core, and
   the waiting for other processes does not count. More threads: wall time, the only clock that sees them all. A coarser
   CPU-time clock (Windows counts in ticks of 15.6 ms) cannot time a burst of a few milliseconds.
"""

from __future__ import annotations

import hashlib
import platform
import time
from pathlib import Path

from sluice.runtime.base.runner import Clock

__all__ = ["cpu_clock", "host_device", "host_identity"]

MAX_CLOCK_RESOLUTION_S = 1e-5
CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")
MACHINE, BOOT = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")
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

    Of a CPU with cores of several kinds each number is of all kinds that are online, as ``part 0xd05/0xd0a``: with
    cores of other kinds it is another device.
    """
    values: dict[str, list[str]] = {}
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), []).append(" ".join(value.split()))
    named = [*values.get("model name", ()), " ".join(_text(board).strip("\0").split())]
    # The last two may start a process, so they come last.
    device = next(filter(None, named), "") or platform.processor() or platform.machine() or "unknown CPU"
    numbers = [f"{short} {'/'.join(sorted(set(values[name])))}" for name, short in NUMBERS.items() if name in values]
    return f"{device} ({' '.join(numbers)})" if numbers else device


def cpu_clock(threads: int) -> Clock:
    """The clock of engines that compute in the calling thread and ``threads - 1`` others (rule 3)."""
    fine = time.get_clock_info("thread_time").resolution <= MAX_CLOCK_RESOLUTION_S
    return "thread_cpu" if threads == 1 and fine else "wall"


def host_identity(machine: Path = MACHINE, boot: Path = BOOT) -> frozenset[str]:
    """Hashes, of which two sets of one host share one (rule 2); none where the system gives nothing to go by."""
    number = _text(machine).strip()
    texts = [_text(boot).strip(), f"{number} {platform.node()}" if number else ""]
    return frozenset(hashlib.sha256(f"sluice {text}".encode()).hexdigest()[:16] for text in texts if text)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
