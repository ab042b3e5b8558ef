"""ONNX Runtime on an NVIDIA GPU, its CUDA execution provider.

1. The provider needs the CUDA and cuDNN libraries, which `sluice.runtime.ort.session.load_library` loads before
   anything is asked of ONNX Runtime.
2. Inputs and outputs are bound to device memory and their addresses stay, so the whole inference is one CUDA graph. It
   runs with channels first, ONNX Runtime's default (6). Convolution algorithms are chosen when the engine is built:
   "EXHAUSTIVE" tries them all in old versions, and from 1.20 on takes the ranking of cuDNN's heuristics (mode B).
3. The clock is the device's: events on a stream of our own, on which the provider computes. Inferences of a burst are
   not waited for, so neither the launch nor the wait is in the figure, as long as the device takes longer than a
   launch. Versions that wait at every replay of a graph (before onnxruntime#28686) leave gaps, which the events
   contain. A provider without a stream (in tests) has the wall clock, and its outputs are waited for.
4. Nothing may run on the CPU unnoticed. A session that has no CUDA provider fell back as a whole, which its list of
   providers shows. A single operator without a CUDA kernel would be placed on the CPU; an entry of the session's
   configuration makes ONNX Runtime refuse that, and the reason is passed on. Models whose shapes are not static are
   for `run` alone, where small shape arithmetic on the CPU is allowed.
5. fp32 means what it means in the runtimes of a GPU by default: products may be taken in TF32.
6. With ``SLUICE_ORT_CUDA="prefer_nhwc=1"`` in the environment the provider lays activations out with the channels last,
   where its kernels can. Which layout is faster is a matter of network and device, and has been measured on none. The
   layout is part of the fingerprint, so no table mixes the two.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError
from sluice.runtime.base import nvidia
from sluice.runtime.base.cuda import Cuda, Resources
from sluice.runtime.base.inputs import Dims, place, static_shapes
from sluice.runtime.base.runner import Clock
from sluice.runtime.ort.session import compute, load_library, load_session, resident_inputs

if TYPE_CHECKING:
    from sluice.runtime.base.inputs import Model

__all__ = ["CUDA", "VARIABLE", "OrtCudaRunner", "OrtCudaSession", "Provider", "layout_asked", "missing"]

VARIABLE = "SLUICE_ORT_CUDA"
NHWC = "prefer_nhwc"
NO_GRAPH = "-1"  # the graph number under which ONNX Runtime neither captures nor replays


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider: the place of its memory, its options, and further options for static shapes."""

    name: str
    memory: str
    options: Mapping[str, str] = field(default_factory=dict)
    static_options: Mapping[str, str] = field(default_factory=dict)
    static_entries: Mapping[str, str] = field(default_factory=dict)
    stream: str = ""  # the option that takes the address of a stream; without one there are no events

    @property
    def clock(self) -> Clock:
        return "cuda" if self.stream else "wall"


CUDA = Provider(
    "CUDAExecutionProvider",
    "cuda",
    # Many engines are alive at a time, and an arena that doubles would hold the GPU's memory for a few of them.
    {"cudnn_conv_algo_search": "EXHAUSTIVE", "arena_extend_strategy": "kSameAsRequested"},
    {"enable_cuda_graph": "1"},
    {"session.disable_cpu_ep_fallback": "1"},
    "user_compute_stream",
)


