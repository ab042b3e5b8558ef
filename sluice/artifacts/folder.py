"""The folder of a result: its files belong together, and no kill mixes those of two runs.

1. ``manifest.json`` holds the SHA-256 of every file of the result. Who reads a file of the folder holds it to that
   (`held`). A folder without a manifest, as earlier releases wrote it, is read as it is.
2. All files are made in a draft. When they are complete, the draft is renamed to ``.sluice-complete``: from there on
   the folder holds the new result. Then the files are moved into their places, the manifest last.
3. Where a process was killed between the two, whoever reads or writes the folder next finishes the moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sluice.core.deployment import PRECISIONS
from sluice.core.drafts import draft_beside
from sluice.core.errors import SluiceError
from sluice.core.files import (
    BESIDE,
    DATA,
    MANIFEST,
    ONNX,
    PLAN,
    REPORT,
    WEIGHTS,
    check_output,
    read_bytes,
    write_atomically,
)

__all__ = ["check_writable", "held", "save_together", "settle"]

COMPLETE, MANIFEST_FILE = ".sluice-complete", "manifest.json"
FILES = {
    "plan.json": PLAN, "slim.safetensors": WEIGHTS, "slim.onnx": ONNX, "report.json": REPORT, MANIFEST_FILE: MANIFEST,
    **{f"slim.{p}.onnx": ONNX for p in PRECISIONS if p != "fp32"},
}  # fmt: skip
FILES |= {f"{name}{BESIDE}": DATA for name, kind in FILES.items() if kind == ONNX}


def save_together(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Make all files of a result, or leave the folder as it was.

    Args:
        write: puts the files into the folder that it is given.
    Raises:
        SluiceError: they cannot be written.
    """
    folder = Path(folder)
    check_writable(folder)
    try:
        with draft_beside(folder / "result") as draft:
            write(draft)
            files = {path.name: _digest(path) for path in sorted(draft.iterdir()) if path.is_file()}
            content = {"format": "sluice-manifest", "version": 1, "files": files}
            write_atomically(draft / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode())
            os.rename(draft, folder / COMPLETE)
        settle(folder)
    except OSError as error:
        raise SluiceError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another folder or make room"
        ) from error


def settle(folder: Path) -> None:
    """Finish the moves of a process that was killed among them (rule 3).

    Raises:
        SluiceError: the folder cannot be written to.
    """
    complete = folder / COMPLETE
    if not (complete / MANIFEST_FILE).is_file():
        if complete.is_dir() and not complete.is_symlink():
            shutil.rmtree(complete, ignore_errors=True)  # all was moved
        return
    try:
        names = _files_of(complete / MANIFEST_FILE)
        for name in FILES.keys() - names.keys() - {MANIFEST_FILE}:
            (folder / name).unlink(missing_ok=True)
        for name in (*names, MANIFEST_FILE):
            _move(complete / name, folder / name)
        shutil.rmtree(complete, ignore_errors=True)
    except OSError as error:
        raise SluiceError(
            f"a result was being saved in {str(folder)!r} when the process was killed, and that cannot be finished "
            f"({error.strerror or error}); make the folder writable"
        ) from None


def held(path: str | os.PathLike[str]) -> Path:
    """The path, of a file that is the one of the manifest beside it, if there is one.

    Raises:
        SluiceError: it is another file, or the manifest cannot be read.
    """
    path = Path(path)
    settle(path.parent)
    manifest = path.parent / MANIFEST_FILE
    if not manifest.is_file() or not path.is_file():
        return path
    digests = _files_of(manifest)
    for one in (path, path.with_name(f"{path.name}{BESIDE}")):  # an ONNX file is both
        digest = digests.get(one.name)
        if digest is not None and (not one.is_file() or digest != _digest(one)):
            raise SluiceError(
                f"{str(one)!r} is not the file that was saved with the others of its folder; save the result again, or "
                f"remove {MANIFEST_FILE} there if the change is yours"
            )
    return path


def check_writable(
    folder: str | os.PathLike[str], size: int = 0, inputs: Mapping[str, str | os.PathLike[str]] | None = None
) -> None:
    """Make the folder, and make sure that a result of ``size`` bytes can be written to it.

    Args:
        inputs: what is read besides, by the words of the user.
    Raises:
        SluiceError: it cannot.
    """
    folder = Path(folder)
    try:
        with draft_beside(folder / "result") as draft, open(draft / "room", "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise SluiceError(
            f"cannot write {size:,} bytes to {str(folder)!r}: {error.strerror or error}; choose another folder or "
            f"make room"
        ) from None
    settle(folder)
    for name, kind in FILES.items():
        check_output(folder / name, inputs or {}, kind)


def _move(source: Path, path: Path) -> None:
    """A file over the one that was there, whose mode stays."""
    with suppress(FileNotFoundError):
        os.chmod(source, stat.S_IMODE(os.stat(path).st_mode))
    with suppress(FileNotFoundError):  # moved before
        os.replace(source, path)


def _files_of(manifest: Path) -> dict[str, str]:
    """Hashes by file name, as a manifest holds them."""
    try:
        found = json.loads(read_bytes(manifest, "a manifest"))
        files = found["files"] if found["format"] == "sluice-manifest" and found["version"] == 1 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        files = None
    if not isinstance(files, dict) or not all(k in FILES and isinstance(v, str) for k, v in files.items()):
        raise SluiceError(f"{str(manifest)!r} is not a readable manifest; save the result again, or remove that file")
    return files


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
