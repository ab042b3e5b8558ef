"""The result of a compression, and the folder it is saved in: all files of one plan, or none."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto
from torch import fx

from sluice.artifacts.report import Report
from sluice.artifacts.store import save_weights
from sluice.core.deployment import PRECISIONS
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.core.plan import Plan
from sluice.passes.graph.onnx_file import save_onnx

__all__ = ["Compressed", "check_writable"]


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """The slim network, how it was cut, its ONNX in fp32 and in the precision it is deployed in, and the figures."""

    module: fx.GraphModule
    plan: Plan
    onnx: ModelProto
    deployed: ModelProto
    report: Report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """``plan.json``, ``slim.safetensors``, ``slim.onnx`` and ``report.json`` in ``folder``; where the precision is
        another, also the file to deploy, as ``slim.int8.onnx``."""
        check_writable(folder)
        # Made aside and moved when all are complete: a full disk must not leave one plan's weights beside another's.
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
                draft = Path(part)
                self.plan.save(draft / "plan.json")
                save_weights(self.module, draft / "slim.safetensors")
                save_onnx(self.onnx, draft / "slim.onnx")
                precision = self.report.fingerprint["precision"]
                if precision != "fp32":
                    save_onnx(self.deployed, draft / f"slim.{precision}.onnx")
                self.report.save(draft / "report.json")
                for file in sorted(draft.iterdir()):
                    os.replace(file, Path(folder) / file.name)
                for other in set(PRECISIONS) - {precision}:  # of an earlier run into this folder
                    (Path(folder) / f"slim.{other}.onnx").unlink(missing_ok=True)
        except OSError as error:
            raise SluiceError(f"cannot write to {os.fspath(folder)!r}: {error}; choose another folder") from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make the folder, and make sure that it can be written to."""
    probe = Path(folder) / ".probe"
    write_atomically(probe, b"")
    probe.unlink()
