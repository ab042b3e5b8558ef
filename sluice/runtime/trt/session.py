"""One TensorRT engine on the device, launched as a CUDA graph and timed by events on its stream.

1. An engine keeps its inputs and outputs in device memory at fixed addresses. They are filled with random data once,
   never zeros, and stay: neither copies nor addresses change between inferences, and small networks find their data
   in the L2 cache, as they do behind another network on the device.
2. The first inferences of a context initialise it. `FIRST` of them run before the CUDA graph is captured; after that
   one launch is one inference, without the CPU's work per kernel. An engine that cannot be captured is enqueued each
   time: then the figure may hold the CPU's time too, and a line in the log says so.
3. One launch goes before the first event, so that the device is busy while the burst is enqueued and the events enclose
   the device's work alone.
4. Of a small network several inferences in a row are captured in one graph, as many as
   `sluice.runtime.base.runner.inferences_per_launch` says, and a burst is a whole number of launches.
"""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError
from sluice.runtime.base.cuda import Cuda, Resources
from sluice.runtime.base.inputs import made_up
from sluice.runtime.base.runner import Clock, inferences_per_launch
from sluice.runtime.trt.build import is_rtx, listener, product
from sluice.runtime.trt.inspect import EngineLayer, read_layers
from sluice.runtime.trt.timing import RuntimeCache

__all__ = ["TensorRtSession"]

