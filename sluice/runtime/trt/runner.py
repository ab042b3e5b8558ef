"""TensorRT on an NVIDIA GPU, without torch: ONNX -> engine -> session.

1. The timing cache belongs to the device and the version, as a latency table does. The runner takes one, adds to it in
   every build, and `TensorRtRunner.cache` is the present one, to be stored with the table. It is serialized whenever
   it is asked for (`sluice.runtime.trt.timing`).
2. Warming up to the clock that a device settles at is a matter of time, not of counts, and of all engines together:
   `sluice.profiler.timing.measure` does it. `TensorRtRunner.sm_clock_mhz` is for the record.
3. A part of a network has the borders that it has inside, and its kernels are told (`sluice.runtime.trt.build`, 9).
   Where its result would be copied once more, it is built another time (`sluice.runtime.trt.products`), and also
   where its rows have two orders (`sluice.runtime.trt.borders`, 3).
   An operand of an addition is fused as it comes, so no source has to make it (`sluice.runtime.base.runner`, 6).
   An engine that is asked for again, to be timed once more, is loaded and not built; `KEPT_BYTES` of engines are kept.
4. RTX serves the GPUs of desktops and refuses others only when it builds; of `NOT_RTX` that is said beforehand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError
from sluice.runtime.base import nvidia
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.base.inputs import parsed, place, serialized
from sluice.runtime.base.runner import Clock
from sluice.runtime.trt.borders import on_rows
from sluice.runtime.trt.build import build_engine, check_int8, find_tensorrt, is_rtx, make_builder, product
from sluice.runtime.trt.inspect import NO_KERNEL, kernels
from sluice.runtime.trt.products import products_on_rows, without_copies
from sluice.runtime.trt.session import TensorRtSession
from sluice.runtime.trt.settings import Settings
from sluice.runtime.trt.timing import RuntimeCache, TimingCache

if TYPE_CHECKING:
    from sluice.runtime.base.inputs import Model

__all__ = ["TensorRtRunner", "missing"]

NOT_RTX = ((9, 0),)  # Hopper
KEPT_BYTES = 2**28


def missing() -> str:
    """Why engines cannot run here, and what to do; empty where they can."""
    try:
        trt = find_tensorrt()
        if reason := nvidia.missing():
            return reason
        if is_rtx(trt) and (capability := nvidia.compute_capability()) in NOT_RTX:
            assert capability is not None
            return (
                f"{product(trt)} does not support {nvidia.device_name()} (compute capability "
                f"{capability[0]}.{capability[1]}); install tensorrt in its place"
            )
        Cuda.load()
    except SluiceError as error:
        return str(error)
    return ""


class TensorRtRunner:
    """TensorRT (or RTX, where that is installed instead) on device 0.

    Args:
        cache: a timing cache to begin with.
        settings: those of the builder; by default those of the environment (`sluice.runtime.trt.settings`).
    Raises:
        SluiceError: TensorRT, the CUDA runtime or the device is not here.
    """

    def __init__(self, cache: bytes = b"", settings: Settings | None = None) -> None:
        self._trt = find_tensorrt()
        self._cuda = Cuda.load()
        self._settings = settings or Settings.from_environment()
        self._builder: Any = None
        self._timing, self._compiled = TimingCache(cache), RuntimeCache(cache)
        self._plans: dict[tuple[object, ...], bytes] = {}

    free_borders = True

    @property
    def clock(self) -> Clock:
        return "cuda"

    @property
    def device(self) -> str:
        return nvidia.device_name()

    @property
    def version(self) -> str:
        return f"{product(self._trt)}, driver {nvidia.driver_version()}, {self._settings}"

    @property
    def cache(self) -> bytes:
        """The content of the timing cache now (rule 1), with RTX that of the runtime cache."""
        return bytes(self._compiled if is_rtx(self._trt) else self._timing)

    @cache.setter
    def cache(self, content: bytes) -> None:
        self._timing, self._compiled = TimingCache(content), RuntimeCache(content)

    def sm_clock_mhz(self) -> int | None:
        """The clock at which the device computes right now, where its driver tells."""
        return nvidia.sm_clock_mhz()

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> TensorRtSession:
        """An engine for ``model`` at fixed shapes, on the device.

        ``batch`` is the size of every dynamic first dimension; ``feeds_shapes[input]`` is a whole shape and wins over
        it. Raises `SluiceError` where a size is missing, TensorRT refuses the model, or the device has no room.
        """
        return self._build(model, batch=batch, feeds_shapes=feeds_shapes)

    def build_part(self, model: Model) -> TensorRtSession:
        """The engine of a part of a network (static shapes), for timing (rule 3)."""
        session = self._build(model, part=True)
        layers = session.layers()
        given = parsed(model, weights=True)
        if (rows := products_on_rows(given, layers)) is not given:
            session = self._build(rows, part=True)
        elif (turned := on_rows(given, positions_first=True)) is not given:
            other = self._build(turned, part=True)
            if kernels(other.layers()).total() < kernels(layers).total():
                session, layers = other, other.layers()
        session.kernels = kernels(without_copies(layers))
        return session

    def fused(self, model: Model, *, batch: int | None = None) -> list[list[str]]:
        """By kernel of the engine, the names of the ONNX nodes that it computes."""
        layers = self._build(model, batch=batch).layers()
        return [list(layer.nodes) for layer in layers if layer.kind not in NO_KERNEL and layer.nodes]

    def _build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
        part: bool = False,
    ) -> TensorRtSession:
        check_int8(self._trt, model)
        shapes = tuple((name, *dims) for name, dims in sorted((feeds_shapes or {}).items()))
        key = (hashlib.sha256(serialized(parsed(model, weights=True))).digest(), batch, shapes, part)
        plan = self._plans.pop(key, None)
        if plan is None:
            # Kept until the runner goes: without a builder TensorRT unloads its kernels.
            self._builder = self._builder or make_builder(self._trt)
            plan = build_engine(
                self._trt,
                model,
                batch=batch,
                feeds_shapes=feeds_shapes,
                cache=self._timing,
                settings=self._settings,
                builder=self._builder,
                part=part,
            ).plan
        self._plans[key] = plan  # the last one that was asked for
        while len(self._plans) > 1 and sum(map(len, self._plans.values())) > KEPT_BYTES:
            del self._plans[next(iter(self._plans))]
        return self.load(plan, place(model))

    def load(self, plan: bytes, where: str = "the engine in memory") -> TensorRtSession:
        """A session for a serialized engine, built by this version for this device."""
        return TensorRtSession(self._trt, self._cuda, plan, where, self._compiled)
