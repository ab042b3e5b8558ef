"""A killed run loses no finished bursts: the bursts of unfinished points are kept beside the table.

1. The points of a batch take their turns with each other, so a kill finds all of them half done. Every burst is
   appended to a file beside the table, `EVERY` bursts at a time. That is fewer bursts than any point takes
   (``min_bursts`` of `sluice.profiler.timing.measure`), and it is all the timing that a kill costs. The engines of the
   batch are built again.
2. The result of `measure` follows from the reports of its sessions and from its random numbers. So the next run makes
   the killed call once more, with the same seed and limits. Its sessions repeat their reports in the same order, and
   are timed once the reports end. If a call asks for another burst than the one that was kept (another release of this
   program, say), the rest is dropped.
3. A call is known by the names of its sessions, in their order, and by the table's fingerprint and reference engine. So
   the choice of the points that are timed together must follow from the table alone. Several calls in a row stay in the
   file, such as the passes over the engines of a calibration.
4. The file goes when the table has the points, or when another run on this table has them; also when a table is made
   anew, and when points are to be forgotten. One process writes the file. A second process on the same table keeps
   nothing, and neither does a table in memory. Where the file cannot be written nothing is said: a kill then costs the
   batch.
5. Two kinds of points are noted in the table until they are timed again: points whose first time is in doubt until a
   sample of them has been timed again (`sluice.profiler.sweep.bench`, 3), and points that this sample sends back.

Lines of JSON: ``{"names": ...}`` begins a call, ``[seed of the call, session, repeats, milliseconds]`` is a burst.
Reading ends at a line that ends early, or that belongs to no call or to another one than the last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sluice.core.errors import LostLine
from sluice.profiler.table.latency_table import MEMORY, LatencyTable
from sluice.profiler.table.table_file import bursts_of, drop_bursts
from sluice.runtime.base.runner import Clock, Session, turn

__all__ = ["AGAIN", "EVERY", "ONCE", "Call", "Point", "keep_points", "kept", "landed", "points_kept"]

EVERY = 16
ONCE, AGAIN = "points timed once", "points to be timed again"
Point = tuple[str, tuple[int, ...]]  # key and extents
Raw = io.FileIO | io.BytesIO


@dataclass(frozen=True, slots=True)
class Call:
    """A call of `measure` on sessions of these ``names``, ``within`` a table; the rest is the call's own (rule 2)."""

    names: tuple[str, ...]
    within: str
    seed: int
    min_bursts: int
    max_bursts: int
    patience_ms: float

    def like(self, other: Call) -> bool:
        """Rule 3."""
        return (self.names, self.within) == (other.names, other.within)


def landed(table: LatencyTable) -> None:
    """The table has the points, so their bursts are not needed any more (rule 4)."""
    if os.path.isfile(bursts_of(table.path)):
        with _file(table) as file:
            if isinstance(file, io.FileIO):
                drop_bursts(table.path)


@contextlib.contextmanager
def kept(table: LatencyTable, call: Call, sessions: Sequence[Session]) -> Iterator[tuple[Call, tuple[Session, ...]]]:
    """The call to make, ``call`` or the one like it that was killed, and the ``sessions`` for it."""
    with _file(table) as file:
        found = _read(file)
        known = next((each for each in found if each.call.like(call)), None)
        if known is None:
            known = _Found(call, found[-1].end if found else 0)
            log = _Log(file, known, [json.dumps(asdict(call))])
        else:
            log = _Log(file, known)
        try:
            yield known.call, tuple(_Kept(session, k, log) for k, session in enumerate(sessions))
        except LostLine:
            raise
        except Exception:  # the kept reports may be the reason
            log.drop()
            raise
        finally:
            log.save()


def points_kept(table: LatencyTable, name: str) -> set[Point]:
    """The points that a killed call has not timed again, of `ONCE` or `AGAIN` (rule 5)."""
    return {(key, tuple(extents)) for key, extents in json.loads(table.get_blob(name) or b"[]")}


