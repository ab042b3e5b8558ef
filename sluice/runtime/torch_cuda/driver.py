"""The part of CUDA that the torch runner needs: a stream, graph capture, events.

1. One driver serves the process: one stream, on which all work of all engines is done in order, and one pool of memory
   for their graphs. Sharing it is safe because replays never overlap, every replay writes what it reads, and outputs
   stay allocated as long as their graph. So many engines take little more memory than the largest.
2. When no graph is left alive, a new pool begins and the old one goes back to the device: torch does not take a pool
   again whose last graph is gone. A capture that ended badly would go on drawing on its pool, and torch refuses to
   empty its caches as long as one does: it is stopped by hand, a new pool begins, and the caches are left alone.
3. Nothing is collected during a capture: an engine that goes away would free memory of the device, which breaks it.
4. Kernels are chosen by trial (``cudnn.benchmark``), products of fp32 numbers are taken in TF32, as the other runtimes
   of a GPU do by default. Both are settings of the process: they hold while an engine is built or runs, then they are
   put back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CudaDriver", "Driver", "Graph", "cuda_driver", "kernel_choice"]


class Graph(Protocol):
    """A captured computation. ``outputs`` have fixed addresses and hold values after the first `replay`."""

    outputs: list[Tensor]

    def replay(self) -> None: ...


class Driver(Protocol):
    """The device as `sluice.runtime.torch_cuda.runner.TorchCudaSession` uses it."""

    @property
    def device(self) -> torch.device: ...

    def working(self) -> AbstractContextManager[None]:
        """In which all work is done: on the driver's stream, under rule 4."""
        ...

    def capture(self, compute: Callable[[], list[Tensor]]) -> Graph:
        """``compute`` as a graph; it has run before. Raises `RuntimeError` where it cannot be captured."""
        ...

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """The time between two events around what ``work`` enqueues."""
        ...


class CudaGraph:
    """A captured CUDA graph with the tensors that its replays fill."""

    def __init__(self, graph: Any, outputs: list[Tensor]) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()


class CudaDriver:
    """Device 0 of torch."""

    def __init__(self) -> None:
        import torch

        self._stream = torch.cuda.Stream()
        self._alive: weakref.WeakSet[CudaGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._sound = True  # no capture has ended badly

    @property
    def device(self) -> torch.device:
        return self._stream.device

    @contextmanager
    def working(self) -> Iterator[None]:
        import torch

        with torch.no_grad(), torch.cuda.stream(self._stream), kernel_choice():
            yield

    def capture(self, compute: Callable[[], list[Tensor]]) -> CudaGraph:
        import torch

        if not self._alive or self._pool is None:
            if self._sound:
                torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # torch.cuda.graph() would empty the caches of the allocator before each of thousands of small captures.
        with _no_collection():
            self._checked(functools.partial(graph.capture_begin, pool=self._pool))
            try:
                outputs = compute()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a broken capture says so once more when it is ended
                    self._checked(graph.capture_end)
                raise
            self._checked(graph.capture_end)
        found = CudaGraph(graph, outputs)
        self._alive.add(found)
        return found

    def _checked(self, step: Callable[[], None]) -> None:
        """A step that begins or ends a capture; where it fails the pool is given up (rule 2)."""
        import torch

        try:
            step()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # that it has stopped already
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            self._pool, self._sound = None, False
            raise

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


@functools.cache
def cuda_driver() -> CudaDriver:
    """The driver of this process (rule 1)."""
    return CudaDriver()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Rule 3."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def kernel_choice() -> Iterator[None]:
    """Rule 4."""
    import torch

    cudnn: Any = torch.backends.cudnn  # "conv" is not among its declared names
    products: Any = torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.conv.fp32_precision, products.fp32_precision
    cudnn.benchmark, cudnn.conv.fp32_precision, products.fp32_precision = True, "tf32", "tf32"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision, products.fp32_precision = before
