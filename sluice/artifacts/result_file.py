"""The result of compressing an ONNX file, and what of it is saved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from sluice.artifacts.folder import save_together
from sluice.artifacts.report import Report
from sluice.core.plan import Plan
from sluice.passes.graph.onnx_file import save_onnx

__all__ = ["CompressedFile"]


@dataclass(frozen=True, slots=True, eq=False)
class CompressedFile:
    """The file with fewer channels, how it was cut, and the figures."""

    onnx: ModelProto
    plan: Plan
    report: Report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """``plan.json``, ``slim.onnx`` and ``report.json`` in ``folder``, with ``manifest.json``, all or none."""

        def write(draft: Path) -> None:
            self.plan.save(draft / "plan.json")
            save_onnx(self.onnx, draft / "slim.onnx")
            self.report.save(draft / "report.json")

        save_together(folder, write)
