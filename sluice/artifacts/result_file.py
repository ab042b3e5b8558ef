"""The result of compressing an ONNX file, and what of it is saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

from sluice.artifacts.folder import save_together
from sluice.artifacts.report import Report
from sluice.core.plan import Plan
from sluice.passes.graph.onnx_file import save_onnx

__all__ = ["CompressedFile"]


@dataclass(frozen=True, slots=True, eq=False)
class CompressedFile:
    """The file with fewer channels, how it was cut, the figures, and its tensors by name before any were folded."""

    onnx: ModelProto
    plan: Plan
    report: Report
    weights: Mapping[str, np.ndarray]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Plan, ``slim.safetensors``, ``slim.onnx`` and report in ``folder``, with ``manifest.json``, all or none."""
        from safetensors.numpy import save

        def write(draft: Path) -> None:
            self.plan.save(draft / "plan.json")
            (draft / "slim.safetensors").write_bytes(
                save({name: np.ascontiguousarray(v) for name, v in self.weights.items()})
            )
            save_onnx(self.onnx, draft / "slim.onnx")
            self.report.save(draft / "report.json")

        save_together(folder, write)
