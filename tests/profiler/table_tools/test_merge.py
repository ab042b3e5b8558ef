"""Tables of several hosts become one: comparable times, the quieter one of two, nothing foreign or poisoned."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.core.errors import SluiceError
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.table_tools.merge import MAX_RATIO, merge_tables
from sluice.profiler.timing.reference_engine import HOST
from sluice.profiler.timing.reference_engine import KEY as REFERENCE

ORIGIN = Fingerprint("Some CPU", "ort-cpu", "1.2.3", 1, "fp32", 8, "thread_cpu")
Points = Mapping[tuple[str, tuple[int, ...]], tuple[float, float]]


def found(ms: float, spread: float = 0.01) -> Measurement:
    return Measurement(ms, spread, 40, "thread_cpu")


def made(path: Path, points: Points, reference: float | None = 0.25, origin: Fingerprint = ORIGIN) -> Path:
    with LatencyTable.create(path, origin) as table:
        if reference is not None:
            table.put(REFERENCE, (), found(reference))
        table.put_many((key, at, found(*time)) for (key, at), time in points.items())
    return path


def test_the_quieter_time_stays_in_the_times_of_the_first_table(tmp_path: Path) -> None:
    a = made(tmp_path / "a.db", {("p", (3, 5)): (1.0, 0.02), ("p", (7, 5)): (2.0, 0.01), ("q", ()): (3.0, 0.03)})
    b = made(
        tmp_path / "b.db", {("p", (3, 5)): (1.5, 0.01), ("p", (7, 5)): (9.0, 0.01), ("r", (2,)): (4.0, 0.0)}, 0.275
    )
    with LatencyTable.open(b) as table:
        table.describe("r", "Conv 3x3")
        table.describe("p", "Gemm")
    done = merge_tables([a, b], tmp_path / "all.db")
    scale = 0.25 / 0.275
    assert (done.points, done.engines, done.ratios) == (5, 0, (1.0, pytest.approx(scale)))
    with LatencyTable.open(tmp_path / "all.db", ORIGIN) as table:
        assert table.points("p") == {(3, 5): found(1.5 * scale, 0.01), (7, 5): found(2.0, 0.01)}
        assert table.require("q", ()) == found(3.0, 0.03) and table.require("r", (2,)) == found(4.0 * scale, 0.0)
        assert table.require(REFERENCE, ()).ms == 0.25
        assert (table.description("r"), table.description("p"), table.description("q")) == ("Conv 3x3", "Gemm", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.db", "all.db", "b.db"]
    # A table of its own, twice, is itself.
    merge_tables([tmp_path / "all.db", tmp_path / "all.db"], tmp_path / "twice.db")
    with LatencyTable.open(tmp_path / "all.db") as one, LatencyTable.open(tmp_path / "twice.db") as other:
        assert [one.points(key) for key in one.keys()] == [other.points(key) for key in other.keys()]  # noqa: SIM118


def test_the_host_is_that_of_the_times(tmp_path: Path) -> None:
    a, b, c = (made(tmp_path / f"{name}.db", {}, ms) for name, ms in (("a", 0.25), ("b", 0.26), ("c", None)))
    for path in (b, c):
        with LatencyTable.open(path) as table:
            table.put_blob(HOST, path.stem.encode())
    for number, (paths, host) in enumerate((((a, b), None), ((b, a), b"b"), ((c, a, b), None), ((c, b, a), b"b"))):
        merge_tables(paths, tmp_path / f"{number}.db")
        with LatencyTable.open(tmp_path / f"{number}.db") as table:
            assert table.get_blob(HOST) == host


def test_engines_and_blobs_without_calibrations(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a.db", {}), made(tmp_path / "b.db", {}, 0.24)
    with LatencyTable.open(a) as table:
        table.put_engine("net", {"g": 5, "h": 2}, found(2.0, 0.02))
        table.put_engine("net", {"g": 9, "h": 2}, found(3.0, 0.01))
        table.put_calibration("net", 0.9, 0.1, {"median_abs_err": 0.02, "n": 7.0})
        table.put_blob("cache", b"first")
    with LatencyTable.open(b) as table:
        table.put_engine("net", {"h": 2, "g": 5}, found(2.4, 0.01))
        table.put_engine("other", {}, found(4.8))
        table.put_calibration("net", 0.8, 0.24, {"median_abs_err": 0.01, "n": 9.0})
        table.put_blob("cache", b"second")
        table.put_blob("more", b"\0\1")
    assert merge_tables([a, b], tmp_path / "all.db").engines == 3
    with LatencyTable.open(tmp_path / "all.db") as table:
        assert table.networks() == ("net", "other")
        engines = {tuple(sorted(widths.items())): m for widths, m in table.engines("net")}
        assert engines[("g", 9), ("h", 2)] == found(3.0, 0.01)
        assert engines[("g", 5), ("h", 2)].ms == pytest.approx(2.5) and engines[("g", 5), ("h", 2)].spread == 0.01
        assert table.get_calibration("net") is None  # of fewer engines than there are now
        assert table.get_blob("cache") == b"first" and table.get_blob("more") == b"\0\1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "Other CPU", "batch": 1}, r"in .*b\.db the device is 'Other CPU', not 'Some CPU'; merge"),
        ({"precision": "fp16"}, "the precision is 'fp16', not 'fp32'"),
        ({"threads": 2}, "the threads is 2, not 1"),
    ],
)
def test_other_conditions_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    a = made(tmp_path / "a.db", {})
    b = made(tmp_path / "b.db", {}, origin=replace(ORIGIN, **change))  # type: ignore[arg-type]
    with pytest.raises(SluiceError, match=message):
        merge_tables([a, b], tmp_path / "all.db")
    assert not (tmp_path / "all.db").exists()


def test_hosts_too_far_apart_are_refused(tmp_path: Path) -> None:
    a, near = made(tmp_path / "a.db", {}), made(tmp_path / "near.db", {}, 0.249 * MAX_RATIO)
    merge_tables([a, near], tmp_path / "fine.db")
    for k, ms in enumerate((0.251 * MAX_RATIO, 0.249 / MAX_RATIO)):
        far = made(tmp_path / f"far{k}.db", {}, ms)
        with pytest.raises(SluiceError, match=r"far\d.db is of a host whose reference engine takes \d\.\d+ times"):
            merge_tables([a, far], tmp_path / "all.db")
    nowhere = made(tmp_path / "nowhere.db", {("p", ()): (1.0, 0.01)}, None)
    with pytest.raises(SluiceError, match=r"nowhere.db does not know its reference engine's time; profile on it"):
        merge_tables([a, nowhere], tmp_path / "all.db")
    empty = made(tmp_path / "empty.db", {}, None)  # a shard that was killed before its first measurement
    assert merge_tables([empty, a], tmp_path / "all.db").points == 1


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE points SET ms = -1.0 WHERE key = 'p'",
            r"holds -1\.0 ms, .* for Conv 3x3 at extents \(3,\), which is no",
        ),
        ("UPDATE points SET ms = 9e999 WHERE key = 'p'", "holds inf ms"),
        ("UPDATE points SET spread = -9e999 WHERE key = 'p'", "spread -inf"),
        ("UPDATE points SET ms = -9e999 WHERE key = 'j1'", "holds -inf ms, .* for 'j1'"),
        ("UPDATE points SET ms = -1e-9 WHERE key = 'source-v4'", "for 'source-v4'"),
        ("UPDATE points SET ms = 0.0 WHERE key = 'anchor-v1'", "holds 0.0 ms for its reference engine"),
        ("UPDATE engines SET ms = -1e-9", "for an engine of network net"),
    ],
)
def test_poison_is_refused(tmp_path: Path, statement: str, message: str) -> None:
    a = made(tmp_path / "a.db", {("p", (3,)): (1.0, 0.01)})
    # Differences of times may be negative: joints, and by their noise pieces without their sources.
    sound = {("p", (3,)): (-0.001, 0.01), ("j1", ()): (-0.2, 0.01), ("source-v4", (2,)): (0.01, 0.01)}
    b = made(tmp_path / "b.db", sound)
    with LatencyTable.open(b) as table:
        table.describe("p", "Conv 3x3")
        table.put_engine("net", {"g": 1}, found(1.0))
    merge_tables([a, b], tmp_path / "fine.db")
    connection = sqlite3.connect(b)
    assert connection.execute(statement).rowcount == 1
    connection.commit()
    connection.close()
    with pytest.raises(SluiceError, match=message):
        merge_tables([a, b], tmp_path / "all.db")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.db", "b.db", "fine.db"]


def test_files(tmp_path: Path) -> None:
    a = made(tmp_path / "a.db", {})
    before = a.read_bytes()
    with pytest.raises(SluiceError, match="exists already"):
        merge_tables([a], a)
    with pytest.raises(SluiceError, match="cannot write"):
        merge_tables([a], tmp_path / "no" / "all.db")
    with pytest.raises(SluiceError, match=r"missing\.db: No such file"):
        merge_tables([a, tmp_path / "missing.db"], tmp_path / "all.db")
    with pytest.raises(SluiceError, match="no table to merge"):
        merge_tables([], tmp_path / "all.db")
    assert a.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.db"]
