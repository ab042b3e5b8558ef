"""OpenVINO on the CPU.

1. One stream with a fixed number of threads, none of them bound to a core, and static shapes.
2. A synchronous inference computes in the calling thread and, if there are more threads, in helpers. So the clock of
   one thread is the CPU time of the caller. An asynchronous inference would compute in another thread.
3. The file alone says what is computed in which type. By itself OpenVINO computes an fp32 network in bf16 where the CPU
   has it, so the precision hint is always ``f32``. A file that is strongly typed in bf16
   (`sluice.passes.precision.half`) is computed in bf16 with that hint, and what stays float32 in it stays so; with the
   hint ``bf16`` that would be bf16 as well. On a CPU without products in fp16, a file in fp16 is computed in fp32, or
   in bf16 with the hint ``f16``. So a file in 16 bits is refused where the CPU lacks the type, or no product of its
   engine is taken in it. int8 is pairs of ``QuantizeLinear`` and ``DequantizeLinear`` in ONNX Runtime's form
   (`sluice.passes.precision.qdq_placement`), which OpenVINO computes in integers.
4. Subnormal numbers are flushed. The property for it changes the mode of the thread that compiles, for good, and an
   engine keeps the mode of the thread in which it first ran. So all inferences run in a thread that flushes, and the
   caller's mode is put back (`sluice.runtime.base.denormals`).
5. A part of a network is timed as it is laid out inside the network (`sluice.runtime.openvino.part`).
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.base.denormals import floating_point_mode
from sluice.runtime.base.host import cpu_clock, host_device
from sluice.runtime.base.inputs import Dims, made_up, parsed, place, serialized, static_shapes
from sluice.runtime.base.runner import Clock
from sluice.runtime.openvino.part import build_inside, products_in

if TYPE_CHECKING:
    import onnx

    from sluice.runtime.base.inputs import Model

__all__ = ["OpenVinoRunner", "OpenVinoSession", "missing"]

# By the type of a file: what OpenVINO calls it in its kernels, and among the abilities of a device.
HALVES = {"bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}


def missing() -> str:
    """Why engines cannot run here, and what to do; empty where they can."""
    if not find_spec("openvino"):
        return "OpenVINO is not installed; install it with 'pip install openvino'"
    try:
        there = "CPU" in _core().available_devices
    except (ImportError, OSError, RuntimeError) as error:
        return f"the installed OpenVINO cannot be used ({first_line(error)}); install it anew"
    return "" if there else "the installed OpenVINO has no plugin for CPUs; install it with 'pip install openvino'"


@dataclass(frozen=True, slots=True)
class OpenVinoRunner:
    """OpenVINO's CPU plugin, one stream with ``threads`` threads."""

    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise SluiceError(f"cannot run with threads={self.threads}; give 1 or more")

    @property
    def clock(self) -> Clock:
        """``"thread_cpu"`` for one thread where the system can measure it, else ``"wall"``."""
        return cpu_clock(self.threads)

    @property
    def device(self) -> str:
        return host_device()

    @property
    def version(self) -> str:
        import openvino

        return str(openvino.get_version())

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> OpenVinoSession:
        """A session for ``model``; the arguments are those of `sluice.runtime.ort.cpu.OrtRunner.build`.

        Raises:
            SluiceError: the model cannot be loaded, or this CPU does not compute in its type (rule 3).
        """
        where = place(model)
        proto, shapes = parsed(model), static_shapes(model, batch, feeds_shapes or {})
        engine = self._compiled(model, where, shapes.inputs)
        _check_half(proto, where, engine)
        return OpenVinoSession(engine, self.clock, proto, shapes.inputs, where)

    def build_part(self, model: onnx.ModelProto) -> OpenVinoSession:
        """A session for a part of a network with static shapes, laid out as inside the network; it is for timing.

        Raises `SluiceError` as `build` does.
        """
        where = place(model)
        engine, laid_out, kernels = build_inside(model, lambda given: self._compiled(given, where, {}))
        _check_half(model, where, engine)
        shapes = static_shapes(laid_out, None, {})
        return OpenVinoSession(engine, self.clock, laid_out, shapes.inputs, where, kernels)

    def _compiled(self, model: Model, where: str, shapes: Mapping[str, Dims]) -> Any:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,
            "ENABLE_HYPER_THREADING": True,  # the threads that are asked for, whichever cores they get
            "SCHEDULING_CORE_TYPE": "ANY_CORE",
            "INFERENCE_PRECISION_HINT": "f32",
            "CPU_DENORMALS_OPTIMIZATION": True,
        }
        source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else serialized(model)
        try:
            with floating_point_mode(flush=True):
                read = _core().read_model(source)
                dims = {name: [-1 if not isinstance(d, int) else d for d in shape] for name, shape in shapes.items()}
                if dims:
                    read.reshape(dims)
                engine = _core().compile_model(read, "CPU", settings)
        except Exception as error:  # OpenVINO's exceptions share no public base class
            raise SluiceError(f"OpenVINO cannot load {where}: {_reason(error)}; check the model") from error
        if (threads := engine.get_property("INFERENCE_NUM_THREADS")) != self.threads:
            raise SluiceError(f"OpenVINO cannot run with threads={self.threads} here; give {threads} or less")
        return engine


