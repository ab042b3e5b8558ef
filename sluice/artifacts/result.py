"""The result of a compression, and what of it is saved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto
from torch import fx

from sluice.artifacts.folder import save_together
from sluice.artifacts.report import Report
from sluice.artifacts.store import save_weights
from sluice.core.plan import Plan
from sluice.passes.graph.onnx_file import save_onnx

__all__ = ["Compressed"]


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
        another, also the file to deploy, as ``slim.int8.onnx``. With ``manifest.json``, all of them or none."""

        def write(draft: Path) -> None:
            self.plan.save(draft / "plan.json")
            save_weights(self.module, draft / "slim.safetensors")
            save_onnx(self.onnx, draft / "slim.onnx")
            precision = self.report.fingerprint["precision"]
            if precision != "fp32":
                save_onnx(self.deployed, draft / f"slim.{precision}.onnx")
            self.report.save(draft / "report.json")

        save_together(folder, write)
