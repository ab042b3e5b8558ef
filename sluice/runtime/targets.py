"""The deployment runtimes by name (`sluice.core.deployment`): where each is, and what is missing here.

A runtime is a module with a class of runners and a function ``missing()``: the reason why its engines cannot run here,
empty where they can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from sluice.core.address import LOCAL, split_target
from sluice.core.deployment import ON_CPU, TARGETS, check_target
from sluice.core.errors import SluiceError
from sluice.runtime.base.runner import Runner, Session

if TYPE_CHECKING:
    import onnx

    from sluice.runtime.ort.cpu import OrtRunner

__all__ = ["available_targets", "make_runner", "untimed_runner", "untimed_session"]

# Module below `sluice.runtime` and class by target. A module is imported when its target is asked for.
RUNTIMES: Mapping[str, tuple[str, str]] = {
    "ort-cpu": ("ort.cpu", "OrtRunner"),
    "openvino": ("openvino.runner", "OpenVinoRunner"),
    "ort-cuda": ("ort.cuda", "OrtCudaRunner"),
    "torch-cuda": ("torch_cuda.runner", "TorchCudaRunner"),
    "tensorrt": ("trt.runner", "TensorRtRunner"),
}


def make_runner(target: str, threads: int = 1) -> Runner:
    """The runner called ``target`` (of `sluice.core.deployment.TARGETS`) with ``threads`` threads inside an operator.

    A GPU has no such threads, and two tables must not differ by a number that means nothing: its targets take 1 alone.
    A target with an address (`sluice.core.address`) runs where `sluice serve` answers, or in a child of this process.

    Raises:
        SluiceError: there is no such target, or its runtime or device is not here.
    """
    name, address = split_target(check_target(target))
    if address in ("", LOCAL):
        if reason := _missing(name):
            raise SluiceError(f"target {name!r} cannot run here: {reason}; targets that can: {_here()}")
        if name not in ON_CPU and threads != 1:
            raise SluiceError(f"cannot run target {name!r} with threads={threads}: a GPU has no such threads; give 1")
    if address:
        from sluice.runtime.remote.client import RemoteRunner

        return RemoteRunner(name, address, threads)
    make = getattr(_module(name), RUNTIMES[name][1])
    runner: Runner = make(threads) if name in ON_CPU else make()
    return runner


def untimed_runner() -> OrtRunner:
    """For the outputs of files and not for times: ONNX Runtime on the CPU, whose engines keep no memory between runs.

    Raises:
        SluiceError: it is not here.
    """
    if reason := _missing("ort-cpu"):
        raise SluiceError(f"files are run by ONNX Runtime: {reason}")
    from sluice.runtime.ort.cpu import OrtRunner

    return OrtRunner(timed=False)


def untimed_session(bare: onnx.ModelProto, tensors: Sequence[onnx.TensorProto]) -> Session:
    """An engine of `untimed_runner` for a model without its initialisers, which it reads where they lie."""
    from sluice.core.weight_bytes import with_tensors

    return untimed_runner().of_apart(with_tensors(bare, tensors))


def available_targets() -> dict[str, str]:
    """For every target the reason why it cannot run here, empty where it can; asks no more than is needed to know."""
    return {target: _missing(target) for target in TARGETS}


def _missing(target: str) -> str:
    return str(_module(target).missing())


def _module(target: str) -> ModuleType:
    return import_module(f"sluice.runtime.{RUNTIMES[target][0]}")


def _here() -> str:
    return ", ".join(target for target, reason in available_targets().items() if not reason) or "none"
