"""What takes seconds to make and is the same in every process of a run is made by one, and read by the others.

The folder is made by `tests.conftest`. Without it, as in a script of one's own, a process makes everything for itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["FOLDER", "shared"]

FOLDER = "SLUICE_TESTS_SHARED"  # the variable that names the folder
Make = Callable[..., bytes]  # of texts


def shared(make: Make) -> Make:
    """``make``, called once per run for the same arguments; two processes that need it at once may both call it."""

    @functools.cache
    @functools.wraps(make)
    def once(*names: str) -> bytes:
        folder = os.environ.get(FOLDER)
        if folder is None:
            return make(*names)
        key = repr((make.__module__, make.__qualname__, names))
        path = Path(folder, hashlib.sha256(key.encode()).hexdigest())
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_bytes(make(*names))
            draft.replace(path)
        return path.read_bytes()

    return once
