"""A job on a device that has numpy, onnx and a runtime, and nothing else: other packages cannot be imported here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from sluice.core.deployment import Deployment
from sluice.profiler.agent import main
from sluice.profiler.job import Job, write_job
from sluice.profiler.profile import fingerprint_here, profile_onnx
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import METHODS
from tests import tiny
from tests.device import FINGERPRINT, chain

ROOT = Path(__file__).parents[2]
# Runs a job as ``python job.zip`` does, with only what the device has. The simulated device stands for the runtime.
DEVICE = """
import importlib.abc, runpy, sys
absent = {"torch", "torchvision", "scipy", "onnxscript", "onnx_ir", "tqdm", "rich", "safetensors", "timm"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
job, root, simulated, *rest = sys.argv[1:]
sys.argv = [job, *rest]
sys.path.insert(0, job + "/site")
import sluice.profiler.profile as profile
if simulated == "simulated":
    sys.path.append(root)
    from tests.device import FakeRunner, staircase
    runner = FakeRunner(staircase(8))
    import sluice.profiler.view as view
    for module in (profile, view):
        module.make_runner = lambda target, threads=1: runner
status = 0
try:
    runpy.run_path(job, run_name="__main__")
except SystemExit as error:
    status = error.code
import onnx_graphsurgeon
for module in (profile, onnx_graphsurgeon):
    assert module.__file__.startswith(job), module.__file__
assert not absent & set(sys.modules)
sys.exit(status)
"""


def on_device(job: Path, *arguments: object, simulated: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DEVICE, job, ROOT, "simulated" if simulated else "real", *arguments]
    return subprocess.run([*map(str, command)], cwd=job.parent, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def residual() -> onnx.ModelProto:

    return tiny.residual_onnx()


def test_all_methods_without_any_other_package(tmp_path: Path, residual: onnx.ModelProto) -> None:
    """The tables are those of a run with all packages, and so is what is said, but for what needs a solver."""
    write_job(tmp_path / "job.zip", residual, Job(Deployment(batch=2), methods=METHODS))
    done = on_device(tmp_path / "job.zip", "-o", "t.db", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["least_ms"] is None and data["error"]["p95_abs_err"] < 0.05
    assert data["ranks"] and data["blocks"] == ["block1", "block2"] and data["merges"]
    assert "profile: engines 24/24, took" in done.stderr

    again = on_device(tmp_path / "job.zip", "-o", "t.db", "--quiet")
    assert again.returncode == 0 and again.stderr == ""
    dense = f"dense {data['dense_ms']:.4g} ms, least reachable not known without scipy\n"
    assert again.stdout.startswith(dense) and "runs worth merging" in again.stdout

    with pytest.MonkeyPatch.context() as patch:
        from sluice.profiler import profile as profile_module
        from tests.device import FakeRunner, staircase

        runner = FakeRunner(staircase(8))
        patch.setattr(profile_module, "make_runner", lambda target, threads=1: runner)
        here = profile_onnx(
            residual, tmp_path / "t.db", deployment=Deployment(batch=2), methods=METHODS, complete=True, progress=False
        )
    assert runner.built == 0 and here.latency.dense_ms() == data["dense_ms"]


@pytest.mark.slow
def test_in_the_real_runtime(tmp_path: Path) -> None:
    """As the user types it; the table is that of the command line here."""
    write_job(tmp_path / "job.zip", chain([2], batch="N", size=5), Job(Deployment(batch=2)))
    command = [sys.executable, "job.zip", "-o", "t.db", "--shard", "1/1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "shard 1/1: " in done.stdout and "all points are there" in done.stdout
    with LatencyTable.open(tmp_path / "t.db", fingerprint_here(Deployment(batch=2))) as table:
        (network,) = table.networks()
        assert len(table) > 5 and table.engines(network)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.version_info = (3, 8, 2)", "a job needs Python 3.11 or later, not 3.8; run it with that"),
        ("sys.modules['numpy'] = None", "a job needs numpy, onnx and the runtime, install them on this device"),
    ],
)
def test_a_device_that_lacks_something_is_told_what(before: str, message: str, tmp_path: Path) -> None:
    write_job(tmp_path / "job.zip", chain([4, 3], batch="N"), Job(Deployment(batch=2)))
    code = f"import runpy, sys; sys.argv = ['job.zip', '-o', 't.db']; {before}; runpy.run_path('job.zip')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_shards_of_a_job(tmp_path: Path) -> None:
    model = chain([9, 7, 11], batch="N")
    write_job(tmp_path / "job.zip", model, Job(Deployment(batch=2)))
    done = on_device(tmp_path / "job.zip", "-o", "1.db", "--quiet", "--shard", "1/2")
    assert done.returncode == 0 and "then profile on the result to finish" in done.stdout
    with LatencyTable.open(tmp_path / "1.db") as table:
        known = len(table)
    # What is known already may travel with the job.
    write_job(tmp_path / "rest.zip", model, Job(Deployment(batch=2)), (tmp_path / "1.db").read_bytes())
    (tmp_path / "all.db").touch()  # an empty file is no table
    done = on_device(tmp_path / "rest.zip", "-o", "all.db", "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    with LatencyTable.open(tmp_path / "all.db") as table, LatencyTable.open(tmp_path / "1.db") as part:
        assert len(table) > known == len(part) > 5
        assert all(table.points(key).items() >= part.points(key).items() for key in part.keys())  # noqa: SIM118


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sluice: error: ") and err.count("\n") == 1
    return err


def test_what_the_user_can_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, table = tmp_path / "job.zip", tmp_path / "t.db"
    write_job(job, chain([4, 3], batch="N"), Job(Deployment(batch=2)))
    for shard, message in (("3/2", "there is no shard 3/2; give 1/2 to 2/2"), ("", "is no shard; give its number")):
        with pytest.raises(SystemExit) as usage:
            main([str(job), "-o", str(table), "--shard", shard])
        assert usage.value.code == 2 and message in capsys.readouterr().err
    assert not table.exists()
    LatencyTable.create(table, replace(FINGERPRINT, device="another device")).close()
    before = table.read_bytes()
    assert "was measured under other conditions: device is 'another device'" in failure(capsys, job, "-o", table)
    write_job(job, chain([4, 3], batch="N"), Job(Deployment(batch=2)), before)
    assert "the table in the job" in failure(capsys, job, "-o", tmp_path / "new.db")
    assert table.read_bytes() == before and not (tmp_path / "new.db").exists()
    job.write_bytes(job.read_bytes()[:3000])
    assert "is not a job or is damaged" in failure(capsys, job, "-o", table)
    with pytest.raises(SystemExit) as usage:
        main([str(job)])
    assert usage.value.code == 2
