"""``sluice serve`` and the verbs that measure at another address."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from sluice.cli import main
from sluice.commands.engine_layers import check_inspector
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_file import save_onnx
from sluice.profiler.job import Job, read_job, write_job
from sluice.profiler.profile import fingerprint_here, measured_elsewhere, profile_onnx
from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.targets import make_runner
from tests import tiny
from tests.device import FakeRunner, chain, staircase
from tests.remote import ROOT, Served, serve_in_process, started
from tests.tiny import words

TOKEN = "a-token-of-these-tests"
# What a device may lack.
BARE = """
import importlib.abc, sys
absent = {"torch", "torchvision", "scipy", "onnx_graphsurgeon", "onnxscript", "onnx_ir", "tqdm", "rich", "safetensors"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from sluice.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real runtime, as it is started on a device."""
    with started(tmp_path_factory.mktemp("work"), fake=False) as found:
        yield found


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*words(*arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sluice: error: ") and err.count("\n") == 1
    return err


def test_the_real_runtime_from_afar(served: Served) -> None:
    assert fingerprint_here(Deployment(served.target, 2)) == fingerprint_here(Deployment(batch=2))
    model, x = chain([4, 3]), np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)
    there, here = make_runner(served.target).build(model), OrtRunner().build(model)
    assert np.array_equal(there.run({"x": x})["y"], here.run({"x": x})["y"]) and there.sample(3) > 0


def test_a_device_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, "serve", "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"ort-cpu on .*, at 127\.0\.0\.1, port (\d+)\n", line)
        assert found, line
        assert make_runner(f"ort-cpu@127.0.0.1:{found[1]}").build(chain([4, 3])).sample(2) > 0
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(30) == 0 and process.stdout.read() == ""
        finally:
            process.kill()


def test_bench_from_afar(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, widths in (("a", [4, 3]), ("b", [5, 3])):
        save_onnx(chain(widths, batch="N"), tmp_path / f"{name}.onnx")
    assert (
        main([*words("bench --json --batch 2 --target", served.target, tmp_path / "a.onnx", tmp_path / "b.onnx")]) == 0
    )
    data = json.loads(capsys.readouterr().out)
    assert data["clock"] == "thread_cpu" and len(data["engines"]) == 2 and data["ratio"] > 0
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"an engine")
    assert "give --target tensorrt" in failure(capsys, "bench --target", served.target, plan)
    elsewhere = f"tensorrt@{served.address}"
    assert "would be run as it is on another machine" in failure(capsys, "bench --target", elsewhere, plan)


def test_profile_from_afar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line as on the device itself, on a runtime whose times are computed."""
    dense, table = tiny.dense_onnx_in(tmp_path), tmp_path / "t.db"
    (tmp_path / "work").mkdir()
    with started(tmp_path / "work") as there:
        arguments = words(
            "profile",
            dense,
            "--json --quiet --methods filter --table",
            table,
            f"--batch {tiny.BATCH} --target",
            there.target,
        )
        assert main([*arguments]) == 0
        first = json.loads(capsys.readouterr().out)
        with LatencyTable.open(table) as opened:
            known, fingerprint = len(opened), opened.fingerprint
        assert fingerprint.runtime == "ort-cpu" and fingerprint.device == FakeRunner.device and known > 5
        assert main([*arguments]) == 0 and json.loads(capsys.readouterr().out)["dense_ms"] == first["dense_ms"]
    # A line that a profile left open is lost; without one, nobody answers.
    said = failure(capsys, *arguments)
    assert re.search(rf"(the line to {there.target} was lost|nobody answers at {there.address}).*`sluice serve", said)
    with LatencyTable.open(table) as opened:
        assert len(opened) == known


@pytest.mark.slow
def test_compress_measures_there(tmp_path: Path) -> None:
    import sluice

    with serve_in_process(OrtRunner()) as (address, server), tiny.simulated_device():
        asked = server.device.hello
        done = sluice.compress(
            tiny.model(), tiny.inputs(), budget="60%", data=tiny.data(), table=tiny.table_in(tmp_path), epochs=1,
            target=f"ort-cpu@{address}", batch=tiny.BATCH, methods=("filter",), progress=False,
        )  # fmt: skip
        assert done.report.met() and asked.target == "ort-cpu"


def test_a_table_of_a_device_that_is_away(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with serve_in_process(FakeRunner(staircase(8))) as (address, _):
        there = Deployment(f"ort-cpu@{address}", 2)
        profile_onnx(chain([9, 7], batch="N"), path, deployment=there, progress=False)
        assert not measured_elsewhere(path, there)
    assert measured_elsewhere(path, there) and measured_elsewhere(path, Deployment(batch=2))


def test_a_job_has_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.dense_onnx_in(tmp_path)
    message = failure(capsys, "profile", model, "--pack --target ort-cpu@jetson -o", tmp_path / "job.zip")
    assert "a job is run on the device itself, not at jetson:8765; pack it for the target ort-cpu" in message
    assert not (tmp_path / "job.zip").exists()
    write_job(tmp_path / "job.zip", onnx.load(model), Job(Deployment(batch=3)))
    assert read_job(tmp_path / "job.zip")[0] == Job(Deployment(batch=3))
    assert "address" not in Job().settings()


def test_layers_and_engines_are_for_the_device_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SluiceError, match="the layers of an engine are not told over the line to jetson:8765"):
        check_inspector("tensorrt@jetson")
    out = tmp_path / "m.onnx"
    shared = words("export tests.tiny:model --shape 3,9,9 -o", out)
    assert "--engine is built by the TensorRT of this machine, not for --target tensorrt@jetson" in failure(
        capsys, *shared, "--target tensorrt@jetson --engine", tmp_path / "e"
    )
    assert not out.exists()
    assert main([*shared, *words("--target tensorrt@jetson --json")]) == 0 and out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target ort-cpu@jetson", "what is served runs on this machine; leave the address out of --target"),
        ("--target abacus", "there is no target 'abacus'"),
        ("--host 0.0.0.0", "whoever reaches 0.0.0.0 could use this device; set SLUICE_TOKEN or give --token-file"),
        ("--port 70000", "cannot listen at 127.0.0.1, port 70000"),
        ("--token-file nowhere", "cannot read 'nowhere': No such file or directory; give the path of a token"),
    ],
)
def test_what_is_not_served(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, "serve", arguments)


