"""ONNX Runtime on the CPU.

1. Shapes are made static before the graph is optimised, so that layout and memory planning are those of the deployed
   engine.
2. With one thread all the work runs in the thread that calls, so that thread's CPU time is the clock
   (`sluice.runtime.base.host`, 3).
3. Workers go on spinning after a run, for a second and more by default, and every session has its own: sessions that
   take turns would find the cores busy with each other's. So a worker spins for `SPIN_US` here, longer than the gaps
   between kernels, and a burst begins when those of the session before have stopped. Twelve copies of one engine of
   0.12 ms in turns, two threads on two cores, in one run: median 0.217 ms and 9.0 s in all with the default, 0.188 ms
   and 1.8 s so; alone it is 0.127 ms.
4. A part of a network is timed as it is laid out inside the network (`sluice.runtime.ort.blocked_part`).
5. Inputs are made up (`sluice.runtime.base.inputs`), subnormal numbers are flushed while timing
   (`sluice.runtime.base.denormals`).
6. An engine that is not timed is lean (`sluice.runtime.ort.session`, 3): it gives the memory of its values back after
   every run. ONNX Runtime's arena keeps it, takes twice as much whenever it grows, and every session has its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.weight_bytes import Apart
from sluice.runtime.base.denormals import floating_point_mode
from sluice.runtime.base.host import cpu_clock, host_device
from sluice.runtime.base.inputs import Dims, Shapes, place, static_shapes
from sluice.runtime.base.runner import Clock
from sluice.runtime.ort.blocked_part import part_session
from sluice.runtime.ort.session import compute, load_library, load_session, resident_inputs

if TYPE_CHECKING:
    import onnx

    from sluice.runtime.base.inputs import Model

__all__ = ["OrtRunner", "OrtSession", "missing"]

SPIN_US = 100


def missing() -> str:
    """Why engines cannot run here, and what to do; empty where they can."""
    if not find_spec("onnxruntime"):
        return "ONNX Runtime is not installed; install it with 'pip install onnxruntime'"
    # A build for GPUs may need the libraries of CUDA on the CPU as well.
    return load_library(cuda=False) and load_library(cuda=True)


@dataclass(frozen=True, slots=True)
class OrtRunner:
    """ONNX Runtime, CPU execution provider, ``threads`` threads inside an operator, one operator at a time.

    ``as_written``: engines compute operator by operator, in the types that the file gives, for figures of the file.
    ``timed``: engines keep the memory of their values from run to run, as deployed ones do (rule 6).
    """

    threads: int = 1
    as_written: bool = False
    timed: bool = True

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
        import onnxruntime

        return str(onnxruntime.__version__)

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> OrtSession:
        """A session for ``model``.

        ``batch`` is the size of every dynamic first dimension; ``feeds_shapes[input]`` is a whole shape and wins over
        it. Dimensions that stay dynamic are allowed for `OrtSession.run`, refused by `OrtSession.sample`.
        Raises `SluiceError` with the file's name and ONNX Runtime's reason where the model cannot be loaded.
        """
        given = batch is not None or bool(feeds_shapes)
        shapes = static_shapes(model, batch, feeds_shapes or {}) if given else Shapes()
        session = load_session(
            model, shapes, "CPUExecutionProvider", threads=self.threads, entries=self._entries,
            optimize=not self.as_written, lean=not self.timed,
        )  # fmt: skip
        return OrtSession(session, self.clock, shapes.inputs, place(model), self.threads)

    def of_apart(self, model: Apart) -> OrtSession:
        """A session for a model whose weights lie beside it."""
        session = load_session(
            model, Shapes(), "CPUExecutionProvider", threads=self.threads, entries=self._entries,
            optimize=not self.as_written, lean=not self.timed,
        )  # fmt: skip
        return OrtSession(session, self.clock, {}, place(model.light), self.threads)

    def build_part(self, model: onnx.ModelProto) -> OrtSession:
        """A session for a part of a network with static shapes, laid out as inside the network
        (`sluice.runtime.ort.blocked_part`).

        It is for timing: its inputs may be blocks of channels, its outputs are shapes. Raises `SluiceError` as `build`
        does.
        """
        session, kernels = part_session(model, self.threads, self._entries)
        return OrtSession(session, self.clock, {}, place(model), self.threads, kernels)

    @property
    def _entries(self) -> dict[str, str]:
        return {"session.intra_op.spin_duration_us": str(SPIN_US)} if self.threads > 1 else {}


class OrtSession:
    """One engine in ONNX Runtime on the CPU; made by `OrtRunner.build` or `OrtRunner.build_part`.

    ``kernels`` are those of a part, by how often each runs (`sluice.runtime.ort.blocked_part`, rule 5).
    """

    def __init__(
        self,
        session: Any,
        clock: Clock,
        shapes: Mapping[str, Dims],
        where: str,
        threads: int = 1,
        kernels: Counter[Hashable] | None = None,
    ) -> None:
        self.kernels = kernels
        self._session = session
        self._clock: Clock = clock
        self._now_ns = time.thread_time_ns if clock == "thread_cpu" else time.perf_counter_ns
        self._shapes = dict(shapes)
        self._where = where
        self._settle_ns = 2000 * SPIN_US if threads > 1 else 0
        self._binding: Any = None

    @property
    def clock(self) -> Clock:
        return self._clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        return compute(self._session, self._where, feeds)

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst on resident inputs.

        One inference goes before the clock starts: other sessions have left their data in the caches, while a deployed
        engine finds its own weights there as far as they fit. More of them go where other workers may spin (rule 3).
        """
        if self._binding is None:
            self._binding = self._bind()
        run, binding = self._session.run_with_iobinding, self._binding
        settled = time.perf_counter_ns() + self._settle_ns
        run(binding)
        while time.perf_counter_ns() < settled:
            run(binding)
        with floating_point_mode(flush=True):
            start = self._now_ns()
            for _ in range(repeats):
                run(binding)
            return (self._now_ns() - start) / repeats * 1e-6

    def _bind(self) -> Any:
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name, data in resident_inputs(self._session, self._shapes, self._where).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(data))
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name)
        # Else every run would make new outputs beside those of the run before, and take twice the room in the caches.
        self._session.run_with_iobinding(binding)
        for name, value in zip(names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding
