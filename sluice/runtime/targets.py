"""The deployment runtimes by name: which there are, which precisions they take, and what is missing here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.core.errors import SluiceError
from sluice.runtime.base.runner import Runner

if TYPE_CHECKING:
    pass

__all__ = ["TARGETS", "UNFIT", "available_targets", "check_fit", "check_target", "make_runner"]

TARGETS = ("ort-cpu", "ort-cuda", "torch-cuda", "tensorrt")


# What a runtime would refuse piece by piece, or run as another network than the one that is asked for.
UNFIT = {
    ("ort-cuda", "int8"): "its CUDA provider computes int8 pairs in floating point",
    ("torch-cuda", "int8"): "it has no int8 convolutions",
    ("ort-cuda", "bf16"): "numpy cannot hand it bfloat16",
    ("ort-cpu", "bf16"): "it has no bfloat16 convolutions on a CPU",
}


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
