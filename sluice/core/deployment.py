"""Where and how a network is to run is one value, checked once and handed on.

The names that it may hold are here as well, whether or not a runtime is installed or can run on this machine
(`sluice.runtime.targets` knows that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.core.address import split_target, target_at
from sluice.core.errors import SluiceError

__all__ = ["ON_CPU", "PRECISIONS", "TARGETS", "UNFIT", "Deployment", "check_fit", "check_precision", "check_target"]

TARGETS = ("ort-cpu", "openvino", "ort-cuda", "torch-cuda", "tensorrt")
ON_CPU = frozenset({"ort-cpu", "openvino"})  # the others run on a GPU
PRECISIONS = ("fp32", "fp16", "bf16", "int8")

# What a runtime would refuse piece by piece, or run as another network than the one that is asked for.
UNFIT: Mapping[tuple[str, str], str] = {
    ("ort-cuda", "int8"): "its CUDA provider computes int8 pairs in floating point",
    ("torch-cuda", "int8"): "it has no int8 convolutions",
    ("ort-cuda", "bf16"): "numpy cannot hand it bfloat16",
    ("ort-cpu", "bf16"): "it has no bfloat16 convolutions on a CPU",
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """Runtime, inputs at once, threads inside an operator, and precision of the network on the device.

    A target on another machine is given as ``"tensorrt@jetson:8765"`` (`sluice.core.address`); ``target`` is then the
    name alone, ``address`` the rest, and ``place`` both. The address says how the device is reached, not what is
    measured, so tables and jobs know nothing of it.

    Raises:
        SluiceError: there is no such target or precision, the target cannot be timed in it (`UNFIT`), or a count is
            no whole number of 1 or more.
    """

    target: str = "ort-cpu"
    batch: int = 1
    threads: int = 1
    precision: str = "fp32"
    address: str = ""

    def __post_init__(self) -> None:
        name, address = split_target(target_at(self.target, self.address))
        object.__setattr__(self, "target", name)
        object.__setattr__(self, "address", address)
        check_fit(self.target, check_precision(self.precision))
        counts = (self.batch, self.threads)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in counts):
            raise SluiceError(
                f"a deployment with batch={self.batch!r}, threads={self.threads!r} cannot run; give whole numbers of 1 "
                "or more"
            )

    @property
    def place(self) -> str:
        """The target with its address, if it has one."""
        return target_at(self.target, self.address)


def check_target(target: str) -> str:
    """The name, with its address if it has one, checked; whether the target is here is not asked.

    Raises:
        SluiceError: there is no such target, or the address is none.
    """
    if split_target(target)[0] not in TARGETS:
        raise SluiceError(f"there is no target {target!r}; choose one of {', '.join(TARGETS)}")
    return target


def check_precision(precision: str) -> str:
    """The name, checked.

    Raises:
        SluiceError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise SluiceError(f"there is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    return precision


def check_fit(target: str, precision: str) -> None:
    """Can engines of this precision be timed on this target, wherever it is?

    Raises:
        SluiceError: there is no such target, or it cannot (`UNFIT`).
    """
    if reason := UNFIT.get((split_target(check_target(target))[0], precision)):
        raise SluiceError(f"{target} cannot be timed in {precision}: {reason}; choose fp16, or another target")
