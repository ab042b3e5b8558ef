"""The files of a result are all of one run, wherever a process is killed while it saves over an older result."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sluice.artifacts import folder as module
from sluice.artifacts.folder import FILES, check_writable, held, save_together, settle
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.core.plan import Plan
from tests.tiny import files_of


class Killed(BaseException):
    pass


def content(run: int, name: str) -> bytes:
    if name == "plan.json":
        return Plan({"a": (run,)}).to_json().encode()
    if name == "report.json":
        return b'{"version": 6, "budget_ms": %d}' % run
    return b'\x40\0\0\0\0\0\0\0{"%d": 1}' % run if name.endswith("safetensors") else b"\x08\x0a\x12%c%d" % (1, run)


def write(run: int, names: tuple[str, ...]):
    def into(draft: Path) -> None:
        for name in names:
            write_atomically(draft / name, content(run, name))

    return into


FP32 = ("plan.json", "slim.safetensors", "slim.onnx", "report.json")
INT8 = (*FP32, "slim.int8.onnx")


def run_of(folder: Path) -> int | None:
    """Whose files are there, by the reader; None where it refuses them or there are none."""
    found = {name: held(folder / name) for name in FILES if name != "manifest.json"}
    runs = {
        run
        for name, path in found.items()
        if path.exists()
        for run in (1, 2)
        if path.read_bytes() == content(run, name)
    }
    assert len(runs) <= 1
    names = {name for name, path in found.items() if path.exists()}
    assert names == set({1: INT8, 2: FP32}[runs.copy().pop()] if runs else ())
    return runs.pop() if runs else None


def test_killed_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls that change the folder are counted; a run is killed before each of them."""
    save_together(tmp_path / "kept", write(1, INT8))
    moments, seen = 0, []
    while True:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", out)
        with monkeypatch.context() as patch:
            calls = [moments]

            def stopped(own, calls=calls):
                def call(*args, **kwargs):
                    calls[0] -= 1
                    if calls[0] < 0:
                        raise Killed
                    return own(*args, **kwargs)

                return call

            for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "chmod"):
                patch.setattr(os, name, stopped(getattr(os, name)))
            # A process that is killed tidies nothing up, and gives up its locks.
            patch.setattr("sluice.core.drafts.shutil.rmtree", lambda *args, **kwargs: None)
            try:
                save_together(out, write(2, FP32))
                seen.append(run_of(out))
                break
            except Killed:
                pass
        seen.append(run_of(out))
        moments += 1
    assert [run for i, run in enumerate(seen) if not i or run != seen[i - 1]] == [1, 2]
    assert moments > 20
    check_writable(out)
    assert files_of(out).keys() == {*FP32, "manifest.json"} and not any(p.is_dir() for p in out.iterdir())


def test_mixed_files_are_refused(tmp_path: Path) -> None:
    save_together(tmp_path, write(1, FP32))
    (tmp_path / "slim.onnx").write_bytes(content(2, "slim.onnx"))
    held(tmp_path / "plan.json")
    with pytest.raises(SluiceError, match=r"slim\.onnx' is not the file that was saved with the others"):
        held(tmp_path / "slim.onnx")
    (tmp_path / "manifest.json").unlink()
    held(tmp_path / "slim.onnx")  # as of a release without manifests


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "sluice-manifest", "version": 2, "files": {}}', "[" * 9000,
             '{"format": "sluice-manifest", "version": 1, "files": {"../x": "0"}}'],
)  # fmt: skip
def test_damaged_manifests(text: str, tmp_path: Path) -> None:
    save_together(tmp_path, write(1, FP32))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SluiceError, match="is not a readable manifest"):
        held(tmp_path / "plan.json")


def test_a_users_own_files_stay(tmp_path: Path) -> None:
    (tmp_path / ".probe").write_text("mine")
    (tmp_path / "t.db").write_bytes(b"SQLite format 3\0")
    save_together(tmp_path, write(1, FP32))
    assert (tmp_path / ".probe").read_text() == "mine" and (tmp_path / "t.db").exists()
    (tmp_path / "report.json").write_text("my own report")
    with pytest.raises(SluiceError, match=r"report\.json': it is a text, not a report"):
        save_together(tmp_path, write(2, FP32))
    assert (tmp_path / "report.json").read_text() == "my own report"
    assert (tmp_path / "plan.json").read_bytes() == content(1, "plan.json")
    with pytest.raises(SluiceError, match="the latency table itself"):
        check_writable(tmp_path / "new", 0, {"the latency table": tmp_path / "new" / "plan.json"})


def test_no_room_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="cannot write 9,223,372,036,854,775,807 bytes"):
        check_writable(tmp_path, 2**63 - 1)
    assert list(tmp_path.iterdir()) == []


def test_files_keep_their_modes(tmp_path: Path) -> None:
    save_together(tmp_path, write(1, FP32))
    (tmp_path / "plan.json").chmod(0o600)
    save_together(tmp_path, write(2, FP32))
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600
    assert run_of(tmp_path) == 2


def test_a_folder_that_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_together(tmp_path, write(1, FP32))
    (tmp_path / module.COMPLETE).mkdir()
    shutil.copy(tmp_path / "manifest.json", tmp_path / module.COMPLETE)

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(SluiceError, match="Permission denied"):
        settle(tmp_path)
