"""One table of several, measured on devices or hosts of the same kind.

1. The fingerprints are equal; the first difference is a reason to refuse.
2. The reference engine, which took part in every measurement (`sluice.profiler.timing.reference_engine`), makes times
   comparable: the times of a table are multiplied by ``reference of the first table / its own``. Hosts whose reference
   engines differ by more than `MAX_RATIO` are not of the same kind.
3. Of two times for one point, or one engine, the one with the smaller relative spread stays; of equal ones the first.
4. A calibration is left behind, since the engines are others now: a profile fits its own to all engines of its table.
   Of two blobs of a name the first stays. The host is that of the first table, whose times the others are brought to.
5. A table with an impossible time is refused: not finite, or negative where no difference of times is recorded. Joints
   are such differences. Pieces are, too, with their sources' time taken out, which may leave less than nothing by the
   noise of the sources; not more than `NOISE` of the time of the reference engine or of the largest source.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sluice.core.drafts import draft_beside
from sluice.core.errors import SluiceError
from sluice.core.files import check_output
from sluice.profiler.sweep.bench import SOURCE_KEY
from sluice.profiler.table.fingerprint import Fingerprint, difference
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.table.table_file import exists
from sluice.profiler.timing.reference_engine import HOST
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY

__all__ = ["Merged", "merge_tables"]

MAX_RATIO = 1.15
NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Merged:
    """The contents of the merged table, and the factor of every table's times."""

    points: int
    engines: int
    ratios: tuple[float, ...]


def merge_tables(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Merged:
    """Write the table ``out``, whole or not at all, from those at ``paths``, in the times of the first.

    Raises:
        SluiceError: the tables do not belong together, one of them is unsound, or ``out`` exists or cannot be written.
    """
    out = Path(out)
    check_output(out, {})
    if exists(str(out)):
        raise SluiceError(f"{str(out)!r} exists already; choose another file to merge into, or remove it")
    if not out.parent.is_dir():
        raise SluiceError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}; choose another folder")
    checked: list[tuple[str, float, bool]] = []  # path, factor, whether the times are in its host's
    first: tuple[str, Fingerprint] | None = None
    reference: float | None = None
    for path in paths:
        with LatencyTable.open(path) as table:
            first = first or (table.path, table.fingerprint)
            if differences := difference(table.fingerprint, first[1]):
                raise SluiceError(
                    f"{table.path} and {first[0]} do not belong together: in {table.path} the {differences[0]}; merge "
                    f"tables of one kind of device and one setting, or compare them with `sluice table diff`"
                )
            own = _reference_ms(table)
            leads = reference is None and own is not None
            reference = reference or own
            ratio = reference / own if reference and own else 1.0
            if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
                raise SluiceError(
                    f"{table.path} is of a host whose reference engine takes {1 / ratio:.2f} times what it takes in "
                    f"{first[0]}, more than {MAX_RATIO}; measure again on a quiet host or one of that kind"
                )
            _check_times(table, own)
            checked.append((table.path, ratio, leads))
    if first is None:
        raise SluiceError("there is no table to merge; give one or more")
    try:
        with draft_beside(out) as folder:
            draft = folder / "table.db"
            with LatencyTable.create(draft, first[1]) as merged:
                for name, ratio, leads in checked:
                    _add(merged, name, ratio, leads)
                engines = sum(len(merged.engines(network)) for network in merged.networks())
                done = Merged(len(merged), engines, tuple(ratio for _, ratio, _ in checked))
            os.replace(draft, out)
    except OSError as error:
        raise SluiceError(f"cannot write {str(out)!r}: {error.strerror or error}; choose another folder") from None
    return done


def _add(merged: LatencyTable, path: str, ratio: float, leads: bool) -> None:
    """Rules 3 and 4."""
    merged.take_over(path, ratio)
    with LatencyTable.open(path) as table:
        for name in table.blobs().keys() - merged.blobs().keys() - (set() if leads else {HOST}):
            merged.put_blob(name, table.get_blob(name) or b"")


def _reference_ms(table: LatencyTable) -> float | None:
    """The time of the reference engine; None for a table without points, which has no times to compare."""
    reference = table.get(REFERENCE_KEY, ())
    if reference is None:
        if len(table):
            raise SluiceError(f"{table.path} does not know its reference engine's time; profile on it once more")
        return None
    if not (math.isfinite(reference.ms) and reference.ms > 0):
        raise SluiceError(
            f"{table.path} holds {reference.ms} ms for its reference engine, which is no time; measure anew"
        )
    return reference.ms


def _check_times(table: LatencyTable, reference_ms: float | None) -> None:
    """Rule 5."""
    largest_source = max((found.ms for found in table.points(SOURCE_KEY).values()), default=0.0)
    for key in table.keys():  # noqa: SIM118 (a table is no mapping)
        least = -math.inf if key.startswith("j") else 0.0
        if reference_ms is not None and key not in (REFERENCE_KEY, SOURCE_KEY):
            least = min(least, -NOISE * max(reference_ms, largest_source))
        for extents, found in table.points(key).items():
            _check(found, least, f"{table.description(key) or repr(key)} at extents {extents}", table.path)
    for network in table.networks():
        for _, found in table.engines(network):
            _check(found, 0.0, f"an engine of network {network}", table.path)


def _check(found: Measurement, least: float, where: str, path: str) -> None:
    if not (math.isfinite(found.ms) and found.ms >= least and math.isfinite(found.spread) and found.spread >= 0):
        raise SluiceError(
            f"{path} holds {found.ms} ms, spread {found.spread}, for {where}, which is no time; measure that table anew"
        )
