"""The GPU as its driver describes it, through ctypes: neither torch nor a toolkit has to be installed.

Two libraries come with every driver. ``libcuda`` knows the devices in the order and selection that programs see
(``CUDA_VISIBLE_DEVICES``); NVML knows the version of the driver, the clocks and
what holds them back. Device 0 is the one that is used.
"""

from __future__ import annotations

import ctypes
import sys
import uuid as identity
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "GpuState", "compute_capability", "cudnn_version", "device_name", "driver_version", "gpu_names", "gpu_state",
    "missing", "sm_clock_mhz", "uuid",
]  # fmt: skip

LIBCUDA = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
NVML = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1",)
CUDNN = ("cudnn64_9.dll",) if sys.platform == "win32" else ("libcudnn.so.9",)
SM_CLOCK = 1  # NVML_CLOCK_SM
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
TEXT = 256
ON_CHIP = 0  # NVML_TEMPERATURE_GPU
# Bits of nvmlClocksThrottleReasons that make measurements slower.
HELD_BACK = {
    0x4: "the power limit",
    0x8: "a slowdown of the hardware",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "the power brake of the hardware",
}


@dataclass(frozen=True, slots=True)
class GpuState:
    """Clock now and at most in MHz, temperature in degrees Celsius, power limit in watts, what holds the clock back.

    What the driver does not tell is None.
    """

    sm_mhz: int
    most_mhz: int | None
    celsius: int | None
    limit_w: int | None
    held_back: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people, with the command that locks the clock."""
        parts = [f"the GPU computes at {self.sm_mhz} MHz"]
        parts += [f"of {self.most_mhz}"] if self.most_mhz is not None else []
        told = " ".join(parts)
        told += f", {self.celsius} degrees" if self.celsius is not None else ""
        told += f", power limit {self.limit_w} W" if self.limit_w is not None else ""
        told += f", held back by {' and '.join(self.held_back)}" if self.held_back else ""
        return [told, f"steadier figures: sudo nvidia-smi -lgc {self.sm_mhz} (and -rgc afterwards)"]


def gpu_names() -> tuple[str, ...]:
    """Names of the GPUs that this process may use; empty where there is no driver or no GPU."""
    cuda, count, handle = load(LIBCUDA), ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    names = []
    for index in range(count.value):
        text = ctypes.create_string_buffer(TEXT)
        if cuda.cuDeviceGet(ctypes.byref(handle), index) or cuda.cuDeviceGetName(text, TEXT, handle):
            return ()
        names.append(text.value.decode())
    return tuple(names)


def device_name() -> str:
    """The name of the GPU that engines run on."""
    return next(iter(gpu_names()), "no GPU")


def compute_capability() -> tuple[int, int] | None:
    """Major and minor number of device 0's architecture; None where its driver does not tell."""
    cuda, handle = load(LIBCUDA), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), 0):
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, handle) or cuda.cuDeviceGetAttribute(
        ctypes.byref(minor), MINOR, handle
    )
    return None if failed else (major.value, minor.value)


def uuid() -> str:
    """The identity of device 0 among all GPUs, as ``nvidia-smi -L`` writes it; ``"no GPU"`` where it is not told."""
    cuda, handle, number = load(LIBCUDA), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if (
        cuda is None
        or cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(handle), 0)
        or cuda.cuDeviceGetUuid(ctypes.byref(number), handle)
    ):
        return "no GPU"
    return f"GPU-{identity.UUID(bytes=bytes(number))}"


def cudnn_version() -> str:
    """The version of the cuDNN that programs find here, ``"unknown"`` where there is none."""
    cudnn = load(CUDNN)
    if cudnn is None:
        return "unknown"
    number = int(cudnn.cudnnGetVersion())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def missing() -> str:
    """The reason why there is no GPU to run on, and what to do; empty where there is one."""
    if gpu_names():
        return ""
    return "there is no NVIDIA GPU that its driver lets this process use; run on a machine with one"


def driver_version() -> str:
    """The version of the NVIDIA driver, ``"unknown"`` where NVML does not tell."""
    nvml, text = load(NVML), ctypes.create_string_buffer(TEXT)
    if nvml is None or nvml.nvmlInit_v2():
        return "unknown"
    try:
        return "unknown" if nvml.nvmlSystemGetDriverVersion(text, TEXT) else text.value.decode()
    finally:
        nvml.nvmlShutdown()


def sm_clock_mhz() -> int | None:
    """The clock at which device 0 computes right now; None where NVML does not tell."""
    found = gpu_state()
    return None if found is None else found.sm_mhz


def gpu_state() -> GpuState | None:
    """What holds the clock of device 0 where it is, right now; None where NVML does not tell the clock."""
    cuda, nvml = load(LIBCUDA), load(NVML)
    if cuda is None or nvml is None or cuda.cuInit(0) or nvml.nvmlInit_v2():
        return None
    try:
        bus, device, handle = ctypes.create_string_buffer(TEXT), ctypes.c_int(), ctypes.c_void_p()
        # The two libraries count devices differently; the address on the bus is common to both.
        if (
            cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetPCIBusId(bus, TEXT, device)
            or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
        ):
            return None

        def told(name: str, kind: type[ctypes.c_uint | ctypes.c_ulonglong], *which: int) -> int | None:
            value = kind()
            failed = getattr(nvml, name)(handle, *which, ctypes.byref(value))
            return None if failed else int(value.value)

        clock = told("nvmlDeviceGetClockInfo", ctypes.c_uint, SM_CLOCK)
        if clock is None:
            return None
        reasons = told("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong) or 0
        limit_mw = told("nvmlDeviceGetPowerManagementLimit", ctypes.c_uint)
        return GpuState(
            clock,
            told("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, SM_CLOCK),
            told("nvmlDeviceGetTemperature", ctypes.c_uint, ON_CHIP),
            None if limit_mw is None else limit_mw // 1000,
            tuple(name for bit, name in HELD_BACK.items() if reasons & bit),
        )
    finally:
        nvml.nvmlShutdown()


def load(names: Sequence[str]) -> Any:
    """The first library of these that there is, or None."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
