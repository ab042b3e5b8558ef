"""The deployment runtimes by name (`sluice.core.deployment`): how each is made, and what is missing here."""

from __future__ import annotations

from sluice.core.address import split_target
from sluice.core.deployment import TARGETS, check_target
from sluice.core.errors import SluiceError
from sluice.runtime.base.runner import Runner

__all__ = ["available_targets", "make_runner"]


def make_runner(target: str, threads: int = 1) -> Runner:
    """The runner called ``target`` (of `sluice.core.deployment.TARGETS`) with ``threads`` threads inside an operator.

    A GPU has no such threads, and two tables must not differ by a number that means nothing: its targets take 1 alone.
    A target with an address (`sluice.core.address`) runs where `sluice serve` answers.

    Raises:
        SluiceError: there is no such target, or its runtime or device is not here.
    """
    name, address = split_target(check_target(target))
    if address:
        from sluice.runtime.remote.client import RemoteRunner

        return RemoteRunner(name, address, threads)
    if reason := _missing(target):
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
