"""What every deployment runtime must offer: build an engine, run it for parity, time it.

1. A *runner* is one runtime with its settings (provider, threads); it turns an ONNX model into a session.
2. A *session* is one engine with static shapes. `run` computes, for comparing outputs. `sample` times one
   *burst*: ``repeats`` inferences back to back on inputs that were bound once, so that neither copies nor the
   resolution of the clock enter the figure. Which statistic to take over bursts is `sluice.profiler.measure`'s
   business, not the runtime's.
3. The clock belongs to the session: ``"thread_cpu"`` (time the computing thread was on a core; other processes do
   not count) or ``"wall"``. Figures of different clocks are never compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from sluice.errors import SluiceError

if TYPE_CHECKING:
    import onnx

__all__ = ["TARGETS", "Clock", "Runner", "Session", "make_runner"]

Clock = Literal["thread_cpu", "wall"]

TARGETS = ("ort-cpu",)


class Session(Protocol):
    """An engine ready to run."""

    @property
    def clock(self) -> Clock:
        """The clock `sample` reads."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name."""
        ...

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference, averaged over one burst of ``repeats`` inferences on resident random inputs."""
        ...


class Runner(Protocol):
    """A deployment runtime with its settings."""

    @property
    def clock(self) -> Clock:
        """The clock of its sessions."""
        ...

    def build(
        self,
        model: onnx.ModelProto | bytes | str | os.PathLike[str],
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> Session:
        """An engine for ``model``; ``batch`` fixes the dynamic first dimensions, ``feeds_shapes`` any others."""
        ...


def make_runner(target: str, threads: int = 1) -> Runner:
    """The runner called ``target`` (one of `TARGETS`) with ``threads`` threads inside an operator."""
    if target == "ort-cpu":
        from sluice.runtime.ort import OrtRunner

        return OrtRunner(threads)
    raise SluiceError(f"there is no target {target!r}; choose one of {', '.join(TARGETS)}")
