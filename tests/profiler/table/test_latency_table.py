from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.core.errors import SluiceError
from sluice.profiler.table import latency_table as table_module
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.table.table_file import check_content

GOLDEN = Path(__file__).parents[2] / "golden" / "table-v1.sqlite"
ORIGIN = Fingerprint("Some CPU", "onnxruntime", "1.2.3", 1, "fp32", 8, "thread_cpu")


def found(ms: float) -> Measurement:
    return Measurement(ms, 0.01, 40, "thread_cpu")


def with_weights(path: Path) -> Path:
    with LatencyTable.create(path, ORIGIN) as table:
        table.put_many((f"piece {i % 5}", (i, 3), found(1.0 + i)) for i in range(900))
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with LatencyTable.create(path, ORIGIN) as table:
        assert len(table) == 0 and table.keys() == ()
        table.put("b", (16, 9), found(1.5))
        table.put_many(
            [("a", (), found(0.5)), ("b", (5, 11), found(0.1 + 0.2)), ("b", tuple(np.array([16, 3])), found(2.5))]
        )
        table.put("b", (16, 9), found(1.25))
        table.describe("b", "first words")
        table.describe("b", "Conv 3x3 16x28x28 + Relu")
        table.put_calibration("net", 0.9, -0.01, {"median": 0.016, "p95": 0.043})
        table.put_engine("net", {"g": 16, "f": 5}, found(7.0))
        table.put_engine("net", {"f": 5, "g": 16}, found(6.0))
        table.put_engine("net", {}, found(9.0))
        table.put_engine("other", {"g": 1}, found(1.0))
    with LatencyTable.open(path, ORIGIN) as table:
        assert table.fingerprint == ORIGIN and len(table) == 4 and table.keys() == ("a", "b")
        assert table.get("a", ()) == found(0.5)
        assert table.points("b") == {(5, 11): found(0.1 + 0.2), (16, 3): found(2.5), (16, 9): found(1.25)}
        assert list(table.points("b")) == [(5, 11), (16, 3), (16, 9)]
        assert table.get("b", (9, 16)) is None and table.points("c") == {}
        assert table.description("b") == "Conv 3x3 16x28x28 + Relu" and table.description("a") == ""
        assert table.get_calibration("net") == (0.9, -0.01, {"median": 0.016, "p95": 0.043})
        assert table.get_calibration("other") is None
        engines = {tuple(sorted(widths.items())): m for widths, m in table.engines("net")}
        assert engines == {(("f", 5), ("g", 16)): found(6.0), (): found(9.0)}
    assert [p.name for p in tmp_path.iterdir()] == ["table.db"]


def some_points(count: int) -> st.SearchStrategy[dict[tuple[int, ...], float]]:
    """Of one piece, with so many extents."""
    return st.dictionaries(st.tuples(*[st.integers(0, 2**40)] * count), st.floats(1e-9, 1e9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=20), st.integers(0, 4).flatmap(some_points), max_size=4))
