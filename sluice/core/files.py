"""Files are written whole or not at all: in a draft (`sluice.core.drafts`), flushed to the disk, then moved into place.

1. A file is replaced by one of its own kind only, by the first bytes of both (`kind_of`): a plan by a plan, an ONNX
   file by an ONNX file. An empty file may become anything.
2. Links, devices, pipes and folders are never written to, nor a file that the same command reads (`check_output`).
3. A file keeps its mode when it is replaced; one that was not there before gets the mode that the user's umask says.
4. A file that cannot be read or written is a `SluiceError`: one sentence that says how to mend it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from sluice.core.drafts import draft_beside, sweep
from sluice.core.errors import SluiceError

__all__ = [
    "BESIDE",
    "DATA",
    "DATA_HEAD",
    "JOB",
    "MANIFEST",
    "ONNX",
    "PLAN",
    "REPORT",
    "ROWS",
    "WEIGHTS",
    "check_output",
    "kind_of",
    "read_bytes",
    "read_text",
    "write_atomically",
]

HEAD = 4096  # bytes that tell the kind
PLAN, REPORT, MANIFEST, WEIGHTS, ONNX, JOB, ROWS, DATA = (
    "a plan", "a report", "a manifest", "a safetensors file", "an ONNX file", "a zip file, as jobs are",
    "rows of a latency table", "weights of an ONNX file",
)  # fmt: skip
BESIDE = ".data"  # behind the name of an ONNX file, that of its weights
DATA_HEAD = b"sluice: weights of the ONNX file beside this one\n"
KINDS = (
    (rb"SQLite format 3\0", "an SQLite file, as latency tables are"),
    (rb"PK(\x03\x04|\x05\x06)", JOB),
    (rb'\s*\{\s*"format":\s*"sluice-plan"', PLAN),
    (rb'\s*\{\s*"format":\s*"sluice-manifest"', MANIFEST),
    (rb'\s*\{\s*"version":\s*\d+,\s*"budget_ms"', REPORT),
    (re.escape(DATA_HEAD), DATA),
    (rb"key,description,extents,ms,", ROWS),
    (rb".{8}\{\"", WEIGHTS),
    (rb"\x08[\x01-\x7f][\x12\x1a\x22\x28\x32\x3a\x42]", ONNX),
)


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """The whole content of the file; ``what`` names it in the error, as in "an engine"."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SluiceError(
            f"cannot read {os.fspath(path)!r}: {error.strerror or error}; give the path of {what}"
        ) from None


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """`read_bytes` as UTF-8."""
    try:
        return read_bytes(path, what).decode()
    except UnicodeDecodeError:
        raise SluiceError(f"{os.fspath(path)!r} is no text, and so not {what}; give the path of {what}") from None


def kind_of(head: bytes) -> str:
    """What a file is, by its first bytes."""
    for pattern, name in KINDS:
        if re.match(pattern, head, re.DOTALL):
            return name
    try:
        head[: HEAD // 2].decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        if error.start < len(head[: HEAD // 2]) - 3:  # not a letter that the end of the head cuts through
            return "a file of another kind"
    return "a file of another kind" if b"\0" in head else "a text"


def check_output(
    path: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None], kind: str | None = None
) -> None:
    """Check, before any work, that ``path`` can be written to (rules 1 and 2), and sweep its drafts.

    Args:
        inputs: what the same command reads, by the words of the user.
        kind: what will be written, one of `KINDS`; any where it is not known before.
    Raises:
        SluiceError: it is no regular file, one of the inputs, or a file of another kind.
    """
    if _check_regular(Path(path)) is not None and kind is not None:
        _check_kind(Path(path), kind)
    for word, given in inputs.items():
        if given is None:
            continue
        there = os.path.exists(given) and os.path.exists(path)
        if os.path.samefile(path, given) if there else os.path.realpath(path) == os.path.realpath(given):
            raise SluiceError(f"{os.fspath(path)!r} is {word} itself, which would be lost; choose another file")
    sweep(path)


def write_atomically(path: str | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
    """Write all of ``content`` or leave the old file as it was.

    Args:
        content: the bytes, or parts of them, the first of which tells the kind of the file.
    Raises:
        SluiceError: it cannot be written, or rules 1 and 2 forbid it.
    """
    path = Path(path)
    mode = _check_regular(path)
    parts = iter([content] if isinstance(content, bytes) else content)
    first = next(parts, b"")
    _check_kind(path, kind_of(first[:HEAD]))
    try:
        with draft_beside(path) as folder:
            draft = folder / "content"
            with open(draft, "xb") as file:
                file.write(first)
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(draft, mode)
            os.replace(draft, path)
    except OSError as error:
        raise SluiceError(
            f"cannot write {str(path)!r}: {error.strerror or error}; choose another folder or make room"
        ) from None


def _check_regular(path: Path) -> int | None:
    """The mode of the file at ``path``, None where there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SluiceError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another file") from None
    if stat.S_ISREG(found.st_mode):
        return stat.S_IMODE(found.st_mode)
    what = "a link" if stat.S_ISLNK(found.st_mode) else "a folder" if stat.S_ISDIR(found.st_mode) else "a device"
    more = f" to {os.readlink(path)!r}" if what == "a link" else ""
    raise SluiceError(
        f"cannot write {str(path)!r}: it is {what}{more} and no file; choose a file, it was left as it is"
    )


def _check_kind(path: Path, asked: str) -> None:
    """Rule 1."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SluiceError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another file") from None
    if head and (there := kind_of(head)) != asked:
        raise SluiceError(
            f"cannot write {str(path)!r}: it is {there}, not {asked}; choose another file, it was left as it is"
        )
