"""Memory that is free goes back to the system.

glibc takes a block from the system, and gives it back, if the block is larger than a threshold. The threshold grows
with every such block that is freed, up to 32 MiB; smaller blocks come from a heap that keeps holes. Files of a few
megabytes are copied, rewritten and run hundreds of times on their way, and the holes came to more than all that was in
use. A fixed threshold leaves no holes of its size. It holds for the whole process and cannot be taken back, so commands
set it, and functions that others call do not. Holes of smaller blocks go back when they are asked for, between stages,
which changes nothing for whoever allocates later. Before that, circles go: graphs that a rewriter or an optimiser made
consist of nodes and values that refer to each other, and hold the numbers of a whole file until the collector comes by.

A full collection looks at every object of the process, which is a second where PyTorch and a few networks live in it.
So what is done hundreds of times collects its own circles alone: while the collector rests, whatever is made is of the
youngest generation.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["THRESHOLD", "give_back_blocks", "give_back_holes", "own_circles"]

THRESHOLD = 2**17  # bytes
M_MMAP_THRESHOLD = -3  # of glibc's <malloc.h>


def give_back_blocks() -> bool:
    """Free blocks of `THRESHOLD` bytes and more go back at once; False where the system knows no such setting."""
    setting = _of_glibc("mallopt")
    return setting is not None and bool(setting(M_MMAP_THRESHOLD, THRESHOLD))


@contextmanager
def own_circles() -> Iterator[None]:
    """The circles that the block leaves behind go at its end, at the cost of what the block made."""
    rests = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if not rests:
            gc.enable()


def give_back_holes(*, circles: bool = True) -> None:
    """Whole pages that are free inside the heap go back, where the system knows how.

    Args:
        circles: what nothing can reach goes before, wherever it was made.
    """
    if circles:
        gc.collect()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
