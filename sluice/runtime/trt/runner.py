"""TensorRT on an NVIDIA GPU, without torch: ONNX -> engine -> session.

1. The timing cache belongs to the device and the version, as a latency table does. The runner takes one, adds to it in
   every build, and `TensorRtRunner.cache` is the present one, to be stored with the table.
2. Warming up to the clock that a device settles at is a matter of time, not of counts, and of all engines together:
   `sluice.profiler.timing.measure` does it. `TensorRtRunner.sm_clock_mhz` is for the record.
3. A part of a network has the borders that it has inside, and its kernels are told (`sluice.runtime.trt.build`, 9).
   An operand of an addition is fused as it comes, so no source has to make it (`sluice.runtime.base.runner`, 6).
4. RTX serves the GPUs of desktops and refuses others only when it builds; of `NOT_RTX` that is said beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError
from sluice.runtime.base import nvidia
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.base.inputs import place
from sluice.runtime.base.runner import Clock
from sluice.runtime.trt.build import Settings, build_engine, find_tensorrt, is_rtx, make_builder, product
from sluice.runtime.trt.inspect import kernels
from sluice.runtime.trt.session import TensorRtSession

if TYPE_CHECKING:
    from sluice.runtime.base.inputs import Model

__all__ = ["TensorRtRunner", "missing"]

NOT_RTX = ((9, 0),)  # Hopper


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
        settings: the limits of the builder.
    Raises:
        SluiceError: TensorRT, the CUDA runtime or the device is not here.
    """

    def __init__(self, cache: bytes = b"", settings: Settings | None = None) -> None:
        self._trt = find_tensorrt()
        self._cuda = Cuda.load()
        self._settings = settings or Settings()
        self._builder: Any = None
        self.cache = cache

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
        session.kernels = kernels(session.layers())
        return session

    def _build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
        part: bool = False,
    ) -> TensorRtSession:
        # Kept until the runner goes: without a builder TensorRT unloads its kernels.
        self._builder = self._builder or make_builder(self._trt)
        built = build_engine(
            self._trt,
            model,
            batch=batch,
            feeds_shapes=feeds_shapes,
            cache=self.cache,
            settings=self._settings,
            builder=self._builder,
            part=part,
        )
        # RTX has no cache; one that the full TensorRT left is not lost by that.
        self.cache = built.cache or self.cache
        return self.load(built.plan, place(model))

    def load(self, plan: bytes, where: str = "the engine in memory") -> TensorRtSession:
        """A session for a serialized engine, built by this version for this device."""
        return TensorRtSession(self._trt, self._cuda, plan, where)
