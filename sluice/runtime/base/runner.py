"""The protocol of deployment runtimes: build an engine, run it for parity, time it.

1. A *runner* is one runtime with its settings (provider, threads); it turns an ONNX model into a session.
2. A *session* is one engine with static shapes. `run` computes, for comparing outputs. `sample` times one
   *burst*: ``repeats`` inferences back to back on inputs that were bound once, so that neither copies nor the
   resolution of the clock enter the figure. Which statistic to take over bursts is `sluice.profiler.timing.measure`'s
   business, not the runtime's.
3. The clock belongs to the session: ``"thread_cpu"`` (time the computing thread was on a core; other processes do
   not count), ``"wall"``, or ``"cuda"`` (events on the device's stream). Figures of different clocks never compare.
4. A runner knows the device it runs on and the version of everything that its times depend on; both go into the
   fingerprint of a table.
5. A launch must hold work that takes far longer on the device than the launch itself, or launches are timed. So one
   launch of a small network holds several inferences. Their number is found on the device at its full clock. At the
   clock of an idle device everything takes longer, and fewer inferences would seem to do.
6. A runtime lays activations out in its own way, and plainly at the borders of a model. A runner that can build the
   engine of a part of a network without these changes of layout has a method ``build_part(model)`` for it (static
   shapes, for timing only); for parts of the others `build` is used. Where it knows the kernels of such an engine, the
   engine has an attribute ``kernels``, a `Counter` of them. Inputs whose ``doc_string`` is `PLAIN` are plain inside as
   well, and so are such outputs. One whose engines fuse a bare operand of an addition as well says
   ``free_borders = True``: its parts have no sources (`sluice.profiler.pieces.sources`).
7. A session that is far away has a method ``turn(repeats, count)``: ``count`` bursts in a row, for one way there and
   back. Its runner has a method ``host_identity`` (`sluice.runtime.base.host`), that of the machine of the device.
8. A runner that knows which operators a kernel of an engine computes has a method ``fused(model, batch=None)``: lists
   of names of the ONNX nodes of ``model``, one for each kernel (`sluice.profiler.pieces.fused`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["PLAIN", "Clock", "Runner", "Session", "inferences_per_launch", "turn"]

Clock = Literal["thread_cpu", "wall", "cuda"]

LEAST_LAUNCH_MS = 0.2
MOST_INFERENCES = 128
TRIAL = 8  # launches of one inference that are timed at once
TRIALS_MS = 20.0  # of the device's time, in which its clock comes up
MOST_TRIALS = 2000  # where a driver's clock stands still

PLAIN = "plain"


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

    @property
    def device(self) -> str:
        """The name of the device that engines run on."""
        ...

    @property
    def version(self) -> str:
        """The version of the runtime, and of the driver and libraries that its times depend on."""
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


def turn(session: Session, repeats: int, count: int) -> list[float]:
    """Milliseconds per inference of ``count`` bursts in a row (rule 7)."""
    own = getattr(session, "turn", None)
    return [session.sample(repeats) for _ in range(count)] if own is None else own(repeats, count)


def inferences_per_launch(burst_ms: Callable[[int], float]) -> int:
    """How many inferences one launch must hold (rule 5); ``burst_ms(n)`` times n launches of one."""
    least, spent = math.inf, 0.0
    for _ in range(MOST_TRIALS):
        taken = burst_ms(TRIAL)
        least, spent = min(least, taken / TRIAL), spent + taken
        if spent >= TRIALS_MS:
            break
    return MOST_INFERENCES if least <= 0 else min(MOST_INFERENCES, math.ceil(LEAST_LAUNCH_MS / least))