class OpenVinoSession:
    """One engine; made by `OpenVinoRunner.build` or `OpenVinoRunner.build_part`.

    ``kernels`` are those of a part, by how often each runs (`sluice.runtime.openvino.part`, rule 5).
    """

    def __init__(
        self,
        engine: Any,
        clock: Clock,
        model: onnx.ModelProto,
        shapes: Mapping[str, Dims],
        where: str,
        kernels: Counter[Hashable] | None = None,
    ) -> None:
        from onnx import helper

        self.kernels = kernels
        self._engine, self._where, self._shapes = engine, where, dict(shapes)
        self._clock: Clock = clock
        self._now_ns = time.thread_time_ns if clock == "thread_cpu" else time.perf_counter_ns
        kinds = {info.name: info.type.tensor_type.elem_type for info in (*model.graph.input, *model.graph.output)}
        self._types = {name: np.dtype(helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()}
        self._outputs = [info.name for info in model.graph.output]
        self._request: Any = None
        self._timed: Any = None
        self._held: dict[tuple[int, str], np.ndarray] = {}

    @property
    def clock(self) -> Clock:
        return self._clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        given = {name: np.asarray(value) for name, value in feeds.items()}
        self._check(given)
        if self._request is None:
            self._request = self._engine.create_infer_request()
        for name, value in given.items():
            self._give(self._request, name, np.ascontiguousarray(value))
        try:
            with floating_point_mode(flush=True):
                self._request.infer(share_outputs=True)
        except RuntimeError as error:  # sizes that do not fit each other
            shapes = {name: value.shape for name, value in given.items()}
            raise SluiceError(
                f"OpenVINO cannot run {self._where} on inputs {shapes}: {_reason(error)}; the model takes {self._takes}"
            ) from error
        return {name: self._array(name) for name in self._outputs}

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst on resident inputs.

        One inference goes before the clock starts: other sessions have left their data in the caches.
        """
        if self._timed is None:
            self._timed = self._bound()
        infer = functools.partial(self._timed.infer, share_outputs=True)  # else every run copies its outputs
        with floating_point_mode(flush=True):
            infer()
            start = self._now_ns()
            for _ in range(repeats):
                infer()
            return (self._now_ns() - start) / repeats * 1e-6

    def _bound(self) -> Any:
        """An inference on made-up inputs."""
        request = self._engine.create_infer_request()
        for name, shape in self._shapes.items():
            dtype = self._types[name]
            if dtype.hasobject:
                raise SluiceError(f"cannot time {self._where}: input {name!r} holds text; give it numbers")
            wide = np.dtype(np.float32) if dtype.name == "bfloat16" else dtype
            self._give(request, name, made_up(name, shape, wide, self._where).astype(dtype, copy=False))
        return request

    def _give(self, request: Any, name: str, value: np.ndarray) -> None:
        """Set an input. A tensor may lie in the array's memory, and does not keep it, so the session does."""
        from openvino import Tensor, Type

        self._held[id(request), name] = value
        if value.dtype.name == "bfloat16":  # which numpy itself does not know
            request.set_tensor(name, Tensor(value.view(np.uint16), value.shape, Type.bf16))
        else:
            request.set_tensor(name, Tensor(value, shared_memory=True))

    def _array(self, name: str) -> np.ndarray:
        data, dtype = self._request.get_tensor(name).data, self._types[name]
        return np.array(data.view(dtype).astype(np.float32) if dtype.name == "bfloat16" else data)

    @property
    def _takes(self) -> str:
        return ", ".join(f"{name}: {self._types[name]} {list(shape)}" for name, shape in self._shapes.items())

    def _check(self, given: Mapping[str, np.ndarray]) -> None:
        for name in {**self._shapes, **given}:
            if name not in self._shapes or name not in given:
                raise SluiceError(
                    f"cannot run {self._where} with inputs {sorted(given)}; the model takes {self._takes}"
                )
            shape, wanted = given[name].shape, self._shapes[name]
            fits = len(shape) == len(wanted) and all(
                size == want or not isinstance(want, int) for size, want in zip(shape, wanted, strict=True)
            )
            if not fits or given[name].dtype != self._types[name]:
                raise SluiceError(
                    f"cannot run {self._where} with input {name!r} of {given[name].dtype} {list(shape)}; "
                    f"the model takes {self._takes}"
                )


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _check_half(model: onnx.ModelProto, where: str, engine: Any) -> None:
    """Rule 3."""
    from onnx import helper

    graph = model.graph
    codes = {tensor.data_type for tensor in graph.initializer}
    codes |= {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
    kinds = {helper.tensor_dtype_to_np_dtype(code).name for code in codes if code}
    for name, (kernel, ability) in HALVES.items():
        if name not in kinds:
            continue
        products = products_in(engine)
        if ability not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") or (
            products and kernel not in products
        ):
            raise SluiceError(
                f"{where} is in {name}, in which OpenVINO takes no products on this CPU; choose fp32, int8 or another "
                f"device"
            )


def _reason(error: BaseException) -> str:
    """What OpenVINO says, without the places in its own sources."""
    lines = [line.strip("- ") for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from ", "Check '", "FrontEnd API"))]
    return " ".join(told[:3]).rstrip(".:") or first_line(error)
