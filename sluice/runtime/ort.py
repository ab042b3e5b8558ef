"""ONNX Runtime on the CPU.

1. Shapes are made static before the graph is optimised: every named dynamic dimension gets its size as a free
   dimension override, so that layout and memory planning are those of the deployed engine.
2. One thread: all the work runs in the thread that calls, so the CPU time of that thread is the latency on an idle
   core, and the waiting for other processes does not count. More threads: wall time, the only clock that sees them all.
3. Inputs are random normal numbers (integers and booleans are ones), never zeros: zeros are faster than data.
   Subnormal numbers are flushed while timing, because they are many times slower and deep random networks drift into
   them. ONNX Runtime's own option does so for its pool threads; for the calling thread it acts only with the first
   session of the process, and then for good. So the calling thread's mode is set here for the burst and put back, and
   a caller's arithmetic never changes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.errors import SluiceError
from sluice.runtime.runner import Clock

if TYPE_CHECKING:
    import onnx

__all__ = ["OrtRunner", "OrtSession"]

DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}

# Where the C library keeps the flush-to-zero bits in its floating-point environment: offset of a 32-bit word, bits.
FLUSH_BITS: dict[tuple[str, str], tuple[int, int]] = {
    ("linux", "x86_64"): (28, 0x8040),
    ("linux", "aarch64"): (0, 1 << 24),
}

# A coarser CPU-time clock (Windows counts in ticks of 15.6 ms) cannot time a burst of a few milliseconds.
MAX_CLOCK_RESOLUTION_S = 1e-5


@dataclass(frozen=True, slots=True)
class OrtRunner:
    """ONNX Runtime, CPU execution provider, ``threads`` threads inside an operator, one operator at a time."""

    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise SluiceError(f"cannot run with threads={self.threads}; give 1 or more")

    @property
    def clock(self) -> Clock:
        """``"thread_cpu"`` for one thread where the system can measure it, else ``"wall"``."""
        fine = time.get_clock_info("thread_time").resolution <= MAX_CLOCK_RESOLUTION_S
        return "thread_cpu" if self.threads == 1 and fine else "wall"

    def build(
        self,
        model: onnx.ModelProto | bytes | str | os.PathLike[str],
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> OrtSession:
        """A session for ``model``.

        ``batch`` is the size of every dynamic first dimension; ``feeds_shapes[input]`` is a whole shape and wins over
        it. Dimensions that stay dynamic are allowed for `OrtSession.run`, refused by `OrtSession.sample`.
        Raises `SluiceError` with the file's name and ONNX Runtime's reason where the model cannot be loaded.
        """
        import onnxruntime as ort

        where = str(Path(model)) if isinstance(model, (str, os.PathLike)) else "the model in memory"
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        shapes = _static_shapes(model, where, batch, feeds_shapes or {})
        for name, size in shapes.sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        source = str(Path(model)) if isinstance(model, (str, os.PathLike)) else _serialized(model)
        try:
            with _floating_point_mode(flush=False):
                session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        # ORT's exceptions share no base class of their own.
        except Exception as error:
            raise SluiceError(f"ONNX Runtime cannot load {where}: {_first_line(error)}; check the model") from error
        return OrtSession(session, self.clock, shapes.inputs, where)


class OrtSession:
    """One engine in ONNX Runtime; made by `OrtRunner.build`."""

    def __init__(
        self, session: Any, clock: Clock, shapes: Mapping[str, Sequence[int | str | None]], where: str
    ) -> None:
        self._session = session
        self._clock: Clock = clock
        self._now_ns = time.thread_time_ns if clock == "thread_cpu" else time.perf_counter_ns
        self._shapes = dict(shapes)
        self._where = where
        self._outputs = [output.name for output in session.get_outputs()]
        self._binding: Any = None

    @property
    def clock(self) -> Clock:
        return self._clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        try:
            outputs = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            shapes = {name: tuple(np.shape(value)) for name, value in feeds.items()}
            raise SluiceError(
                f"ONNX Runtime cannot run {self._where} on inputs {shapes}: {_first_line(error)}; "
                f"the model takes {self._signature()}"
            ) from error
        return dict(zip(self._outputs, outputs, strict=True))

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst on resident inputs.

        One inference goes before the clock starts: what other sessions left in the caches is theirs, while a deployed
        engine finds its own weights there as far as they fit.
        """
        if self._binding is None:
            self._binding = self._bind()
        run, binding = self._session.run_with_iobinding, self._binding
        run(binding)
        with _floating_point_mode(flush=True):
            start = self._now_ns()
            for _ in range(repeats):
                run(binding)
            return (self._now_ns() - start) / repeats * 1e-6

    def _bind(self) -> Any:
        import onnxruntime as ort

        rng = np.random.default_rng(0)
        binding = self._session.io_binding()
        for meta in self._session.get_inputs():
            shape = self._shapes.get(meta.name, meta.shape)
            if not all(isinstance(size, int) for size in shape):
                raise SluiceError(
                    f"cannot time {self._where}: input {meta.name!r} has dynamic shape {list(shape)}; "
                    f"give its size with batch= or feeds_shapes="
                )
            dtype = DTYPES.get(meta.type)
            if dtype is None:
                raise SluiceError(
                    f"cannot time {self._where}: input {meta.name!r} is {meta.type}, for which no data can be made up; "
                    f"use one of {', '.join(DTYPES)}"
                )
            floating = np.issubdtype(dtype, np.floating)
            data = rng.standard_normal(shape).astype(dtype) if floating else np.ones(shape, dtype)
            binding.bind_ortvalue_input(meta.name, ort.OrtValue.ortvalue_from_numpy(np.asarray(data)))
        for name in self._outputs:
            binding.bind_output(name)
        return binding

    def _signature(self) -> str:
        return ", ".join(f"{meta.name}: {meta.type} {meta.shape}" for meta in self._session.get_inputs())


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Sizes of named dimensions, and the shape of every input as far as it is known."""

    sizes: Mapping[str, int]
    inputs: Mapping[str, tuple[int | str | None, ...]]


def _static_shapes(
    model: onnx.ModelProto | bytes | str | os.PathLike[str],
    where: str,
    batch: int | None,
    feeds_shapes: Mapping[str, Sequence[int]],
) -> _Shapes:
    """What ``batch`` and ``feeds_shapes`` say about the dynamic dimensions of the model's inputs."""
    if batch is None and not feeds_shapes:
        return _Shapes({}, {})
    if batch is not None and batch < 1:
        raise SluiceError(f"cannot build {where} with batch={batch}; give 1 or more")
    graph = _parsed(model, where).graph
    initializers = {tensor.name for tensor in graph.initializer}
    declared = {value.name: _dims(value) for value in graph.input if value.name not in initializers}
    unknown = sorted(set(feeds_shapes) - set(declared))
    if unknown:
        raise SluiceError(f"{where} has no input {unknown[0]!r}; its inputs are {sorted(declared)}")
    sizes: dict[str, int] = {}
    inputs: dict[str, tuple[int | str | None, ...]] = {}
    for name, dims in declared.items():
        wanted: list[int | None] = [None] * len(dims)
        if name in feeds_shapes:
            wanted = list(feeds_shapes[name])
        elif batch is not None and dims and not isinstance(dims[0], int):
            wanted[0] = batch
        fits = len(wanted) == len(dims) and all(
            not isinstance(dim, int) or size in (None, dim) for dim, size in zip(dims, wanted, strict=True)
        )
        if not fits:
            raise SluiceError(f"input {name!r} of {where} has shape {list(dims)}, which {wanted} does not fit; mend it")
        for dim, size in zip(dims, wanted, strict=True):
            if isinstance(dim, str) and size is not None and sizes.setdefault(dim, size) != size:
                raise SluiceError(
                    f"dimension {dim!r} of {where} is given two sizes, {sizes[dim]} and {size} (input {name!r}); "
                    f"give it one"
                )
        inputs[name] = tuple(dim if size is None else size for dim, size in zip(dims, wanted, strict=True))
    resolved = {
        name: tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        for name, dims in inputs.items()
    }
    return _Shapes(sizes, resolved)