def test_any_key_and_extents_come_back(pieces: dict[str, dict[tuple[int, ...], float]]) -> None:
    values = {(key, extents): ms for key, points in pieces.items() for extents, ms in points.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.db"
        with LatencyTable.create(path, ORIGIN) as table:
            table.put_many((key, extents, found(ms)) for (key, extents), ms in values.items())
        with LatencyTable.open(path) as table:
            assert len(table) == len(values) and set(table.keys()) == {key for key, _ in values}
            for (key, extents), ms in values.items():
                assert table.require(key, extents) == found(ms)
                assert table.points(key)[extents] == found(ms)


def test_a_table_in_memory() -> None:
    with LatencyTable.open_or_create(":memory:", ORIGIN) as table:
        table.put("a", (3,), found(1.0))
        assert table.get("a", (3,)) == found(1.0)
    assert not Path(":memory:").exists()


def test_open_or_create(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    path.touch()
    with LatencyTable.open_or_create(path, ORIGIN) as table:
        table.put("a", (3,), found(1.0))
    with LatencyTable.open_or_create(path, ORIGIN) as table:
        assert len(table) == 1
    with pytest.raises(SluiceError, match="exists already"):
        LatencyTable.create(path, ORIGIN)
    with pytest.raises(SluiceError, match=r"missing\.db: No such file"):
        LatencyTable.open(tmp_path / "missing.db")
    with pytest.raises(SluiceError, match="Is a directory"):
        LatencyTable.open_or_create(tmp_path, ORIGIN)


def test_a_table_is_made_with_its_folder_and_a_mistake_names_the_path_that_was_given(tmp_path: Path) -> None:
    with_weights(tmp_path / "new" / "folder" / "t.db")
    (tmp_path / "file").touch()
    with pytest.raises(SluiceError, match=re.escape(f"cannot write '{tmp_path / 'file' / 't.db'}': ")):
        LatencyTable.create(tmp_path / "file" / "t.db", ORIGIN)


def _no_link(*_: object) -> None:
    raise PermissionError(1, "no hard links here")


def test_of_two_that_begin_a_table_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is done between the look for a table and the move of the draft."""
    path, theirs = tmp_path / "t.db", with_weights(tmp_path / "theirs.db")
    move = table_module.place

    def late(draft: Path, name: str) -> None:
        if not os.path.exists(name):
            os.link(theirs, name)
        move(draft, name)

    monkeypatch.setattr(table_module, "place", late)
    with LatencyTable.open_or_create(path, ORIGIN) as table:
        assert len(table) == 900
    path.unlink()
    with pytest.raises(SluiceError, match="cannot create"):
        LatencyTable.create(path, ORIGIN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.db", "theirs.db"]


def test_where_there_are_no_hard_links_a_table_is_made_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_link)
    with_weights(tmp_path / "t.db")
    assert [file.name for file in tmp_path.iterdir()] == ["t.db"]


def test_what_a_kill_left_where_nothing_can_be_written_is_not_called_damage(tmp_path: Path) -> None:
    class Closed:
        def execute(self, _: str) -> None:
            raise sqlite3.OperationalError("unable to open database file")

    name, connection = str(with_weights(tmp_path / "t.db")), cast(sqlite3.Connection, Closed())
    with pytest.raises(SluiceError, match="is damaged"):
        check_content(connection, name)
    Path(f"{name}-journal").touch()
    with pytest.raises(SluiceError, match="make the file and its folder writable, or copy it together with"):
        check_content(connection, name)


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    before = path.read_bytes()
    other = replace(ORIGIN, device="Other CPU", batch=1)
    message = "device is 'Some CPU', not 'Other CPU'; batch is 8, not 1; use those conditions, or choose another file"
    for way in (LatencyTable.open, LatencyTable.open_or_create):
        with pytest.raises(SluiceError, match=message):
            way(path, other)
    assert path.read_bytes() == before


def damaged(kind: str, path: Path) -> None:
    if kind == "text":
        path.write_text("ms = 1\n" * 50)
    elif kind == "short":
        path.write_bytes(b"SQLite format 3\0")
    elif kind == "foreign":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE points (x)")
        connection.close()
    else:
        with_weights(path)
        data = bytearray(path.read_bytes())
        if kind == "truncated":
            data = data[: len(data) // 2]
        elif kind == "cut inside a page":
            data = data[:-100]
        elif kind == "garbled":
            data[4096:-4096] = b"\xa5" * (len(data) - 8192)
        elif kind == "newer":
            data[60:64] = (3).to_bytes(4, "big")
        elif kind == "no schema":
            path.unlink()
            connection = sqlite3.connect(path)
            connection.execute(f"PRAGMA application_id = {int.from_bytes(data[68:72], 'big')}")
            connection.execute("CREATE TABLE fingerprint (json)")
            connection.close()
            return
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is not a latency table"),
        ("short", "is not a latency table"),
        ("foreign", "is not a latency table"),
        ("truncated", "is damaged"),
        ("cut inside a page", "is damaged"),
        ("garbled", "is damaged"),
        ("no schema", "holds the table"),
        ("newer", "is of version 3, this program knows up to 2"),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "table.db"
    damaged(kind, path)
    before = path.read_bytes()
    for way in (LatencyTable.open, LatencyTable.open_or_create):
        with pytest.raises(SluiceError, match=message):
            way(path, ORIGIN)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damage_found_while_reading_is_the_users_error(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    with LatencyTable.open(path) as table:
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xa5" * (len(data) - 4096)
        path.write_bytes(data)
        # Forget the pages that opening has read.
        table._connection.execute("PRAGMA shrink_memory")
        with pytest.raises(SluiceError, match="is damaged"):
            table.points("piece 1")


def test_names_that_are_no_text_are_damage(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE points", b"CREATE TABLE p\xe8ints", 1))
    with pytest.raises(SluiceError, match="damaged"):
        LatencyTable.open(path)


def test_points_of_unlike_extents_are_damage(tmp_path: Path) -> None:
    with LatencyTable.open(with_weights(tmp_path / "table.db")) as table:
        table._connection.execute("INSERT INTO points VALUES ('piece 1', '[3, 4, 5, 6, 7]', 1.0, 0.0, 3)")
        with pytest.raises(SluiceError, match="'piece 1' have unlike extents"):
            table.points("piece 1")


def test_a_full_disk_keeps_what_was_recorded(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    with LatencyTable.open(path) as table:
        (pages,) = table._connection.execute("PRAGMA page_count").fetchone()
        table._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(SluiceError, match=r"full; what was recorded before is kept; make room on the disk"):
            table.put_many(("new", (i,), found(1.0)) for i in range(5000))
        assert len(table) == 900 and table.points("new") == {}
        table._connection.execute(f"PRAGMA max_page_count = {pages + 900}")
        table.put("new", (1,), found(1.0))
    with LatencyTable.open(path) as table:
        assert len(table) == 901


def test_a_read_only_table_can_be_read(tmp_path: Path) -> None:
    with LatencyTable.open(with_weights(tmp_path / "table.db")) as table:
        table._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(SluiceError, match=r"readonly.*what was recorded before is kept; make the file"):
            table.put("a", (1,), found(1.0))
        assert table.get("piece 1", (1, 3)) == found(2.0)


def test_a_batch_is_recorded_whole_or_not_at_all(tmp_path: Path) -> None:
    with LatencyTable.create(tmp_path / "table.db", ORIGIN) as table:
        for bad in (float("nan"), float("inf")):
            with pytest.raises(SluiceError, match="measure again"):
                table.put_many([("a", (1,), found(1.0)), ("a", (2,), found(bad))])
        with pytest.raises(SluiceError, match="a time by the wall clock does not go into"):
            table.put_many([("a", (1,), found(1.0)), ("a", (2,), Measurement(1.0, 0.0, 1, "wall"))])
        with pytest.raises(SluiceError, match="not finite"):
            table.put_calibration("net", float("nan"), 0.0, {})
        assert len(table) == 0


def test_a_missing_point_is_described(tmp_path: Path) -> None:
    with LatencyTable.create(tmp_path / "table.db", ORIGIN) as table:
        table.describe("4f2a", "Conv 3x3 16x28x28 + Relu")
        with pytest.raises(SluiceError, match=r"no time for Conv 3x3 16x28x28 \+ Relu at extents \(16, 5\); measure"):
            table.require("4f2a", (16, 5))
        with pytest.raises(SluiceError, match="no time for '77'"):
            table.require("77", ())


WRITER = """
import sys
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.table.latency_table import LatencyTable
table = LatencyTable.open(sys.argv[1])
def points(batch):
    for i in range(7):
        yield f"batch {batch}", (i,), Measurement(1.0 + i, 0.01, 40, "thread_cpu")
for batch in range(10**6):
    table.put_many(points(batch))
    print(batch, flush=True)
"""

HALF_WRITER = """
import sys
from sluice.profiler.table.latency_table import LatencyTable
table = LatencyTable.open(sys.argv[1])
connection = table._connection
# A cache of one page makes SQLite write into the file before the transaction ends.
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM points")
for i in range(3000):
    connection.execute("INSERT INTO points VALUES ('half', ?, 1.0, 0.0, 1)", (f"[{i}]",))
print("in flight", flush=True)
sys.stdin.read()
"""


def start(script: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def kill(process: subprocess.Popen[str]) -> str:
    process.kill()
    assert process.stdout is not None and process.stdin is not None
    rest = process.stdout.read()  # communicate() would lose what readline() has buffered
    process.stdin.close()
    process.wait()
    process.stdout.close()
    assert process.returncode in (-signal.SIGKILL, 1)
    return rest


def test_a_killed_sweep_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    LatencyTable.create(path, ORIGIN).close()
    process = start(WRITER, path)
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(5)]
    rest = kill(process)
    reported = len(seen) + rest.count("\n")
    with LatencyTable.open_or_create(path, ORIGIN) as table:
        batches = table.keys()
        # The last batch may have been committed and not yet reported.
        assert len(batches) in (reported, reported + 1)
        assert all(len(table.points(key)) == 7 for key in batches)
        table.put("after", (1,), found(1.0))
        assert len(table) == 7 * len(batches) + 1


def test_a_transaction_killed_half_way_is_undone(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    before = path.read_bytes()
    process = start(HALF_WRITER, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "in flight\n"
    kill(process)
    assert path.read_bytes() != before
    with LatencyTable.open(path, ORIGIN) as table:
        assert len(table) == 900 and table.points("half") == {}
        assert table.get("piece 1", (1, 3)) == found(2.0)


def test_the_golden_table_loads(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    path.write_bytes(GOLDEN.read_bytes())
    with LatencyTable.open(path, ORIGIN) as table:
        assert table.keys() == ("conv", "gemm") and len(table) == 3
        assert table.points("conv") == {
            (3, 16): Measurement(0.25, 0.0125, 40, "thread_cpu"),
            (5, 11): Measurement(0.5, 0.03, 160, "thread_cpu"),
        }
        assert table.require("gemm", ()) == Measurement(0.0625, 0.0, 41, "thread_cpu")
        assert table.description("conv") == "Conv 3x3 16x28x28 + Relu"
        assert table.get_calibration("net") == (0.875, 0.125, {"median": 0.015625})
        assert table.engines("net") == [({"g": 5, "h": 16}, Measurement(2.5, 0.01, 80, "thread_cpu"))]


def test_blobs(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with LatencyTable.create(path, ORIGIN) as table:
        assert table.blobs() == {} and table.get_blob("timing cache") is None
        table.put_blob("timing cache", b"\0\xff" * 5000)
        table.put_blob("timing cache", b"\0\xfe" * 4000)
        table.put_blob("empty", b"")
    with LatencyTable.open(path) as table:
        assert table.blobs() == {"empty": 0, "timing cache": 8000}
        assert table.get_blob("timing cache") == b"\0\xfe" * 4000 and table.get_blob("empty") == b""


def version(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[60:64], "big")


def test_a_table_of_version_1_becomes_version_2_with_its_first_blob(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    path.write_bytes(GOLDEN.read_bytes())
    assert version(path) == 1
    with LatencyTable.open(path, ORIGIN) as table:
        assert table.blobs() == {} and table.get_blob("timing cache") is None
        table.put("conv", (9, 9), found(1.0))
    assert version(path) == 1
    with LatencyTable.open(path, ORIGIN) as table:
        table.put_blob("timing cache", b"abc")
    assert version(path) == 2
    with LatencyTable.open(path, ORIGIN) as table:
        assert table.get_blob("timing cache") == b"abc" and len(table) == 4
        table.put_blob("timing cache", b"abcd")
        assert table.blobs() == {"timing cache": 4} and table.networks() == ("net",)
    assert version(with_weights(tmp_path / "new.db")) == 1


def test_a_version_2_without_its_blobs_is_damaged(tmp_path: Path) -> None:
    path = with_weights(tmp_path / "table.db")
    with LatencyTable.open(path) as table:
        table.put_blob("timing cache", b"abc")
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE blobs")
    connection.close()
    with pytest.raises(SluiceError, match="is damaged"):
        LatencyTable.open(path)


PROGRAMS = [
    "CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c",
    "CREATE TRIGGER t AFTER INSERT ON points BEGIN DELETE FROM points; END",
    "CREATE TABLE mine (x)",
    "CREATE INDEX i ON points (ms)",
    "ALTER TABLE points ADD COLUMN more TEXT",
    "DROP TABLE points; CREATE VIEW points AS SELECT 'a' AS key, '[]' AS extents, 1.0 AS ms, 0.1 AS spread, 1 AS n",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_views_and_triggers_are_refused(program: str, tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    LatencyTable.create(path, ORIGIN).close()
    connection = sqlite3.connect(path)
    connection.executescript(program)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(SluiceError, match="which no latency table does"):
        LatencyTable.open(path)
    assert path.read_bytes() == before


ROWS = [
    ("points", ("k", "[1", 1.0, 0.1, 3)),
    ("points", ("k", "{}", 1.0, 0.1, 3)),
    ("points", ("k", "[1.5]", 1.0, 0.1, 3)),
    ("points", ("k", b"[1]", 1.0, 0.1, 3)),
    ("points", ("k", "[1]", "fast", 0.1, 3)),
    ("points", ("k", "[1]", b"x", 0.1, 3)),
    ("points", ("k", "[1]", 1.0, "wide", 3)),
    ("points", ("k", "[1]", 1.0, 0.1, "many")),
    ("points", (b"k", "[1]", 1.0, 0.1, 3)),
    ("engines", ("k", "[1]", 1.0, 0.1, 3)),
    ("engines", ("k", '{"a": "b"}', 1.0, 0.1, 3)),
    ("engines", ("k", "{}", 1.0, 0.1, 2.5)),
    ("calibrations", ("k", "x", 1.0, "{}")),
    ("calibrations", ("k", 1.0, 1.0, "[]")),
    ("calibrations", ("k", 1.0, 1.0, "NaN")),
]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=range(len(ROWS)))
def test_rows_of_other_types_are_told(table: str, row: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    LatencyTable.create(path, ORIGIN).close()
    connection = sqlite3.connect(path)
    connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    connection.commit()
    connection.close()
    with LatencyTable.open(path) as opened, pytest.raises(SluiceError, match="is damaged"):
        for key in (*opened.keys(), *opened.networks()):
            opened.points(key), opened.engines(key), opened.get_calibration(key)


def test_a_journal_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    path, own = tmp_path / "t.db", tmp_path / "thesis"
    LatencyTable.create(path, ORIGIN).close()
    own.write_text("mine")
    (tmp_path / "t.db-journal").symlink_to(own)
    with pytest.raises(SluiceError, match=r"t\.db-journal is a link"):
        LatencyTable.open(path)
    assert own.read_text() == "mine" and (tmp_path / "t.db-journal").is_symlink()
