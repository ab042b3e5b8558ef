"""PyTorch on an NVIDIA GPU, an ONNX graph captured as a CUDA graph.

1. The graph becomes a torch program (`sluice.runtime.torch_cuda.program`), which runs a few times to let cuDNN choose
   its kernels, and is then captured. Replays are timed, so neither Python nor the launch of single kernels
   counts; kernels are those of eager PyTorch, nothing is fused but batch norm.
2. Timed by events on the stream (clock ``"cuda"``). Of a small network several inferences in a row are captured in one
   graph, as many as `sluice.runtime.base.runner.inferences_per_launch` says.
3. Inputs and outputs have fixed addresses. `run` writes a caller's arrays to them and replays; before the next burst
   the made-up data comes back.
4. Where capture fails the program runs kernel by kernel, and a warning says that its time includes their launches.
   Where only several inferences cannot be captured, the graph of one stays, and a warning says the same of its launch.
5. fp32 means what it means in the runtimes of a GPU by default: products are taken in TF32. int8 is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.base import nvidia
from sluice.runtime.base.inputs import Dims, made_up, parsed, place, static_shapes
from sluice.runtime.base.runner import Clock, inferences_per_launch
from sluice.runtime.torch_cuda.driver import Driver, Graph, cuda_driver
from sluice.runtime.torch_cuda.ops import dtype_of
from sluice.runtime.torch_cuda.program import (
    TorchProgram,
    build_program,
    check_operators,
    laid_out,
    to_numpy,
    to_tensor,
)

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor

    from sluice.runtime.base.inputs import Model

__all__ = ["TorchCudaRunner", "TorchCudaSession", "missing"]

WARM_UPS = 2


def missing() -> str:
    """Why engines cannot run here, and what to do; empty where they can."""
    if not find_spec("torch"):
        return "torch is not installed; install a CUDA build of it"
    if reason := nvidia.missing():
        return reason
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"the installed torch cannot be imported ({first_line(error)}); install a CUDA build of it"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU; install a CUDA build that fits the driver"
    return ""


@dataclass(frozen=True, slots=True)
class TorchCudaRunner:
    """CUDA graphs of PyTorch on device 0; ``driver`` makes them."""

    driver: Callable[[], Driver] = cuda_driver

    @property
    def clock(self) -> Clock:
        return "cuda"

    @property
    def device(self) -> str:
        return nvidia.device_name()

    @property
    def version(self) -> str:
        import torch

        cudnn = torch.backends.cudnn.version() or "none"
        toolkit = torch.version.cuda or "none"
        return f"{torch.__version__}, CUDA {toolkit}, cuDNN {cudnn}, driver {nvidia.driver_version()}"

    def sm_clock_mhz(self) -> int | None:
        """The clock at which the device computes right now, where its driver tells."""
        return nvidia.sm_clock_mhz()

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> TorchCudaSession:
        """A session for ``model``; the arguments are those of `sluice.runtime.ort.cpu.OrtRunner.build`.

        Raises:
            SluiceError: an operator has no counterpart in torch, or not with these attributes.
        """
        where, shapes = place(model), static_shapes(model, batch, feeds_shapes or {})
        graph = parsed(model, weights=True)
        check_operators(graph, where)
        return TorchCudaSession(graph, shapes.inputs, self.driver(), where)


class TorchCudaSession:
    """One engine; made by `TorchCudaRunner.build`. It is captured at once where all shapes are static."""

    ramps = True

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Dims], driver: Driver, where: str) -> None:
        self._driver, self._where = driver, where
        types = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
        self._types = {name: dtype_of(types[name]) for name in shapes}
        self._shapes = dict(shapes)
        self._engine: _Engine | None = None
        self._model: onnx.ModelProto | None = model
        if all(isinstance(size, int) for shape in shapes.values() for size in shape):
            self._engine = self._capture()

    @property
    def clock(self) -> Clock:
        return "cuda"

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; a bfloat16 input takes float32, and such an output gives it.

        Raises:
            SluiceError: a feed is missing, unknown or of the wrong type or shape.
        """
        given = {name: to_tensor(np.asarray(value)) for name, value in feeds.items()}
        self._check(given)
        with self._driver.working():
            if self._engine is not None:
                return self._engine.run(given)
            placed = {name: self._placed(name, given[name]) for name in self._types}
            program = self._program(placed)
            outputs = program(list(placed.values()))
            return dict(zip(program.outputs, map(to_numpy, outputs), strict=True))

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst of at least ``repeats`` inferences on resident inputs."""
        if self._engine is None:
            self._engine = self._capture()
        with self._driver.working():
            return self._engine.sample(repeats)

    def _capture(self) -> _Engine:
        """Rules 1, 2 and 4; `SluiceError` where a shape is not static, or the GPU's memory is full."""
        import torch

        data = {
            name: to_tensor(made_up(name, shape, _made_up_type(self._types[name]), self._where))
            for name, shape in self._shapes.items()
        }
        try:
            with self._driver.working():
                # Clones, since a buffer must not be the data that is to come back to it.
                placed = {name: self._placed(name, value).clone() for name, value in data.items()}
                engine = _Engine(self._program(placed), placed, data, self._driver, self._where)
        except torch.OutOfMemoryError as error:
            raise SluiceError(
                f"the GPU has no room for {self._where} ({first_line(error)}); use a smaller batch"
            ) from error
        self._model = None  # its weights are on the device now
        return engine

    def _program(self, inputs: Mapping[str, Tensor]) -> TorchProgram:
        assert self._model is not None
        return build_program(self._model, inputs, self._driver.device, self._where)

    def _placed(self, name: str, value: Tensor) -> Tensor:
        return laid_out(value.to(self._driver.device, self._types[name]))

    def _check(self, given: Mapping[str, Tensor]) -> None:
        takes = ", ".join(f"{name}: {self._types[name]} {list(shape)}" for name, shape in self._shapes.items())
        for name in {**self._shapes, **given}:
            if name not in self._shapes or name not in given:
                raise SluiceError(f"cannot run {self._where} with inputs {sorted(given)}; the model takes {takes}")
            shape, wanted = tuple(given[name].shape), self._shapes[name]
            fits = len(shape) == len(wanted) and all(
                size == want or not isinstance(want, int) for size, want in zip(shape, wanted, strict=True)
            )
            kinds = (self._types[name], dtype_of(1)) if _is_bfloat16(self._types[name]) else (self._types[name],)
            if not fits or given[name].dtype not in kinds:
                raise SluiceError(
                    f"cannot run {self._where} with input {name!r} of {given[name].dtype} {list(shape)}; "
                    f"the model takes {takes}"
                )