def keep_points(table: LatencyTable, name: str, points: Collection[Point]) -> None:
    """Note ``points`` in the table, for `points_kept`."""
    if points:
        table.put_blob(name, json.dumps(sorted(points)).encode())
    else:
        table.drop_blob(name)


def _file(table: LatencyTable) -> Raw:
    """The file, locked, or one in memory where that cannot be."""
    if table.path != MEMORY:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = io.FileIO(bursts_of(table.path), "a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
            else:
                return file
    return io.BytesIO()


@dataclass(slots=True)
class _Found:
    """A call in the file: the offset behind its first line, its bursts, and the offset behind each of them."""

    call: Call
    begin: int
    bursts: deque[tuple[int, int, float, int]] = field(default_factory=deque)

    @property
    def end(self) -> int:
        return self.bursts[-1][-1] if self.bursts else self.begin


def _read(file: Raw) -> list[_Found]:
    found: list[_Found] = []
    at = file.seek(0)
    *lines, _ = (file.read() or b"").split(b"\n")
    for line in lines:
        at += len(line) + 1
        try:
            content = json.loads(line)
            if isinstance(content, dict):
                found.append(_Found(Call(**{**content, "names": tuple(content["names"])}), at))
                continue
            seed, session, repeats, ms = content
        except (ValueError, TypeError, KeyError):
            break
        if not found or seed != found[-1].call.seed:
            break
        found[-1].bursts.append((session, repeats, ms, at))
    return found


class _Log:
    """The bursts of a call: first those that were kept, then those of its sessions, which it keeps."""

    def __init__(self, file: Raw, known: _Found, lines: Sequence[str] = ()) -> None:
        self._file: Raw | None = file
        self._seed, self._begin, self._offset = known.call.seed, known.begin, known.begin
        self._bursts, self._lines = known.bursts, list(lines)

    def sample(self, session: Session, index: int, repeats: int) -> float:
        known = self._known(index, repeats)
        return self._keep(index, repeats, session.sample(repeats)) if known is None else known

    def turn(self, session: Session, index: int, repeats: int, count: int) -> list[float]:
        """Bursts in a row, of a session that takes them at once; of another each is kept as it comes."""
        if getattr(session, "turn", None) is None:
            return [self.sample(session, index, repeats) for _ in range(count)]
        known = [ms for _ in range(count) if (ms := self._known(index, repeats)) is not None]
        left = count - len(known)
        new = turn(session, repeats, left) if left else []
        return known + [self._keep(index, repeats, ms) for ms in new]

    def _known(self, index: int, repeats: int) -> float | None:
        if self._bursts:
            *burst, ms, end = self._bursts.popleft()
            if burst == [index, repeats]:
                self._offset = end
                return float(ms)
            self._bursts.clear()
        return None

    def _keep(self, index: int, repeats: int, ms: float) -> float:
        self._lines.append(json.dumps([self._seed, index, repeats, ms]))
        if len(self._lines) >= EVERY:
            self.save()
        return ms

    def save(self) -> None:
        """Write the new bursts behind the valid ones, as long as the file can be written."""
        lines, self._lines = self._lines, []
        if self._file is not None and lines:
            content = "".join(f"{line}\n" for line in lines).encode()
            try:
                self._file.seek(self._offset)
                self._file.truncate()
                whole = self._file.write(content) == len(content)
            except OSError:
                whole = False
            self._offset += len(content)
            self._file = self._file if whole else None

    def drop(self) -> None:
        """Forget the bursts of this call and of all calls after it."""
        self._lines.clear()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._begin)


class _Kept:
    """A session that repeats its bursts in the log before it is timed."""

    def __init__(self, session: Session, index: int, log: _Log) -> None:
        self._session, self._index, self._log = session, index, log

    @property
    def clock(self) -> Clock:
        return self._session.clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._session.run(feeds)

    def sample(self, repeats: int) -> float:
        return self._log.sample(self._session, self._index, repeats)

    def turn(self, repeats: int, count: int) -> list[float]:
        return self._log.turn(self._session, self._index, repeats, count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
