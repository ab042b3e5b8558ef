"""The latency table: the measured times of one device, in one SQLite file.

1. A *point* is the time of one piece at one tuple of extents. ``key`` is the hash of the piece's structure, so equal
   pieces of different networks share their points.
2. Everything written together is one transaction of SQLite's rollback journal. So a kill loses the call in flight and
   nothing else, and the next run goes on by asking which points are missing.
3. The `Fingerprint` says where the times are valid. A table is never opened for another fingerprint.
4. A *blob* is bytes by name that a runtime wants to find again next time: its timing cache.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from sluice.core.drafts import draft_beside, sweep
from sluice.core.errors import SluiceError
from sluice.core.files import check_output
from sluice.core.schema import Misfit, parse, typed
from sluice.profiler.table.fingerprint import Fingerprint, difference
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.table.table_file import (
    add_blobs,
    check_content,
    check_header,
    connect,
    exists,
    lay_out,
    place,
    transaction,
    translated,
)

__all__ = ["MEMORY", "Fit", "LatencyTable"]

MEMORY = ":memory:"
TAKE_OVER = """
INSERT INTO {kind} SELECT {place}, ms * ?, spread, samples FROM other.{kind} WHERE true
ON CONFLICT ({place}) DO UPDATE SET ms = excluded.ms, spread = excluded.spread, samples = excluded.samples
WHERE excluded.spread < spread
"""
Points = Iterable[tuple[str, Sequence[int], Measurement]]  # key, extents, time
Fit = tuple[float, float, dict[str, float]]  # slope, intercept, error


class LatencyTable:
    """Measured milliseconds by piece and extents; a context manager. Made by `create`, `open` or `open_or_create`."""

    def __init__(self, connection: sqlite3.Connection, path: str, fingerprint: Fingerprint) -> None:
        self._connection = connection
        self.path = path
        self.fingerprint = fingerprint

    @classmethod
    def create(cls, path: str | os.PathLike[str], fingerprint: Fingerprint) -> LatencyTable:
        """A new, empty table; `SluiceError` where ``path`` is taken. ``":memory:"`` makes one without a file."""
        name = os.fspath(path)
        if name == MEMORY:
            connection = connect(name)
            lay_out(connection, name, fingerprint)
            return cls(connection, name, fingerprint)
        if exists(name):
            raise SluiceError(f"{name} exists already; open it, or remove it to measure anew")
        check_output(name, {})
        try:
            with draft_beside(name) as folder:
                connection = connect(name, folder / "table.db")
                try:
                    lay_out(connection, name, fingerprint)
                finally:
                    connection.close()
                place(folder / "table.db", name)
        except OSError as error:
            raise SluiceError(f"cannot create {name}: {error}; choose a place that can be written") from error
        return cls(connect(name), name, fingerprint)

    @classmethod
    def open(cls, path: str | os.PathLike[str], expect: Fingerprint | None = None) -> LatencyTable:
        """An existing table.

        Raises `SluiceError` where the file is missing, damaged, of another kind or of a newer version (it is left as
        it was), and where its fingerprint is not ``expect``.
        """
        name = os.fspath(path)
        check_header(name)
        connection = connect(name)
        try:
            fingerprint = check_content(connection, name)
            differences = difference(fingerprint, expect) if expect is not None else ()
            if differences:
                raise SluiceError(
                    f"{name} was measured under other conditions: {'; '.join(differences)}; "
                    f"use those conditions, or choose another file for the new ones"
                )
        except BaseException:
            connection.close()
            raise
        return cls(connection, name, fingerprint)

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str], fingerprint: Fingerprint) -> LatencyTable:
        """The table at ``path`` if there is one (it must have this fingerprint), else a new one."""
        name = os.fspath(path)
        if name != MEMORY:
            sweep(name)
        if name == MEMORY or not exists(name):
            try:
                return cls.create(name, fingerprint)
            except SluiceError:
                if name == MEMORY or not exists(name):
                    raise  # otherwise another process was first
        return cls.open(name, fingerprint)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> LatencyTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of points."""
        return int(self._rows("SELECT count(*) FROM points")[0][0])

    def revision(self) -> tuple[int, int, int]:
        """Another value after every change of points or engines, through this object or by another process."""
        rows = self._rows("SELECT (SELECT count(*) FROM points), (SELECT count(*) FROM engines)")
        return (self._connection.total_changes, *rows[0])

    def get(self, key: str, extents: Sequence[int]) -> Measurement | None:
        rows = self._rows(
            "SELECT ms, spread, samples FROM points WHERE key = ? AND extents = ?", (key, _encode(extents))
        )
        return self._measurement(rows[0]) if rows else None

    def require(self, key: str, extents: Sequence[int]) -> Measurement:
        """`get`, but `SluiceError` with the piece's description where the point is missing."""
        found = self.get(key, extents)
        if found is None:
            raise SluiceError(
                f"{self.path} has no time for {self.description(key) or repr(key)} at extents {tuple(extents)}; "
                f"measure it on {self.fingerprint.device}"
            )
        return found

    def put(self, key: str, extents: Sequence[int], measurement: Measurement) -> None:
        """Record one point, replacing an older one."""
        self.put_many([(key, extents, measurement)])

    def put_many(self, points: Points) -> None:
        """Record all points or, where one of them is refused or cannot be written, none."""
        rows = [(key, _encode(extents), *self._columns(found)) for key, extents, found in points]
        self._write("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?)", rows)

    def points(self, key: str) -> dict[tuple[int, ...], Measurement]:
        """All points of a piece, by extents in increasing order."""
        rows = self._rows("SELECT extents, ms, spread, samples FROM points WHERE key = ?", (key,))
        found = {self._json(tuple[int, ...], row[0]): self._measurement(row[1:]) for row in rows}
        if len({len(at) for at in found}) > 1:
            raise self._damaged(f"the points of {key!r:.60} have unlike extents")
        return dict(sorted(found.items()))

    def keys(self) -> tuple[str, ...]:
        """The pieces that have points."""
        return self._texts(self._rows("SELECT DISTINCT key FROM points ORDER BY key"))

    def _texts(self, rows: Sequence[Any]) -> tuple[str, ...]:
        """The first column, of texts."""
        if wrong := [value for value, *_ in rows if not isinstance(value, str)]:
            raise self._damaged(f"a key is {wrong[0]!r:.60}")
        return tuple(row[0] for row in rows)

    def beyond(self, spread: float, but: str) -> tuple[int, int]:
        """How many points, ``but`` those of one key, and engines have a larger spread."""
        ((points,),) = self._rows("SELECT count(*) FROM points WHERE spread > ? AND key != ?", (spread, but))
        ((engines,),) = self._rows("SELECT count(*) FROM engines WHERE spread > ?", (spread,))
        return points, engines

    def forget(self, spread: float, but: str) -> tuple[int, int]:
        """Remove the points and engines that are `beyond`; how many of each."""
        points, engines = self.beyond(spread, but)
        self._write("DELETE FROM points WHERE spread > ? AND key != ?", [(spread, but)])
        self._write("DELETE FROM engines WHERE spread > ?", [(spread,)])
        return points, engines

    def mark_uncertain(self, spread: float) -> None:
        """Give all points and engines at least this spread."""
        for kind in ("points", "engines"):
            self._write(f"UPDATE {kind} SET spread = max(spread, ?)", [(spread,)])

    def take_over(self, path: str, ratio: float) -> None:
        """Add what the table at ``path`` has of points, descriptions and engines, its times multiplied by ``ratio``.

        Of two times for one point, or one engine, that of the smaller spread stays; of equal ones the present one.
        """
        with translated(self.path):
            self._connection.execute("ATTACH ? AS other", (path,))
            try:
                with transaction(self._connection):
                    for kind, place in (("points", "key, extents"), ("engines", "model_key, widths")):
                        self._connection.execute(TAKE_OVER.format(kind=kind, place=place), (ratio,))
                    self._connection.execute("INSERT OR IGNORE INTO pieces SELECT * FROM other.pieces")
            finally:
                self._connection.execute("DETACH other")

    def describe(self, key: str, text: str) -> None:
        """Say in words which piece it is, as in ``"Conv 3x3 16x28x28 + Relu"``."""
        self.describe_all({key: text})

    def describe_all(self, texts: Mapping[str, str]) -> None:
        self._write("INSERT OR REPLACE INTO pieces VALUES (?, ?)", list(texts.items()))

    def description(self, key: str) -> str:
        """The words that `describe` recorded, or an empty string."""
        return "".join(str(text) for (text,) in self._rows("SELECT text FROM pieces WHERE key = ?", (key,)))

    def put_calibration(self, model_key: str, slope: float, intercept: float, error: Mapping[str, float]) -> None:
        """Record the affine map from the sum of pieces to the whole engine, and its errors by name."""
        if not all(math.isfinite(value) for value in (slope, intercept, *error.values())):
            raise SluiceError(f"the calibration of {model_key!r} is not finite; measure its engines again")
        row = (model_key, float(slope), float(intercept), json.dumps({k: float(v) for k, v in error.items()}))
        self._write("INSERT OR REPLACE INTO calibrations VALUES (?, ?, ?, ?)", [row])

    def get_calibration(self, model_key: str) -> Fit | None:
        """``(slope, intercept, error)``."""
        rows = self._rows("SELECT slope, intercept, error FROM calibrations WHERE model_key = ?", (model_key,))
        if not rows:
            return None
        slope, intercept, error = rows[0]
        if not all(isinstance(value, float) and math.isfinite(value) for value in (slope, intercept)):
            raise self._damaged(f"a calibration is {rows[0][:2]!r:.60}")
        return slope, intercept, self._json(Mapping[str, float], error)

    def put_engine(self, model_key: str, widths: Mapping[str, int], measurement: Measurement) -> None:
        """Record the time of a whole engine at ``widths`` by group."""
        self.put_engines(model_key, [(widths, measurement)])

    def put_engines(self, model_key: str, engines: Iterable[tuple[Mapping[str, int], Measurement]]) -> None:
        """Record all engines or, where one of them is refused or cannot be written, none."""
        rows = []
        for widths, measurement in engines:
            text = json.dumps({group: int(width) for group, width in widths.items()}, sort_keys=True)
            rows.append((model_key, text, *self._columns(measurement)))
        self._write("INSERT OR REPLACE INTO engines VALUES (?, ?, ?, ?, ?)", rows)

    def engines(self, model_key: str) -> list[tuple[dict[str, int], Measurement]]:
        rows = self._rows("SELECT widths, ms, spread, samples FROM engines WHERE model_key = ?", (model_key,))
        return [(self._json(Mapping[str, int], row[0]), self._measurement(row[1:])) for row in rows]

    def networks(self) -> tuple[str, ...]:
        """The model keys that have engines or a calibration."""
        sql = "SELECT model_key FROM engines UNION SELECT model_key FROM calibrations ORDER BY model_key"
        return self._texts(self._rows(sql))

    def put_blob(self, name: str, content: bytes) -> None:
        """Keep ``content`` under ``name``, replacing an older blob."""
        with translated(self.path), transaction(self._connection):
            add_blobs(self._connection)
            self._connection.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (name, content))

    def get_blob(self, name: str) -> bytes | None:
        if name not in self.blobs():
            return None
        return bytes(self._rows("SELECT content FROM blobs WHERE name = ?", (name,))[0][0])

    def blobs(self) -> dict[str, int]:
        """The size in bytes of every blob."""
        if not self._rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'blobs'"):
            return {}
        return dict(self._rows("SELECT name, length(content) FROM blobs ORDER BY name"))

    def _columns(self, measurement: Measurement) -> tuple[float, float, int]:
        if not (math.isfinite(measurement.ms) and math.isfinite(measurement.spread)):
            raise SluiceError(f"a time of {measurement.ms} ms, spread {measurement.spread}, is none; measure again")
        if measurement.clock != self.fingerprint.clock:
            raise SluiceError(
                f"a time by the {measurement.clock} clock does not go into {self.path}, whose clock is "
                f"{self.fingerprint.clock}; use one clock per table"
            )
        return float(measurement.ms), float(measurement.spread), int(measurement.samples)

    def _measurement(self, row: Sequence[Any]) -> Measurement:
        ms, spread, samples = row
        # SQLite lets a value be of any type, and gives NULL for NaN. What times are possible is asked where they count.
        if not all(type(value) in (int, float) for value in (ms, spread)) or type(samples) is not int:
            raise self._damaged(f"a time is {row!r:.60}")
        return Measurement(float(ms), float(spread), samples, self.fingerprint.clock)

    def _json(self, kind: Any, text: object) -> Any:
        """A text of a row as the type that it must have."""
        try:
            return typed(kind, parse(text if isinstance(text, str) else b""))
        except Misfit as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, reason: str) -> SluiceError:
        return SluiceError(
            f"the latency table {self.path} is damaged ({reason}); restore a copy, or remove it and measure again"
        )

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with translated(self.path):
            return self._connection.execute(sql, values).fetchall()

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        with translated(self.path), transaction(self._connection):
            self._connection.executemany(sql, rows)


def _encode(extents: Sequence[int]) -> str:
    return json.dumps([int(extent) for extent in extents], separators=(",", ":"))
