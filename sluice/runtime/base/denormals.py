"""Subnormal numbers are zero while an engine is timed, and only then.

They are many times slower than others, and deep random networks drift into them. ONNX Runtime's own option flushes
them in its pool threads; for the calling thread it acts only with the first session of the process, and then for good.
OpenVINO's acts on every thread that compiles an engine, for good. So the calling thread's mode is set here for a burst
and put back, and a caller's arithmetic never changes.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FLUSH_BITS", "floating_point_mode"]

# Where the C library keeps the flush-to-zero bits in its floating-point environment: offset of a 32-bit word, bits.
FLUSH_BITS: dict[tuple[str, str], tuple[int, int]] = {
    ("linux", "x86_64"): (28, 0x8040),
    ("linux", "aarch64"): (0, 1 << 24),
}


@contextmanager
def floating_point_mode(*, flush: bool) -> Iterator[None]:
    """Put the calling thread's floating-point mode back afterwards; with ``flush``, subnormals are zero in between.

    On systems that `FLUSH_BITS` does not know, the runtime's option is all there is.
    """
    place = FLUSH_BITS.get((sys.platform, platform.machine()))
    if place is None:
        yield
        return
    library = ctypes.CDLL(None)
    saved = (ctypes.c_uint32 * 16)()
    library.fegetenv(saved)
    offset, bits = place
    if flush:
        flushing = (ctypes.c_uint32 * 16)(*saved)
        flushing[offset // 4] |= bits
        library.fesetenv(flushing)
    try:
        yield
    finally:
        library.fesetenv(saved)