class _Engine:
    """A program with static buffers, captured; all methods are called while the driver is working."""

    def __init__(
        self,
        program: TorchProgram,
        inputs: Mapping[str, Tensor],
        data: Mapping[str, Tensor],
        driver: Driver,
        where: str,
    ) -> None:
        import torch

        self._program, self._inputs, self._data, self._driver = program, inputs, data, driver
        self._dirty = False
        self._copies = 1
        buffers = list(inputs.values())
        for _ in range(WARM_UPS):
            program(buffers)
        self._graph: Graph | None = None
        try:
            self._graph = driver.capture(lambda: program(buffers))
            copies = inferences_per_launch(self._burst_ms)
        except torch.OutOfMemoryError:
            raise  # kernel by kernel it would not fit either
        except RuntimeError as error:
            self._graph = None
            warnings.warn(
                f"{where} cannot be captured as a CUDA graph ({first_line(error)}); it is run kernel by kernel, and "
                f"its times include their launches",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        if copies > 1:
            try:
                self._graph = driver.capture(lambda: _several(program, buffers, copies))
                self._copies = copies
            except RuntimeError as error:
                warnings.warn(
                    f"{copies} inferences of {where} in a row cannot be captured as one CUDA graph "
                    f"({first_line(error)}); it is timed one by one, and its times include the launch of its graph",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        self._fill(feeds)
        self._dirty = True
        if self._graph is None:
            outputs = self._program(list(self._inputs.values()))
        else:
            self._graph.replay()
            outputs = self._graph.outputs
        return dict(zip(self._program.outputs, map(to_numpy, outputs), strict=True))

    def sample(self, repeats: int) -> float:
        if self._dirty:
            self._fill(self._data)
            self._dirty = False
        replays = -(-repeats // self._copies)
        return self._burst_ms(replays) / (replays * self._copies)

    def _burst_ms(self, replays: int) -> float:
        """One replay goes before the clock starts, since other engines have left their data in the cache."""
        once = self._graph.replay if self._graph is not None else self._eager

        def burst() -> None:
            for _ in range(replays):
                once()

        once()
        return self._driver.elapsed_ms(burst)

    def _eager(self) -> None:
        self._program(list(self._inputs.values()))

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self._inputs.items():
            buffer.copy_(values[name])


def _several(program: TorchProgram, buffers: Sequence[Tensor], copies: int) -> list[Tensor]:
    """The outputs of the last of ``copies`` inferences; those of the others go at once, so memory is that of one."""
    for _ in range(copies - 1):
        program(buffers)
    return program(buffers)


def _is_bfloat16(dtype: torch.dtype) -> bool:
    import torch

    return dtype == torch.bfloat16


def _made_up_type(dtype: torch.dtype) -> np.dtype:
    """The numpy type that data for a tensor of this type is made in."""
    import torch

    return np.dtype(np.float32) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
