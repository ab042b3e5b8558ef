"""Devices on a loopback port: in this process, or as `sluice serve` in another, with a fake runtime or a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.runtime.base.runner import Runner
from sluice.runtime.remote.device import Device
from sluice.runtime.remote.door import listen
from sluice.runtime.remote.server import DeviceServer

__all__ = ["FAKE", "ROOT", "Served", "serve_in_process", "started"]

ROOT = Path(__file__).parents[1]
# `sluice serve` with the simulated device for a runtime, which is loaded after the fork as a runtime is.
FAKE = """
import sys
import sluice.commands.serve as command
real = command._serve
def with_fake(*arguments):
    import sluice.runtime.targets as targets
    from tests.device import FakeRunner, staircase
    targets.make_runner = lambda target, threads=1: FakeRunner(staircase(8))
    return real(*arguments)
command._serve = with_fake
from sluice.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Served:
    """A process that serves, where it does, and where its standard error goes."""

    process: subprocess.Popen[str]
    address: str
    errors: Path

    @property
    def target(self) -> str:
        return f"ort-cpu@{self.address}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@contextmanager
def started(
    folder: Path, *arguments: str, fake: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """`sluice serve` with these arguments in another process, in ``folder``."""
    asked = ["serve", "--json", *(arguments if "--port" in arguments else ("--port", "0", *arguments))]
    program = [sys.executable, "-c", FAKE] if fake else [sys.executable, "-m", "sluice"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    errors = folder.with_name(f"{folder.name}.stderr")
    with errors.open("a") as file:
        process = subprocess.Popen(
            [*program, *asked], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=file, text=True
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, errors.read_text()
            yield Served(process, json.loads(line)["address"], errors)
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


@contextmanager
def serve_in_process(
    runner: Runner, target: str = "ort-cpu", *, token: str = "", patience_s: float = 0.05, **settings: Any
) -> Iterator[tuple[str, DeviceServer]]:
    """The address of a server for ``runner`` in this process, and the server."""
    with listen("127.0.0.1", 0) as listening:
        server = DeviceServer(listening, Device(runner, target, patience_s=patience_s), token, **settings)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            server.shutdown()
            thread.join()
