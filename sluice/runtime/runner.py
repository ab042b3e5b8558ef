"""What every deployment runtime must offer: build an engine, run it for parity, time it.

1. A *runner* is one runtime with its settings (provider, threads); it turns an ONNX model into a session.
2. A *session* is one engine with static shapes. `run` computes, for comparing outputs. `sample` times one
   *burst*: ``repeats`` inferences back to back on inputs that were bound once, so that neither copies nor the
   resolution of the clock enter the figure. Which statistic to take over bursts is `sluice.profiler.timing.measure`'s
   business, not the runtime's.
3. The clock belongs to the session: ``"thread_cpu"`` (time the computing thread was on a core; other processes do
   not count), ``"wall"``, or ``"cuda"`` (events on the device's stream). Figures of different clocks never compare.
4. A runner knows the device it runs on and the version of everything that its times depend on; both go into the
   fingerprint of a table.
5. What is launched as a whole must take far longer on the device than its launch, or launches are what is timed: of a
   small network several inferences go in one launch. How many is found on the device as fast as it gets. At the clock
   of an idle one everything takes longer, and fewer would seem to do.
6. A runtime lays activations out in its own way, and plainly at the borders of a model. A runner that can build the
   engine of a part of a network without these changes of layout has a method ``build_part(model)`` for it (static
   shapes, for timing only); for parts of the others `build` is used. Where it knows what such an engine runs, that has
   an attribute ``kernels``, a `Counter` of them. Inputs whose ``doc_string`` is `PLAIN` are plain inside as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "PLAIN",
    "TARGETS",
    "UNFIT",
    "Clock",
    "Runner",
    "Session",
    "available_targets",
    "check_fit",
    "check_target",
    "inferences_per_launch",
    "make_runner",
]

Clock = Literal["thread_cpu", "wall", "cuda"]

LEAST_LAUNCH_MS = 0.2
MOST_INFERENCES = 128
TRIAL = 8  # launches of one inference that are timed at once
TRIALS_MS = 20.0  # of the device's time, in which its clock comes up
MOST_TRIALS = 2000  # where a driver's clock stands still

PLAIN = "plain"

TARGETS = ("ort-cpu", "ort-cuda", "torch-cuda", "tensorrt")
# What a runtime would refuse piece by piece, or run as another network than the one that is asked for.
UNFIT = {
    ("ort-cuda", "int8"): "its CUDA provider computes int8 pairs in floating point",
    ("torch-cuda", "int8"): "it has no int8 convolutions",
    ("ort-cuda", "bf16"): "numpy cannot hand it bfloat16",
    ("ort-cpu", "bf16"): "it has no bfloat16 convolutions on a CPU",
}


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
        """The version of the runtime, and of what else its times depend on (driver, libraries)."""
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


def check_target(target: str) -> str:
    """The name, checked; whether the target is here is not asked.

    Raises:
        SluiceError: there is no such target.
    """
    if target not in TARGETS:
        raise SluiceError(f"there is no target {target!r}; choose one of {', '.join(TARGETS)}")
    return target


def check_fit(target: str, precision: str) -> None:
    """Can engines of this precision be timed on this target, wherever it is?

    Raises:
        SluiceError: there is no such target, or it cannot (`UNFIT`).
    """
    if reason := UNFIT.get((check_target(target), precision)):
        raise SluiceError(f"{target} cannot be timed in {precision}: {reason}; choose fp16, or another target")


def inferences_per_launch(burst_ms: Callable[[int], float]) -> int:
    """How many inferences one launch must hold (rule 5); ``burst_ms(n)`` times n launches of one."""
    least, spent = math.inf, 0.0
    for _ in range(MOST_TRIALS):
        taken = burst_ms(TRIAL)
        least, spent = min(least, taken / TRIAL), spent + taken
        if spent >= TRIALS_MS:
            break
    return MOST_INFERENCES if least <= 0 else min(MOST_INFERENCES, math.ceil(LEAST_LAUNCH_MS / least))


def make_runner(target: str, threads: int = 1) -> Runner:
    """The runner called ``target`` (one of `TARGETS`) with ``threads`` threads inside an operator.

    A GPU has no such threads, and two tables must not differ by a number that means nothing: its targets take 1 alone.

    Raises:
        SluiceError: there is no such target, or its runtime or device is not here.
    """
    if reason := _missing(check_target(target)):
        raise SluiceError(f"target {target!r} cannot run here: {reason}; targets that can: {_here()}")
    if target == "ort-cpu":
        from sluice.runtime.ort.cpu import OrtRunner

        return OrtRunner(threads)
    if threads != 1:
        raise SluiceError(f"cannot run target {target!r} with threads={threads}: a GPU has no such threads; give 1")
    if target == "ort-cuda":
        from sluice.runtime.ort.cuda import OrtCudaRunner

        return OrtCudaRunner()
    if target == "torch-cuda":
        from sluice.runtime.torch_cuda.runner import TorchCudaRunner

        return TorchCudaRunner()
    from sluice.runtime.trt.runner import TensorRtRunner

    return TensorRtRunner()


def available_targets() -> dict[str, str]:
    """For every target the reason why it cannot run here, empty where it can; asks no more than is needed to know."""
    return {target: _missing(target) for target in TARGETS}


def _missing(target: str) -> str:
    if target == "ort-cpu":
        from sluice.runtime.ort.cpu import missing
    elif target == "ort-cuda":
        from sluice.runtime.ort.cuda import missing
    elif target == "torch-cuda":
        from sluice.runtime.torch_cuda.runner import missing
    else:
        from sluice.runtime.trt.runner import missing
    return missing()


def _here() -> str:
    return ", ".join(target for target, reason in available_targets().items() if not reason) or "none"