FIRST = 2
# TensorRT's types by name; those that numpy lacks are in ml_dtypes.
NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
ML_DTYPES = {"BF16": "bfloat16", "FP8": "float8_e4m3fn"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of an engine, and where it lies on the device."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    dtype: np.dtype
    address: int


class TensorRtSession:
    """One engine on the device; made by `TensorRtRunner`. Its memory is given back with the last reference to it."""

    def __init__(self, trt: Any, cuda: Cuda, plan: bytes, where: str, compiled: RuntimeCache | None = None) -> None:
        self._trt, self._cuda, self._where = trt, cuda, where
        self._log = listener(trt)
        self._log.errors.clear()
        # An engine needs the runtime that made it.
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise SluiceError(self._refused("load"))
        # Rule 7 of `sluice.runtime.trt.build`; the full TensorRT allocates scratch memory with the context.
        given = [trt.ExecutionContextAllocationStrategy.USER_MANAGED] if is_rtx(trt) else []
        self._context = self._engine.create_execution_context(*self._configured(given, compiled))
        if self._context is None:
            raise SluiceError(self._refused("run"))
        self._resources = Resources()
        self._release = weakref.finalize(self, self._resources.release)
        # At the end of the process the driver takes everything back, and may be gone before us.
        self._release.atexit = False
        self._stream = self._resources.keep(cuda.stream(), cuda.destroy_stream)
        if given:
            size = max(1, int(self._engine.device_memory_size_v2))
            self._context.set_device_memory(self._resources.keep(cuda.malloc(size), cuda.free), size)
        self._ports = [self._port(index) for index in range(self._engine.num_io_tensors)]
        self._events: tuple[int, int] | None = None
        self._graph: int | None = None
        self._copies = 1  # inferences in a launch
        self._prepared = False
        self._random = False
        self.kernels: Counter[Hashable] | None = None  # of a part of a network

    @property
    def clock(self) -> Clock:
        return "cuda"

    @property
    def captured(self) -> bool | None:
        """Are inferences launched as a CUDA graph? None before the first `sample`."""
        return self._graph is not None if self._prepared else None

    def layers(self) -> tuple[EngineLayer, ...]:
        """The engine's layers, with the ONNX nodes that each was made of."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        self._check(feeds)
        self._log.errors.clear()
        self._upload(feeds)
        self._random = False
        self._enqueue()
        found = {port.name: np.empty(port.shape, port.dtype) for port in self._ports if not port.is_input}
        for port in self._ports:
            if not port.is_input:
                self._cuda.download(found[port.name], port.address, self._stream)
        self._cuda.synchronize(self._stream)
        return found

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst of at least ``repeats`` on resident random inputs (rules 1 to 4)."""
        self._log.errors.clear()
        if not self._random:
            self._upload({port.name: self._data(port) for port in self._ports if port.is_input})
            self._random = True
        if not self._prepared:
            self._prepare()
            self._prepared = True
        launches = math.ceil(repeats / self._copies)
        return self._burst(launches) / (launches * self._copies)

    def _configured(self, given: list[Any], compiled: RuntimeCache | None) -> list[Any]:
        """How a context is made: with a runtime cache, if RTX knows it in this version."""
        if not given or compiled is None or not hasattr(self._engine, "create_runtime_config"):
            return given
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(*given)
        compiled.attach(config)
        return [config]

    def _port(self, index: int) -> Port:
        name = self._engine.get_tensor_name(index)
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0 or self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise SluiceError(
                f"{name!r} of {self._where} has no fixed size on the device (shape {list(shape)}); "
                f"make the model's shapes independent of its data"
            )
        kind = self._engine.get_tensor_dtype(name).name
        dtype = _dtype(kind)
        if dtype is None:
            raise SluiceError(
                f"{name!r} of {self._where} is {kind}, which has no numpy type; "
                f"use one of {', '.join([*NUMPY, *ML_DTYPES])}"
            )
        padded = self._padded(name, shape)
        size = max(1, int(np.prod(padded)) * dtype.itemsize)  # TensorRT refuses the address 0, also for nothing
        address = self._resources.keep(self._cuda.malloc(size), self._cuda.free)
        if not self._context.set_tensor_address(name, address):
            raise SluiceError(self._refused("run"))
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        return Port(name, is_input, padded, dtype, address)

    def _padded(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes in memory: of a format in vectors the channels are whole vectors."""
        axis, components = (
            self._engine.get_tensor_vectorized_dim(name),
            self._engine.get_tensor_components_per_element(name),
        )
        return tuple(-(-n // components) * components if k == axis else n for k, n in enumerate(shape))

    def _data(self, port: Port) -> np.ndarray:
        if port.dtype.name in ("int8", "uint8"):  # quantised data, not an index
            return np.random.default_rng(0).integers(-127 if port.dtype.kind == "i" else 0, 128, port.shape, port.dtype)
        # ml_dtypes' types are no floating types to numpy.
        drawn = np.dtype(np.float32) if port.dtype.name in ML_DTYPES.values() else port.dtype
        return made_up(port.name, port.shape, drawn, self._where).astype(port.dtype)

    def _upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        arrays = {port.name: np.ascontiguousarray(feeds[port.name]) for port in self._ports if port.is_input}
        for port in self._ports:
            if port.is_input:
                self._cuda.upload(port.address, arrays[port.name], self._stream)
        self._cuda.synchronize(self._stream)

    def _prepare(self) -> None:
        """Initialise the context, then capture it (rules 2 and 4)."""
        for _ in range(FIRST):
            self._enqueue()
        self._cuda.synchronize(self._stream)
        start, end = (self._resources.keep(self._cuda.event(), self._cuda.destroy_event) for _ in range(2))
        self._events = start, end
        self._graph = self._capture(1)
        if self._graph is None:
            return
        copies = inferences_per_launch(self._burst)
        if copies > 1 and (graph := self._capture(copies)) is not None:
            self._graph, self._copies = graph, copies

    def _capture(self, copies: int) -> int | None:
        with _nothing_collected():
            try:
                self._cuda.begin_capture(self._stream)
                enqueued = all([self._context.execute_async_v3(self._stream) for _ in range(copies)])
            except BaseException:
                # A stream that is left capturing is of no use to anyone.
                with suppress(SluiceError):
                    self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
                raise
            try:
                graph = self._cuda.end_capture(self._stream)
            except SluiceError as error:
                log.warning("%s is timed without a CUDA graph: %s", self._where, error)
                return None
        self._resources.keep(graph, self._cuda.destroy_graph)
        if not enqueued:
            log.warning("%s is timed without a CUDA graph: %s", self._where, self._log.reason())
            return None
        return graph

    def _burst(self, launches: int) -> float:
        """Milliseconds of ``launches``, behind another (rule 3)."""
        assert self._events is not None
        start, end = self._events
        self._infer()
        self._cuda.record(start, self._stream)
        for _ in range(launches):
            self._infer()
        self._cuda.record(end, self._stream)
        return self._cuda.elapsed_ms(start, end)

    def _infer(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise SluiceError(self._refused("run"))

    def _refused(self, what: str) -> str:
        reason = self._log.reason() or "it gives no reason"
        return (
            f"{product(self._trt)} cannot {what} the engine of {self._where}: {reason}; build it with this version on "
            f"this device, and see that the device's memory has room"
        )

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        wanted = {port.name: (port.shape, port.dtype) for port in self._ports if port.is_input}
        given = {name: (np.shape(value), np.asarray(value).dtype) for name, value in feeds.items()}
        if given != wanted:
            raise SluiceError(
                f"the engine of {self._where} cannot run on {_signature(given)}; it takes {_signature(wanted)}"
            )


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A session that is collected frees device memory, which a thread that is capturing must not do."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _dtype(kind: str) -> np.dtype | None:
    if kind in NUMPY:
        return np.dtype(NUMPY[kind])
    if kind not in ML_DTYPES:
        return None
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, ML_DTYPES[kind]))


def _signature(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{name}: {dtype} {list(shape)}" for name, (shape, dtype) in tensors.items()) or "nothing"
