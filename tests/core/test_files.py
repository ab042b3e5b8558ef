"""Files are replaced by their own kind alone, keep their modes, and leave no drafts of processes that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import helper

from sluice.core.drafts import draft_beside, drafts_of, sweep
from sluice.core.errors import SluiceError
from sluice.core.files import DATA_HEAD, KINDS, check_output, kind_of, write_atomically
from sluice.core.plan import Plan

PLAN = Plan({"a": (3,)}).to_json().encode()


def onnx_bytes() -> bytes:
    return helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()


def test_kinds() -> None:
    heads = [
        b"SQLite format 3\0...",
        b"PK\x03\x04..",
        PLAN,
        b'{"format": "sluice-manifest"',
        b'{"version": 3, "budget_ms": 1',
    ]
    heads += [DATA_HEAD, b"key,description,extents,ms,spread,samples\n", b'\x40\0\0\0\0\0\0\0{"a": 1}', onnx_bytes()]
    assert [kind_of(head) for head in heads] == [name for _, name in KINDS]
    assert kind_of("Grüße".encode() * 900) == "a text"  # whatever letter the head ends in
    assert kind_of(b"\x00\x01\xff\xfe" * 9) == kind_of(b"ftrt\0\0") == "a file of another kind"
    assert kind_of(onnx.ModelProto(ir_version=8, producer_name="x").SerializeToString()) == "an ONNX file"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask_and_stay(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    before = os.umask(mask)
    try:
        write_atomically(path, PLAN)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        for mode in (0o600, 0o664):
            path.chmod(mode)
            write_atomically(path, PLAN)
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "there", [b"my thesis", b"SQLite format 3\0" + bytes(200), b"{}", onnx_bytes(), b"\xff\xfe\0\0"]
)
def test_another_kind_is_left_as_it_was(there: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(there)
    for write in (lambda: write_atomically(path, PLAN), lambda: check_output(path, {}, "a plan")):
        with pytest.raises(SluiceError, match=r"plan\.json': it is .*, not a plan; choose another file"):
            write()
    assert path.read_bytes() == there and os.listdir(tmp_path) == ["plan.json"]


def test_an_empty_file_may_become_anything(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    write_atomically(tmp_path / "plan.json", PLAN)
    assert (tmp_path / "plan.json").read_bytes() == PLAN


def test_links_pipes_devices_and_folders_are_left(tmp_path: Path) -> None:
    target = tmp_path / "own.json"
    target.write_bytes(PLAN)
    (tmp_path / "link.json").symlink_to(target)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (
        ("link.json", "a link to"),
        ("dangling.json", "a link"),
        ("pipe", "a device"),
        ("folder", "a fol"),
    ):
        for write in (lambda p: write_atomically(p, PLAN), lambda p: check_output(p, {})):
            with pytest.raises(SluiceError, match=f"it is {what}"):
                write(tmp_path / name)
    with pytest.raises(SluiceError, match="/dev/null': it is a device"):
        write_atomically("/dev/null", PLAN)
    assert target.read_bytes() == PLAN and (tmp_path / "link.json").is_symlink() and not (tmp_path / "nowhere").exists()


def test_what_the_command_reads_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_bytes())
    os.link(path, tmp_path / "same.onnx")
    for out in (path, tmp_path / "same.onnx", tmp_path / "x" / ".." / "a.onnx"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(SluiceError, match="is the dense network itself"):
            check_output(out, {"the plan": None, "the dense network": path}, "an ONNX file")
    with pytest.raises(SluiceError, match="is the latency table itself"):
        check_output(tmp_path / "new.db", {"the latency table": tmp_path / "new.db"})
    check_output(tmp_path / "b.onnx", {"the dense network": path}, "an ONNX file")


KILLED = """
import sys, time
from sluice.core.drafts import draft_beside
with draft_beside(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"half")
    print(flush=True)
    time.sleep(60)
"""


def test_drafts_of_killed_processes_go(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    sweep(path)
    assert len(drafts_of(path)) == 1  # that process lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(drafts_of(path)) == 1
    own = [
        tmp_path / name
        for name in (".t.db.draft", ".probe", ".t.db.0123.draft", ".x.0123456789abcdef.draft", "t.db.part")
    ]
    for each in own:
        each.mkdir()
    for _ in range(20):  # the lock goes when the process is reaped
        sweep(path)
        if not drafts_of(path):
            break
        time.sleep(0.05)
    assert drafts_of(path) == [] and all(each.is_dir() for each in own)


def test_a_draft_goes_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ("x" * 250)
    with pytest.raises(KeyError), draft_beside(path) as folder:
        sweep(path)
        assert drafts_of(path) == [folder] and folder.is_dir()
        raise KeyError
    assert drafts_of(path) == []
