"""A runtime in a child of this process: what crashes or hangs it costs one point, and it ends with its host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from sluice.cli import main
from sluice.core.address import LOCAL, split_target
from sluice.core.deployment import Deployment
from sluice.core.errors import LostLine, SluiceError
from sluice.profiler.profile import profile_onnx
from sluice.profiler.sweep import bench as sweep
from sluice.runtime.remote import line, local
from sluice.runtime.remote.client import RemoteRunner
from sluice.runtime.targets import make_runner
from tests import tiny
from tests.remote import ROOT

# The child's program, whose runtime does something at convolutions of so many output channels.
FAULTY = """
import math, os, signal, sys, time
from sluice.runtime.ort.cpu import OrtRunner
from sluice.commands.serve_local import serve

def end():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(1000)

def hang():
    time.sleep(1000)

def meets(model):
    return any(t.dims[0] in {gone} for t in model.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3)

def faulty(real):
    def build(self, model, **more):
        if meets(model) and {when!r} == "build":
            {fault}()
        session = real(self, model, **more)
        ms = 1e-3 + 1e-6 * sum(math.prod(t.dims) for t in model.graph.initializer)
        session.sample = lambda repeats: {fault}() if meets(model) and {when!r} == "run" else ms
        return session
    return build

OrtRunner.build = faulty(OrtRunner.build)
OrtRunner.build_part = faulty(OrtRunner.build_part)
sys.exit(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, int], local.LocalServer]]:
    found: dict[tuple[str, int], local.LocalServer] = {}
    monkeypatch.setattr(local, "_servers", found)
    yield found
    for server in found.values():
        server.close()


@pytest.mark.parametrize(("when", "fault"), [("build", "end"), ("run", "end"), ("run", "hang")])
def test_a_crash_or_a_hang_costs_its_points(
    when: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    servers: object,
) -> None:  # fmt: skip
    monkeypatch.setattr(local, "PROGRAM", ("-c", FAULTY.format(gone=(8,), when=when, fault=fault)))
    monkeypatch.setattr(line, "PATIENCE_S", 3.0)
    monkeypatch.setattr(sweep, "AT_ONCE", 1)
    dense = onnx.load_model_from_string(tiny._dense_bytes())
    deployment = Deployment("ort-cpu@local", batch=tiny.BATCH)
    profile = profile_onnx(dense, tmp_path / "t.db", deployment=deployment, methods=("filter",), progress=False)
    first = next(name for name, levels in profile.latency.levels.items() if levels[-1] == 10)
    asked = {**profile.latency.dense, first: 8}
    before = len(profile.bench.table)
    profile.ask([asked])
    assert profile.refused and all("8" in name for name in profile.refused)
    assert profile.knows(asked) and profile.latency.ms(asked) > profile.latency.dense_ms()
    assert len(profile.bench.table) >= before
    assert any("is left out" in record.getMessage() for record in caplog.records)
    other = {**asked, first: next(width for width in profile.latency.levels[first] if width != 8)}
    profile.ask([other])  # the profile goes on
    assert profile.knows(other)


def test_the_command_survives_its_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], servers: dict[object, object]
) -> None:
    monkeypatch.setattr(local, "PROGRAM", ("-c", FAULTY.format(gone=(8,), when="run", fault="end")))
    file = tmp_path / "dense.onnx"
    file.write_bytes(tiny._dense_bytes())
    words = ["profile", str(file), "--batch", str(tiny.BATCH), "--methods", "filter", "--quiet", "--complete"]
    assert main([*words, "--table", str(tmp_path / "t.db")]) == 0
    assert "left out" in capsys.readouterr().out and servers


def test_the_command_may_run_it_in_its_own_process(tmp_path: Path, servers: dict[object, object]) -> None:
    file = tmp_path / "dense.onnx"
    file.write_bytes(tiny._dense_bytes())
    with tiny.simulated_device():
        assert main(["profile", str(file), "--in-process", "--quiet", "--table", str(tmp_path / "t.db")]) == 0
    assert not servers


def test_it_measures_what_a_runner_of_this_process_measures(servers: object) -> None:
    model = onnx.load_model_from_string(tiny._dense_bytes())
    here, there = make_runner("ort-cpu"), make_runner("ort-cpu@local")
    assert isinstance(there, RemoteRunner)
    assert (there.device, there.version, there.clock) == (here.device, here.version, here.clock)
    feeds = {"x": tiny.inputs().numpy()} if model.graph.input[0].name == "x" else {
        model.graph.input[0].name: tiny.inputs().numpy()
    }  # fmt: skip
    one, two = here.build(model, batch=tiny.BATCH).run(feeds), there.build(model, batch=tiny.BATCH).run(feeds)
    assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in two.items()}


def test_a_child_that_was_killed_is_replaced(servers: dict[tuple[str, int], local.LocalServer]) -> None:
    runner = make_runner("ort-cpu@local")
    assert isinstance(runner, RemoteRunner)
    model = tiny._dense_bytes()
    session = runner.build(model, batch=tiny.BATCH)
    (server,) = servers.values()
    child = server._child
    assert child is not None
    os.killpg(child.pid, signal.SIGKILL)
    with pytest.raises(LostLine):
        session.sample(1)
    assert runner.revive() and runner.build(model, batch=tiny.BATCH).sample(1) > 0
    assert server._child is not None and server._child.pid != child.pid


def test_a_child_is_replaced_that_is_not_yet_known_to_have_ended(
    servers: dict[tuple[str, int], local.LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections close before the system tells that it ended, the longer before the fuller the machine is."""
    runner = make_runner("ort-cpu@local")
    assert isinstance(runner, RemoteRunner)
    (server,) = servers.values()
    child = server._child
    assert child is not None
    os.killpg(child.pid, signal.SIGKILL)
    told = iter([None, None])
    real = child.poll
    monkeypatch.setattr(child, "poll", lambda: next(told, real()))
    assert runner.revive()
    assert server._child is not None and server._child.pid != child.pid


def test_the_child_ends_with_its_host() -> None:
    code = (
        "from sluice.runtime.targets import make_runner\n"
        "from sluice.runtime.remote import local\n"
        "make_runner('ort-cpu@local')\n"
        "(server,) = local._servers.values()\n"
        "print(server._child.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    child = int(done.stdout)
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        if "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_the_address() -> None:
    assert split_target("tensorrt@local") == ("tensorrt", LOCAL)
    assert Deployment("ort-cpu@local").place == "ort-cpu@local" and Deployment("ort-cpu@local").target == "ort-cpu"
    with pytest.raises(SluiceError, match="cannot run here"):
        make_runner("ort-cuda@local")