def test_a_target_that_cannot_run_here(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sluice", "serve", "--port", "0", "--target", "tensorrt", "--threads", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sluice: error: ")


def test_a_token_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "work").mkdir()
    monkeypatch.delenv("SLUICE_TOKEN", raising=False)
    for arguments, variables in ((("--token-file", str(tmp_path / "token")), {}), ((), {"SLUICE_TOKEN": TOKEN})):
        with started(tmp_path / "work", *arguments, environment=variables) as there:
            monkeypatch.delenv("SLUICE_TOKEN", raising=False)
            with pytest.raises(SluiceError, match="the token is missing or wrong; set SLUICE_TOKEN"):
                make_runner(there.target)
            monkeypatch.setenv("SLUICE_TOKEN", TOKEN)
            assert make_runner(there.target).build(chain([4, 3])).sample(1) > 0
    for content in (b"", b"\xff\xfe", b" \n"):
        (tmp_path / "token").write_bytes(content)
        assert "holds no token" in failure(capsys, "serve --token-file", tmp_path / "token")
    (tmp_path / "token").write_text("short")
    assert "the token is too short" in failure(capsys, "serve --token-file", tmp_path / "token")


@pytest.mark.slow
def test_the_real_runtime_fills_the_same_table(served: Served, tmp_path: Path) -> None:
    """The same pieces and joints; at which sizes follows from the times (on a simulated device they are equal)."""
    model = chain([4, 3], batch="N", size=5)
    for name, target in (("far.db", served.target), ("near.db", "ort-cpu")):
        profile_onnx(model, tmp_path / name, deployment=Deployment(target, 2), progress=False)
    with LatencyTable.open(tmp_path / "far.db") as far, LatencyTable.open(tmp_path / "near.db") as near:
        assert far.fingerprint == near.fingerprint
        assert set(far.keys()) == set(near.keys()) and len(far) > 5
        assert all(far.points(key).keys() & near.points(key).keys() for key in far.keys())  # noqa: SIM118
        assert far.get_blob("host") == near.get_blob("host")