def _parsed(model: onnx.ModelProto | bytes | str | os.PathLike[str], where: str) -> onnx.ModelProto:
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load_model(model, load_external_data=False)
    except Exception as error:
        raise SluiceError(f"cannot load {where}: {_first_line(error)}; check that it is an ONNX file") from error


def _serialized(model: Any) -> bytes:
    if isinstance(model, bytes):
        return model
    try:
        data: bytes = model.SerializeToString()
    except ValueError as error:
        raise SluiceError(
            f"the model in memory is too large for one protobuf ({_first_line(error)}); "
            f"save it with external data and give the path"
        ) from error
    return data


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def _floating_point_mode(*, flush: bool) -> Iterator[None]:
    """Put the calling thread's floating-point mode back afterwards; with ``flush``, subnormals are zero in between.

    On systems that `FLUSH_BITS` does not know, ONNX Runtime's option is all there is.
    """
    place = FLUSH_BITS.get((sys.platform, platform.machine()))
    if place is None:
        yield
        return
    library = ctypes.CDLL(None)
    saved = (ctypes.c_uint32 * 16)()
    library.fegetenv(saved)
    offset, bits = place
    if flush:
        flushing = (ctypes.c_uint32 * 16)(*saved)
        flushing[offset // 4] |= bits
        library.fesetenv(flushing)
    try:
        yield
    finally:
        library.fesetenv(saved)
