"""A side that is killed costs a sentence and the unfinished points, never the other side."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from sluice.core.deployment import Deployment
from sluice.core.errors import LostLine, SluiceError
from sluice.profiler.profile import profile_onnx
from sluice.profiler.table.latency_table import LatencyTable
from sluice.runtime.remote import line
from sluice.runtime.remote.client import RemoteRunner, RemoteSession
from sluice.runtime.targets import make_runner
from tests.device import FakeRunner, chain, profile_on, staircase
from tests.remote import FAKE, ROOT, Served, started

MODEL = chain([9, 7, 11], batch="N")
# Profiles until it is killed.
HOST = """
import sys, onnx
from sluice.core.deployment import Deployment
from sluice.profiler.profile import profile_onnx
model, table, target = sys.argv[1:]
print("begins", flush=True)
profile_onnx(onnx.load(model), table, deployment=Deployment(target, 2), complete=True, progress=False)
print("done", flush=True)
"""


def points(path: Path) -> dict[str, dict[tuple[int, ...], float]]:
    with LatencyTable.open(path) as table:
        return {key: {e: m.ms for e, m in table.points(key).items()} for key in table.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[int, ...], float]]:
    """What a run that nobody kills finds."""
    path = tmp_path_factory.mktemp("whole") / "t.db"
    with pytest.MonkeyPatch.context() as patch:
        profile_on(lambda target, threads=1: FakeRunner(staircase(8)), patch)
        profile_onnx(MODEL, path, deployment=Deployment(batch=2), complete=True, progress=False)
    return points(path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def profile(table: Path, served: Served) -> None:
    profile_onnx(MODEL, table, deployment=Deployment(served.target, 2), complete=True, progress=False)


def killed_at(number: int, what: str, served: Served) -> Iterator[None]:
    """The device is killed when the host asks it the ``number``-th time."""
    asked = 0
    kind = RemoteSession if what == "turn" else RemoteRunner
    real = getattr(kind, what)

    def asking(*arguments: object, **settings: object) -> object:
        nonlocal asked
        asked += 1
        if asked == number:
            served.kill()
        return real(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, what, asking)
        yield


@pytest.fixture(autouse=True)
def soon_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does not come back is waited for no longer than that."""
    monkeypatch.setattr(line, "AGAIN_S", 0.3)


@pytest.mark.parametrize(("what", "number"), [("build", 1), ("build", 20), ("turn", 5000), ("turn", 6000)])
def test_the_device_is_killed(
    what: str, number: int, tmp_path: Path, work: Path, whole: dict[str, dict[tuple[int, ...], float]]
) -> None:
    table = tmp_path / "t.db"
    with started(work) as served:
        lost = rf"^(the line to {served.target} was lost|nobody answers at {served.address}) .*`sluice serve.* there"
        for _ in killed_at(number, what, served):
            with pytest.raises(LostLine, match=lost):
                profile(table, served)
        with pytest.raises(LostLine, match=lost):
            profile(table, served)
        before = points(table) if number > 1 else {}
        assert (len(before) > 2) == (number > 1)
        with started(work, "--port", str(served.port)) as again:
            profile(table, again)
            assert points(table) == whole
    assert all(whole[key].items() >= found.items() for key, found in before.items())
    assert not [*work.iterdir()] and "Traceback" not in served.errors.read_text()


def host(folder: Path, table: Path, served: Served) -> subprocess.Popen[str]:
    onnx.save_model(MODEL, folder / "m.onnx")
    command = [sys.executable, "-c", HOST, str(folder / "m.onnx"), str(table), served.target]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


def killed(process: subprocess.Popen[str], after_s: float) -> None:
    with process:
        time.sleep(after_s)
        process.kill()


def test_the_host_is_killed(tmp_path: Path, work: Path) -> None:
    with started(work) as served:
        killed(host(tmp_path, tmp_path / "t.db", served), 0.5)
        runner = make_runner(served.target)
        assert runner.build(chain([4, 3])).sample(2) > 0
    assert served.errors.read_text() == ""


def test_a_runtime_that_crashes(tmp_path: Path, work: Path) -> None:
    """Its process goes with it; the server is there again, and the host is told."""
    with started(work) as served:
        runner = make_runner(served.target)
        session = runner.build(chain([4, 3]))
        (child,) = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        with pytest.raises(SluiceError, match=r"^the line to .* was lost"):
            session.sample(1)
        for _ in range(100):
            try:
                assert runner.build(chain([4, 3])).sample(1) > 0
                break
            except LostLine:
                time.sleep(0.1)
        else:
            pytest.fail("the server did not come back")
        assert "the runtime ended by SIGKILL; the server was started again" in served.errors.read_text()
        (child,) = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        served.kill()
        for _ in range(500):
            if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the child outlived its parent")


@pytest.mark.slow
@pytest.mark.parametrize("side", ["device", "host"])
def test_20_kills_at_random(
    side: str, tmp_path: Path, work: Path, whole: dict[str, dict[tuple[int, ...], float]]
) -> None:
    rng, table = random.Random(side), tmp_path / "t.db"
    with started(work) as served:
        port = str(served.port)
        if side == "device":
            served.kill()
        for _ in range(20):
            if side == "host":
                killed(host(tmp_path, table, served), rng.uniform(0.0, 2.5))
                continue
            with started(work, "--port", port) as again, host(tmp_path, table, again) as process:
                time.sleep(rng.uniform(0.0, 2.5))
                again.kill()
                _, errors = process.communicate(timeout=60)
                assert process.returncode == 0 or "sluice.core.errors.LostLine: " in errors, errors
        if side == "host":
            profile(table, served)
        else:
            with started(work, "--port", port) as again:
                profile(table, again)
        assert points(table) == whole and FAKE
    assert not [*work.iterdir()] and "Traceback" not in served.errors.read_text()
