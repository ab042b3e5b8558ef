"""sluice makes a PyTorch network fit a latency budget measured on the device it will run on.

The public names load what they need when they are first used; ``import sluice`` alone imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Budget": "sluice.budget",
    "LatencyTable": "sluice.profiler.table",
    "Plan": "sluice.plan",
    "Report": "sluice.report",
    "SluiceError": "sluice.errors",
    "analyze": "sluice.passes.aten",
    "capture": "sluice.passes.capture",
    "close_gates": "sluice.passes.gating",
    "compress": "sluice.pipeline",
    "export": "sluice.deploy",
    "finish": "sluice.pipeline",
    "insert_gates": "sluice.passes.gating",
    "load": "sluice.store",
    "profile": "sluice.prepare",
    "rewrite_onnx": "sluice.passes.rewrite_onnx",
    "rewrite_torch": "sluice.passes.rewrite_torch",
    "sweep": "sluice.pipeline",
}

__all__ = [
    "Budget",
    "LatencyTable",
    "Plan",
    "Report",
    "SluiceError",
    "__version__",
    "analyze",
    "capture",
    "close_gates",
    "compress",
    "export",
    "finish",
    "insert_gates",
    "load",
    "profile",
    "rewrite_onnx",
    "rewrite_torch",
    "sweep",
]

if TYPE_CHECKING:
    from sluice.budget import Budget
    from sluice.deploy import export
    from sluice.errors import SluiceError
    from sluice.passes.aten import analyze
    from sluice.passes.capture import capture
    from sluice.passes.gating import close_gates, insert_gates
    from sluice.passes.rewrite_onnx import rewrite_onnx
    from sluice.passes.rewrite_torch import rewrite_torch
    from sluice.pipeline import compress, finish, sweep
    from sluice.plan import Plan
    from sluice.prepare import profile
    from sluice.profiler.table import LatencyTable
    from sluice.report import Report
    from sluice.store import load


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sluice' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
