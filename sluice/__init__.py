"""sluice makes a PyTorch network fit a latency budget measured on the device it will run on.

The public names load what they need when they are first used; ``import sluice`` alone imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sluice.core.version import INSTALL_TORCH, __version__

_WHERE = {
    "Budget": "sluice.training.budget",
    "LatencyTable": "sluice.profiler.table.latency_table",
    "Plan": "sluice.core.plan",
    "Recovery": "sluice.training.recovery",
    "Report": "sluice.artifacts.report",
    "SluiceError": "sluice.core.errors",
    "analyze": "sluice.passes.graph.aten",
    "capture": "sluice.passes.graph.capture",
    "close_gates": "sluice.passes.gates.gating",
    "compress": "sluice.pipeline.compress",
    "compress_onnx": "sluice.pipeline.compress_onnx",
    "export": "sluice.artifacts.deploy",
    "finish": "sluice.pipeline.finish",
    "gate_parameters": "sluice.passes.gates.filter_gates",
    "insert_gates": "sluice.passes.gates.gating",
    "load": "sluice.artifacts.store",
    "other_parameters": "sluice.passes.gates.filter_gates",
    "profile": "sluice.pipeline.prepare",
    "rewrite_onnx": "sluice.passes.cut.rewrite_onnx",
    "rewrite_torch": "sluice.passes.cut.rewrite_torch",
    "sweep": "sluice.pipeline.compress",
}

__all__ = [
    "Budget",
    "LatencyTable",
    "Plan",
    "Recovery",
    "Report",
    "SluiceError",
    "__version__",
    "analyze",
    "capture",
    "close_gates",
    "compress",
    "compress_onnx",
    "export",
    "finish",
    "gate_parameters",
    "insert_gates",
    "load",
    "other_parameters",
    "profile",
    "rewrite_onnx",
    "rewrite_torch",
    "sweep",
]

if TYPE_CHECKING:
    from sluice.artifacts.deploy import export
    from sluice.artifacts.report import Report
    from sluice.artifacts.store import load
    from sluice.core.errors import SluiceError
    from sluice.core.plan import Plan
    from sluice.passes.cut.rewrite_onnx import rewrite_onnx
    from sluice.passes.cut.rewrite_torch import rewrite_torch
    from sluice.passes.gates.filter_gates import gate_parameters, other_parameters
    from sluice.passes.gates.gating import close_gates, insert_gates
    from sluice.passes.graph.aten import analyze
    from sluice.passes.graph.capture import capture
    from sluice.pipeline.compress import compress, sweep
    from sluice.pipeline.compress_onnx import compress_onnx
    from sluice.pipeline.prepare import profile
    from sluice.profiler.table.latency_table import LatencyTable
    from sluice.training.budget import Budget
    from sluice.training.recovery import Recovery


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sluice' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(f"sluice.{name} needs PyTorch; {INSTALL_TORCH}", name="torch") from None


def __dir__() -> list[str]:
    return sorted(__all__)
