"""What is kept of one architecture of `benchmarks.coverage`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Row"]


@dataclass(slots=True)
class Row:
    """``failed`` is the stage that fell short, ``reason`` says how. Shares are of matrix parameters.

    ``left_alone`` has the weightiest reasons with the share that each holds and the first of its matrices, ``seconds``
    are CPU seconds by stage, ``batch_free`` says whether the file leaves its batch free. ``state`` is the last
    commit of the files that read and cut when it was measured, with ``+`` if one was changed since, and empty where
    nobody noted it.
    """

    spec: str
    kind: str
    parameters: int = 0
    captured: bool = False
    groups: int = 0
    share_torch: float = 0.0
    share: float = 0.0
    torch_error: float | None = None
    onnx_errors: list[float] = field(default_factory=list)
    batch_free: bool = True
    silent: list[str] = field(default_factory=list)
    left_alone: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    reason: str = ""
    state: str = ""
