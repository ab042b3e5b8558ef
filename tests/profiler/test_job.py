"""Job files: they come back as they went, carry all code, and are refused in a sentence where they are not sound."""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path

import pytest

from sluice.core.deployment import UNFIT, Deployment
from sluice.core.errors import SluiceError
from sluice.profiler import job as job_module
from sluice.profiler.job import Job, known_table, read_job, write_job
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from tests.device import chain

SETTINGS = Job(Deployment("tensorrt", 3, 1, "fp16"), ("filter", "rank"), ("conv1", "fc*"))
ABSENT = {"torch", "scipy", "tqdm", "rich", "safetensors", "onnxscript"}


def packed(path: Path, job: Job = SETTINGS, table: bytes | None = None) -> Path:
    assert write_job(path, chain([6, 5], batch="N"), job, table) == path.stat().st_size
    return path


def altered(path: Path, **entries: bytes | None) -> Path:
    """The job with entries replaced, added, or (None) left out; ``__`` stands for a slash."""
    changes = {name.replace("__", "/"): data for name, data in entries.items()}
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {**content, **changes}.items():
            if data is not None:
                file.writestr(name, data)
    return path


def test_a_job_comes_back(tmp_path: Path) -> None:
    path = packed(tmp_path / "job.zip", table=b"a table")
    job, model, table = read_job(path)
    assert job == SETTINGS and model == chain([6, 5], batch="N") and table == b"a table"
    assert read_job(packed(tmp_path / "plain.zip", Job()))[::2] == (Job(), None)
    assert path.read_bytes() == packed(tmp_path / "again.zip", table=b"a table").read_bytes()


def test_it_carries_all_code_and_its_licences(tmp_path: Path) -> None:
    with zipfile.ZipFile(packed(tmp_path / "job.zip")) as file:
        names = set(file.namelist())
        sources = {name: file.read(name).decode() for name in names if name.endswith(".py")}
        for licence in ("site/sluice.LICENSE", "site/onnx_graphsurgeon.LICENSE"):
            assert "Apache License" in file.read(licence).decode()
    assert {"site/sluice/__init__.py", "site/sluice/profiler/agent.py", "site/sluice/runtime/ort/cpu.py"} <= names
    assert {"site/onnx_graphsurgeon/__init__.py", "site/onnx_graphsurgeon/ir/graph.py"} <= names
    for name, source in sources.items():
        tops = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "torch" not in {alias.name.split(".")[0] for n in tops if isinstance(n, ast.Import) for alias in n.names}
        assert "torch" not in {str(n.module).split(".")[0] for n in tops if isinstance(n, ast.ImportFrom)}, name


@pytest.mark.parametrize(("target", "precision"), UNFIT)
def test_what_no_runtime_takes_is_not_packed(target: str, precision: str) -> None:
    with pytest.raises(SluiceError, match=f"^{target} cannot be timed in {precision}: .*; choose fp16, or another"):
        Job(Deployment(target, precision=precision))


def test_a_truncated_or_garbled_job_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "job.zip", table=bytes(range(256)) * 40)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SluiceError, match="is not a job or is damaged"):
            read_job(path)
    with zipfile.ZipFile(packed(path)) as file:
        start = file.getinfo("model.onnx").header_offset + 60
    data = bytearray(path.read_bytes())
    data[start] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SluiceError, match=r"damaged \(Bad CRC-32"):
        read_job(path)
    path.write_text("not a zip file")
    with pytest.raises(SluiceError, match="is not a job"):
        read_job(path)
    with pytest.raises(SluiceError, match="cannot read"):
        read_job(tmp_path / "missing.zip")
    with pytest.raises(SluiceError, match="Is a directory"):
        read_job(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model.onnx": None}, r"it holds no model\.onnx"),
        ({"job.json": None}, r"it holds no job\.json"),
        ({"model.onnx": b"\xff" * 50}, "is damaged"),
        ({"job.json": b"{"}, "are none: it is not JSON"),
        ({"job.json": b"[]"}, r"are none: it is \[\] instead of an object"),
        ({"notes.txt": b""}, r"holds 'notes\.txt', which no job does"),
        ({"..__x.py": b""}, r"holds '\.\./x\.py'"),
        ({"site__..__..__x.py": b""}, r"holds 'site/\.\./\.\./x\.py'"),
        ({"__etc__passwd": b""}, "holds '/etc/passwd'"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, entries: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(SluiceError, match=message):
        read_job(altered(packed(tmp_path / "job.zip"), **entries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "is a job of version 2, this program knows up to 1; use a newer release"),
        ({"format": 0}, "is a job of version 0, which there never was"),
        ({"format": "1"}, 'none: format is "1" instead of'),
        ({"batch": True}, "none: batch is true instead of"),
        ({"batch": 2**70}, "none: batch is"),
        ({"batch": 0}, "batch=0, threads=1 cannot run"),
        ({"methods": ["filter", 3]}, r"none: methods\[1\] is 3 instead of"),
        ({"methods": ["magic"]}, "methods"),
        ({"target": "abacus"}, "no target 'abacus'"),
        ({"precision": "fp8"}, "no precision 'fp8'"),
        ({"target": "torch-cuda", "precision": "int8"}, "torch-cuda cannot be timed in int8: it has no int8 conv"),
        ({"more": 1}, "the unknown 'more'"),
        ({"more": float("nan")}, "settings of the job .* are none"),
    ],
)
def test_unsound_settings_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = packed(tmp_path / "job.zip")
    with zipfile.ZipFile(path) as file:
        settings = json.loads(file.read("job.json"))
    altered(path, **{"job.json": json.dumps({**settings, **change}).encode()})
    with pytest.raises(SluiceError, match=message):
        read_job(path)


def test_entries_that_stand_twice_are_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "job.zip")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("job.json", b"{}")
    with pytest.raises(SluiceError, match=r"holds 'job\.json', which no job does"):
        read_job(path)


def test_nothing_is_written_where_packing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_code", lambda: iter([("x", 3)]))
    with pytest.raises(TypeError):
        packed(tmp_path / "job.zip")
    assert not list(tmp_path.iterdir())


def test_a_known_table_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    LatencyTable.create(path, Fingerprint("any CPU", "ort-cpu", "1.2", 1, "fp32", 3, "thread_cpu")).close()
    assert known_table(path, Job(Deployment(batch=3))) == path.read_bytes()
    with pytest.raises(SluiceError, match="does not fit the job: precision is 'fp32', not 'fp16'; batch is 3, not 1"):
        known_table(path, Job(Deployment(precision="fp16")))
