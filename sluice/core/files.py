"""Files are written whole or not at all: aside in the same folder, flushed to the disk, then moved over the old one.

A file that cannot be read or written is a `SluiceError`: one sentence that says how to mend it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sluice.core.errors import SluiceError

__all__ = ["read_bytes", "write_atomically"]


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """The whole content of the file; ``what`` names it in the error, as in "an engine"."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SluiceError(
            f"cannot read {os.fspath(path)!r}: {error.strerror or error}; give the path of {what}"
        ) from None


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write all of ``content`` or leave the old file as it was."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    except OSError as error:
        raise SluiceError(
            f"cannot write {str(path)!r}: {error.strerror or error}; choose another folder or make room"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise SluiceError(
            f"cannot write {str(path)!r}: {error.strerror or error}; choose another folder or make room"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
