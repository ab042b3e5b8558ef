"""Drafts: what is not complete yet lies in a folder of its own beside the place where it will be.

1. A draft of ``x`` is a folder ``.x.<16 hexadecimal digits>.draft`` beside ``x``; nothing else has such a name.
2. Whoever works in a draft holds a lock on its folder, which the operating system gives up when the process ends,
   however it ends. So a draft whose lock can be had is of a process that is gone, on whatever machine it ran.
3. Whoever makes a draft of ``x``, or asks for `sweep`, removes those of ``x`` that are left of processes that are gone.
4. A folder may be swept between its making and its locking; then it is made again.

Where the system has no such locks (``fcntl``), nothing is swept.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["draft_beside", "drafts_of", "sweep"]

LONGEST = 200  # letters of a name that are part of its drafts' names; file systems allow 255


@contextmanager
def draft_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder on the file system of ``path``, removed at the end with all that is in it.

    Raises:
        OSError: the folder of ``path`` cannot be made or written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    folder, lock = _made(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove the drafts of ``path`` whose processes are gone (rule 3)."""
    for folder in drafts_of(path):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def drafts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The drafts of ``path`` that lie beside it."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.name[:LONGEST])}\.[0-9a-f]{{16}}\.draft")
    try:
        return [each for each in path.parent.iterdir() if name.fullmatch(each.name) and not each.is_symlink()]
    except OSError:
        return []


def _made(path: Path) -> tuple[Path, int | None]:
    """A new folder and its lock; rule 4."""
    while True:
        folder = path.with_name(f".{path.name[:LONGEST]}.{secrets.token_hex(8)}.draft")
        folder.mkdir()
        lock = _locked(folder, wait=True)
        if lock is None or _is_at(lock, folder):
            return folder, lock
        os.close(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """The lock on a folder, None where it cannot be had."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    os.close(handle)
    return None


def _is_at(handle: int, folder: Path) -> bool:
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return os.path.samestat(os.fstat(handle), found)
