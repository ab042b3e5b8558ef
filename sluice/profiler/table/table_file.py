"""A latency table as a file: its schema and versions, how it is recognised, and SQLite's errors in the user's words.

1. ``user_version`` of the file is the version of the format; ``application_id`` tells it from other SQLite files.
2. A file is of version 1 until it holds a *blob*, which makes it version 2 (`add_blobs`). So a table is never newer
   than its contents require, and a table that is only read stays as it is.
3. A file that is not a table of these formats is refused before SQLite may write to it.
4. A file that holds anything but the tables of `SCHEMA`, a view or a trigger for one, is refused before it is queried.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sluice.core.errors import SluiceError
from sluice.profiler.table.fingerprint import Fingerprint

__all__ = [
    "add_blobs",
    "check_content",
    "check_header",
    "connect",
    "exists",
    "lay_out",
    "place",
    "transaction",
    "translated",
]

APPLICATION_ID = 0x736C7569  # "slui"
FIRST_VERSION, VERSION = 1, 2
JOURNALS = ("-journal", "-wal", "-shm")

SCHEMA = """
CREATE TABLE fingerprint (json TEXT NOT NULL);
CREATE TABLE pieces (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE points (
    key TEXT NOT NULL, extents TEXT NOT NULL, ms REAL NOT NULL, spread REAL NOT NULL, samples INTEGER NOT NULL,
    PRIMARY KEY (key, extents)) WITHOUT ROWID;
CREATE TABLE calibrations (
    model_key TEXT PRIMARY KEY, slope REAL NOT NULL, intercept REAL NOT NULL, error TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE engines (
    model_key TEXT NOT NULL, widths TEXT NOT NULL, ms REAL NOT NULL, spread REAL NOT NULL, samples INTEGER NOT NULL,
    PRIMARY KEY (model_key, widths)) WITHOUT ROWID;
"""
BLOBS = "CREATE TABLE blobs (name TEXT PRIMARY KEY, content BLOB NOT NULL)"


class Connection(sqlite3.Connection):
    """Closed when nothing refers to it any more, as CPython before 3.13 does without a warning."""

    def __del__(self) -> None:
        with suppress(sqlite3.Error):  # SQLite closes it where it belongs to another thread
            self.close()


def connect(name: str, draft: Path | None = None) -> sqlite3.Connection:
    """A connection to the table, or to the draft that is to become the table.

    Raises:
        SluiceError: a link lies where SQLite would write its journal, through the link.
    """
    for suffix in JOURNALS:
        if os.path.islink(journal := f"{os.path.realpath(name)}{suffix}"):
            raise SluiceError(
                f"cannot use the latency table {name}: {journal} is a link, through which the journal of the "
                f"table would be written; remove the link"
            )
    with translated(name):
        connection = sqlite3.connect(draft or name, timeout=30.0, isolation_level=None, factory=Connection)
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection


def place(draft: Path, name: str) -> None:
    """Move the draft to where the table belongs; `FileExistsError` where another process made one in the meantime."""
    if not exists(name):
        Path(name).unlink(missing_ok=True)
    try:
        os.link(draft, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.replace(draft, name)


def lay_out(connection: sqlite3.Connection, name: str, fingerprint: Fingerprint) -> None:
    with translated(name), transaction(connection):
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute("INSERT INTO fingerprint VALUES (?)", (fingerprint.to_json(),))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FIRST_VERSION}")


def add_blobs(connection: sqlite3.Connection) -> None:
    """Make room for blobs (rule 2), inside a transaction; a table that has it stays as it is."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < VERSION:
        connection.execute(BLOBS)
        connection.execute(f"PRAGMA user_version = {VERSION}")


def exists(name: str) -> bool:
    """An empty file, as temporary-file makers leave, counts as none."""
    return os.path.exists(name) and (os.path.isdir(name) or os.path.getsize(name) > 0)


def check_header(name: str) -> None:
    """Refuse a foreign file by its first bytes (SQLite's documented file header), without opening it as a table."""
    try:
        with open(name, "rb") as file:
            header = file.read(100)
    except OSError as error:
        raise SluiceError(f"cannot open the latency table {name}: {error.strerror}; check the path") from error
    if len(header) < 100 or header[:16] != b"SQLite format 3\0" or _big_endian(header[68:72]) != APPLICATION_ID:
        raise SluiceError(f"{name} is not a latency table; choose another file, it was left as it is")
    version = _big_endian(header[60:64])
    if version > VERSION:
        raise SluiceError(
            f"{name} is of version {version}, this program knows up to {VERSION}; use a newer release of sluice"
        )


def _big_endian(data: bytes) -> int:
    return int.from_bytes(data, "big")


def check_content(connection: sqlite3.Connection, name: str) -> Fingerprint:
    try:
        foreign = _foreign(connection)
        if foreign:
            raise SluiceError(f"{name} holds {foreign}, which no latency table does; restore a copy, or measure again")
        sound = connection.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]
        rows = connection.execute("SELECT json FROM fingerprint").fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for table in ("pieces", "points", "calibrations", "engines", *(["blobs"] if version >= 2 else [])):
            connection.execute(f"SELECT 1 FROM {table} LIMIT 1")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise SluiceError(f"{name} is in use by another process; wait for that to end") from error
        if os.path.exists(f"{name}-journal"):
            raise SluiceError(
                f"the latency table {name} was left by a process that was killed and cannot be put right here "
                f"({error}); make the file and its folder writable, or copy it together with {name}-journal"
            ) from error
        sound, rows = False, []
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        sound, rows = False, []
    if not sound or len(rows) != 1:
        raise SluiceError(f"the latency table {name} is damaged; restore a copy, or remove it and measure again")
    return Fingerprint.from_json(rows[0][0])


def _foreign(connection: sqlite3.Connection) -> str:
    """What the file holds beside tables with the columns of `SCHEMA`: views and triggers are programs (rule 4)."""
    known = {re.split(r"\W+", each)[2]: _words(each) for each in (*SCHEMA.strip().split(";\n"), BLOBS)}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        if kind == "index" and sql is None:  # of a primary key
            continue
        if kind != "table" or known.get(name) != _words(str(sql)):
            return f"the {kind} {name!r:.60}"
    return ""


def _words(sql: str) -> str:
    return " ".join(sql.strip().rstrip(";").split())


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk may have rolled back already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def translated(name: str) -> Iterator[None]:
    """SQLite's errors as the user's."""
    try:
        yield
    except sqlite3.OperationalError as error:
        reason = str(error)
        advice = "check the path and its rights"
        if "full" in reason:
            advice = "what was recorded before is kept; make room on the disk and run again, it will go on from there"
        elif "readonly" in reason:
            advice = "what was recorded before is kept; make the file and its folder writable and run again"
        elif "locked" in reason:
            advice = "another process is writing to it; wait for that to end and run again"
        elif "disk I/O" in reason:
            advice = "what was recorded before is kept; check the disk and run again"
        raise SluiceError(f"cannot use the latency table {name}: {reason}; {advice}") from error
    except sqlite3.DatabaseError as error:
        raise SluiceError(
            f"the latency table {name} is damaged ({error}); restore a copy, or remove it and measure again"
        ) from error
