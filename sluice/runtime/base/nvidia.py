"""The GPU as its driver describes it, through ctypes: neither torch nor a toolkit has to be installed.

Two libraries come with every driver. ``libcuda`` knows the devices in the order and selection that programs see
(``CUDA_VISIBLE_DEVICES``); NVML knows the version of the driver and the clocks. Device 0 is the one that is used.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["compute_capability", "device_name", "driver_version", "gpu_names", "missing", "sm_clock_mhz"]

LIBCUDA = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
NVML = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1",)
SM_CLOCK = 1  # NVML_CLOCK_SM
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
TEXT = 256


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
    cuda, nvml = load(LIBCUDA), load(NVML)
    if cuda is None or nvml is None or cuda.cuInit(0) or nvml.nvmlInit_v2():
        return None
    try:
        bus, device = ctypes.create_string_buffer(TEXT), ctypes.c_int()
        handle, clock = ctypes.c_void_p(), ctypes.c_uint()
        # The two libraries count devices differently; the address on the bus is common to both.
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetPCIBusId(bus, TEXT, device)
            or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
            or nvml.nvmlDeviceGetClockInfo(handle, SM_CLOCK, ctypes.byref(clock))
        )
        return None if failed else clock.value
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