def layout_asked(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The provider's option for the layout in `VARIABLE` (rule 6); nothing where it is not set.

    Raises:
        SluiceError: it holds something else.
    """
    text = environment.get(VARIABLE, "").strip()
    if text in ("", f"{NHWC}=0"):
        return {}
    if text != f"{NHWC}=1":
        raise SluiceError(f"{VARIABLE} holds {text!r}; give {NHWC}=1 for channels last, or leave it out")
    return {NHWC: "1"}


def missing() -> str:
    """Why engines cannot run here, and what to do; empty where they can."""
    if not find_spec("onnxruntime"):
        return "ONNX Runtime is not installed; install it with 'pip install onnxruntime-gpu'"
    if reason := nvidia.missing():
        return reason
    if reason := load_library(cuda=True):
        return reason
    import onnxruntime

    # A provider that is registered as a plugin is no part of the build, and shows as the provider of a device alone.
    devices = onnxruntime.get_ep_devices() if hasattr(onnxruntime, "get_ep_devices") else ()
    if CUDA.name not in {*onnxruntime.get_available_providers(), *(device.ep_name for device in devices)}:
        return "the installed ONNX Runtime has no CUDA provider; put 'pip install onnxruntime-gpu' in its place"
    return ""


@dataclass(frozen=True, slots=True)
class OrtCudaRunner:
    """ONNX Runtime, CUDA execution provider, device 0, in the layout that the environment asks for."""

    provider: Provider = CUDA
    layout: Mapping[str, str] = field(default_factory=layout_asked)

    @property
    def clock(self) -> Clock:
        return self.provider.clock

    @property
    def device(self) -> str:
        return nvidia.device_name()

    @property
    def version(self) -> str:
        import onnxruntime

        last = ", channels last" if self.layout else ""
        return (
            f"{onnxruntime.__version__}, CUDA {onnxruntime.cuda_version or 'none'}, cuDNN {nvidia.cudnn_version()}, "
            f"driver {nvidia.driver_version()}, {nvidia.uuid()}{last}"
        )

    def sm_clock_mhz(self) -> int | None:
        """The clock at which the device computes right now, where its driver tells."""
        return nvidia.sm_clock_mhz()

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> OrtCudaSession:
        """A session for ``model``; the arguments are those of `sluice.runtime.ort.cpu.OrtRunner.build`.

        Raises:
            SluiceError: ONNX Runtime or the model cannot be loaded, or not all of it runs on the GPU.
        """
        if self.provider == CUDA and (reason := load_library(cuda=True)):
            raise SluiceError(f"cannot run {place(model)}: {reason}")
        where, shapes = place(model), static_shapes(model, batch, feeds_shapes or {})
        static = all(isinstance(size, int) for shape in shapes.inputs.values() for size in shape)
        options = {**self.provider.options, **self.layout, **(self.provider.static_options if static else {})}
        stream = Stream(Cuda.load()) if self.provider.stream and static else None
        if stream is not None:
            options[self.provider.stream] = str(stream.address)
        session = load_session(
            model, shapes, (self.provider.name, options), entries=self.provider.static_entries if static else {}
        )
        if self.provider.name not in session.get_providers():
            raise SluiceError(
                f"ONNX Runtime put {where} on {', '.join(session.get_providers())}: its {self.provider.name} did not "
                f"start; install the CUDA and cuDNN libraries that this onnxruntime-gpu was built for"
            )
        return OrtCudaSession(session, self.provider, shapes.inputs, where, stream)


class Stream:
    """A stream, and the time between two events on it; given back with the last reference to it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, resources = cuda, Resources()
        release = weakref.finalize(self, resources.release)
        release.atexit = False  # the driver takes everything back, and may be gone before us
        self.address = resources.keep(cuda.stream(), cuda.destroy_stream)
        self._start, self._end = (resources.keep(cuda.event(), cuda.destroy_event) for _ in range(2))

    def milliseconds(self, work: Callable[[], None]) -> float:
        """What the device takes for what ``work`` puts on the stream."""
        self._cuda.record(self._start, self.address)
        work()
        self._cuda.record(self._end, self.address)
        return self._cuda.elapsed_ms(self._start, self._end)


class OrtCudaSession:
    """One engine in ONNX Runtime on the GPU; made by `OrtCudaRunner.build`."""

    ramps = True

    def __init__(
        self, session: Any, provider: Provider, shapes: Mapping[str, Dims], where: str, stream: Stream | None = None
    ) -> None:
        import onnxruntime as ort

        self._session, self._stream = session, stream
        self._clock, self._memory = provider.clock, provider.memory
        self._shapes = dict(shapes)
        self._where = where
        self._binding: Any = None
        # A graph reads and writes fixed addresses; a run with a caller's arrays goes without.
        self._plain = ort.RunOptions()
        self._plain.add_run_config_entry("gpu_graph_id", NO_GRAPH)
        self._unwaited = ort.RunOptions()
        self._unwaited.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @property
    def clock(self) -> Clock:
        return self._clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        return compute(self._session, self._where, feeds, self._plain)

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst on resident inputs (rule 3); the first captures the graph."""
        if self._binding is None:
            self._binding = self._bind()
        run, binding = self._session.run_with_iobinding, self._binding
        run(binding)
        if self._stream is not None:
            run(binding, self._unwaited)  # the device is busy while the burst is enqueued

            def burst() -> None:
                for _ in range(repeats):
                    run(binding, self._unwaited)

            return self._stream.milliseconds(burst) / repeats
        binding.synchronize_outputs()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            run(binding)
        binding.synchronize_outputs()
        return (time.perf_counter_ns() - start) / repeats * 1e-6

    def _bind(self) -> Any:
        import onnxruntime as ort

        feeds = resident_inputs(self._session, self._shapes, self._where)
        binding = self._session.io_binding()
        for name, data in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(data, self._memory, 0))
        for name, value in self.run(feeds).items():
            own = ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, self._memory, 0)
            binding.bind_ortvalue_output(name, own)
        return binding
