"""The calls of the CUDA runtime that timing an engine needs, over ctypes: a device needs no package for them.

1. The library is found by its name, else inside a wheel (NVIDIA's own, or the folder of torch, which is not imported).
2. Handles (memory, streams, events, graphs) are addresses, plain integers. The caller that asks for one gives it back.
3. Every call is checked. A failure is a `SluiceError` with CUDA's own words; the error is cleared, so that the next
   call does not report it a second time.
4. A graph is captured in the thread-local mode: other threads may go on allocating memory meanwhile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["Cuda", "Resources"]

Where = tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]


# Names, and patterns of files inside packages.
LINUX: Where = (
    ("libcudart.so.13", "libcudart.so.12", "libcudart.so"),
    {
        "nvidia": ("cu[0-9]*/lib/libcudart.so*", "cuda_runtime/lib/libcudart.so*"),
        "torch": ("lib/libcudart*.so*",),
    },
)
WINDOWS: Where = (
    ("cudart64_13.dll", "cudart64_12.dll"),
    {
        "nvidia": ("cu[0-9]*/bin/**/cudart64_*.dll", "cuda_runtime/bin/cudart64_*.dll"),
        "torch": ("lib/cudart64_*.dll",),
    },
)
NAMES, FOLDERS = WINDOWS if sys.platform == "win32" else LINUX

NON_BLOCKING = 1
THREAD_LOCAL_CAPTURE = 1
TO_DEVICE, TO_HOST = 1, 2

OUT_OF_MEMORY = 2
NO_DEVICE = (35, 100)  # a driver too old for the runtime, or none; no device
ADVICE = {OUT_OF_MEMORY: "free memory of the device or take a smaller batch"} | dict.fromkeys(
    NO_DEVICE, "run where an NVIDIA GPU is, with a driver that is as new as its CUDA"
)


class Cuda:
    """The current device of this process. ``library`` is libcudart, or a stand-in."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    @classmethod
    def load(cls) -> Cuda:
        """The CUDA runtime of this machine.

        Raises:
            SluiceError: there is none, or no device that it can use.
        """
        refused: SluiceError | None = None
        for name in (*NAMES, *_in_wheels()):
            try:
                cuda, count = cls(ctypes.CDLL(name)), ctypes.c_int()
                cuda._call("cudaGetDeviceCount", ctypes.byref(count))
            except OSError:
                continue
            except SluiceError as error:  # an older one may suit the driver
                refused = refused or error
                continue
            return cuda
        raise refused or SluiceError(
            "the CUDA runtime (libcudart) is not on this machine; install the CUDA toolkit or nvidia-cuda-runtime"
        )

    def malloc(self, count: int) -> int:
        """``count`` bytes on the device."""
        return self._handle("cudaMalloc", ctypes.c_size_t(count))

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is synchronized."""
        self._copy(address, array.ctypes.data, array, TO_DEVICE, stream)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Fill a contiguous array from the device; it is filled once the stream is synchronized."""
        self._copy(array.ctypes.data, address, array, TO_HOST, stream)

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cudaStreamCreateWithFlags", ctypes.c_uint(NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def event(self) -> int:
        """An event that takes the time (resolution about half a microsecond)."""
        return self._handle("cudaEventCreateWithFlags", ctypes.c_uint(0))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events; waits for the second."""
        self._call("cudaEventSynchronize", ctypes.c_void_p(end))
        found = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return found.value

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def begin_capture(self, stream: int) -> None:
        """From here to `end_capture` the stream's work is recorded, not done."""
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(THREAD_LOCAL_CAPTURE))

    def end_capture(self, stream: int) -> int:
        """The graph of the recorded work, ready to launch; `SluiceError` where some of it cannot be recorded."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cudaGraphDestroy", graph)
        return int(ready.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def _copy(self, to: int, source: int, array: np.ndarray, kind: int, stream: int) -> None:
        if not array.flags.c_contiguous:
            raise AssertionError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous")
        addresses = ctypes.c_void_p(to), ctypes.c_void_p(source)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cudaMemcpyAsync", *addresses, size, ctypes.c_int(kind), ctypes.c_void_p(stream))

    def _handle(self, name: str, *arguments: Any) -> int:
        found = ctypes.c_void_p()
        self._call(name, ctypes.byref(found), *arguments)
        return int(found.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(ctypes.c_int(status)).decode()
            advice = ADVICE.get(status, "see what nvidia-smi says of the device")
            raise SluiceError(f"{name} failed with CUDA error {status} ({text}); {advice}")


class Resources:
    """Handles taken from the device, given back in reverse order."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Callable[[int], None]]] = []

    def keep(self, handle: int, give_back: Callable[[int], None]) -> int:
        self._kept.append((handle, give_back))
        return handle

    def release(self) -> None:
        while self._kept:
            handle, give_back = self._kept.pop()
            give_back(handle)


def _in_wheels() -> Iterator[str]:
    for package, patterns in FOLDERS.items():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in patterns:
                # The newest first: a driver runs older programs, never the other way round.
                yield from map(str, sorted(Path(place).glob(pattern), reverse=True))
