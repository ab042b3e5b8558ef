"""TensorRT-RTX in a process of its own: it parses and builds without a GPU, and takes no test down with it.

``python -m tests.rtx`` answers one line of JSON per line of JSON: ``{"model": path, "batch": n}`` with the error, or
with what the builder says of the layers it made.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from sluice.core.errors import SluiceError
from sluice.runtime.trt.build import build_engine, find_tensorrt, static_model

__all__ = ["INSTALLED", "Rtx", "Solution"]

INSTALLED = all(find_spec(name) for name in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"))
ROOT = Path(__file__).resolve().parent.parent
# The builder's own list of an engine's layers, in the words of the inspector's JSON.
LAYER = re.compile(r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w+), .* Metadata: (?P<Metadata>.*)$")


@dataclass(frozen=True, slots=True)
class Solution:
    """The size of the engine in bytes, or why there is none; the inspector's JSON, if that was asked for."""

    size: int
    error: str
    information: str


class Rtx:
    """The other process; a context manager."""

    def __enter__(self) -> Rtx:
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()
        if self._process is not None:
            self._process.communicate()

    def build(self, model: onnx.ModelProto, batch: int = 2, *, described: bool = False) -> Solution:
        path = Path(self._folder.name) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.rtx"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"model": str(path), "batch": batch, "described": described}), file=self._process.stdin)
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status, self._process = self._process.wait(), None
            return Solution(0, f"TensorRT-RTX crashed with status {status}", "")
        return Solution(**json.loads(line))


def _build(path: str, batch: int) -> Solution:
    try:
        return Solution(len(build_engine(find_tensorrt(), path, batch=batch).plan), "", "")
    except SluiceError as error:
        return Solution(0, str(error), "")


def _describe(path: str, batch: int) -> Solution:
    """A build that listens to all that the builder says, since an engine can only be inspected on a GPU."""
    trt = find_tensorrt()
    said: list[str] = []

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            said.append(message)

    builder = trt.Builder(log := Listener())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(static_model(path, batch).SerializeToString()), said[-1]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    plan = builder.build_serialized_network(network, config)
    lines = next(text for text in said if text.startswith("Layers:")).splitlines()
    layers = [match.groupdict() for line in lines if (match := LAYER.match(line)) is not None]
    return Solution(len(bytes(plan)), "", json.dumps({"Layers": layers, "I/O Tensors": []}))


def main() -> None:
    # The library writes to standard output by itself.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Callable[[str, int], Solution] = _describe if asked["described"] else _build
        found = answer(asked["model"], asked["batch"])
        print(json.dumps({"size": found.size, "error": found.error, "information": found.information}), file=replies)
        replies.flush()


if __name__ == "__main__":
    main()
