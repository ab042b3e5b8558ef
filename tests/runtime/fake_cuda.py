"""A GPU for the torch runner that computes on the CPU, and whose time is counted: only the driver is made up.

Capturing runs nothing to completion: outputs hold NaN until the first replay. A replay takes as long as its inferences,
but never less than its launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sluice.runtime.torch_cuda.program import TorchProgram

__all__ = ["LAUNCH_MS", "FakeDriver", "FakeGraph"]

LAUNCH_MS = 0.006
RUN = TorchProgram.__call__


class FakeGraph:
    def __init__(self, driver: FakeDriver, compute: Callable[[], list[Tensor]], inferences: int) -> None:
        self._driver, self._compute, self.inferences = driver, compute, inferences
        self.outputs = [torch.full_like(value, float("nan")) for value in compute()]

    def replay(self) -> None:
        assert self._driver.at_work
        for mine, new in zip(self.outputs, self._compute(), strict=True):
            mine.copy_(new)
        self._driver.log.append("replay")
        self._driver.clock_ms += max(LAUNCH_MS, self.inferences * self._driver.inference_ms)


class FakeDriver:
    """``inference_ms`` is what one inference takes in a graph; kernel by kernel it takes ten launches more.

    After ``sound`` captures it ``refuses`` every other.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        inference_ms: float = 1.0,
        refuses: Exception | None = None,
        sound: int = 0,
    ) -> None:
        self.inference_ms, self.refuses, self.sound = inference_ms, refuses, sound
        self.at_work = False
        self.clock_ms = 0.0
        self.log: list[str] = []
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self._capturing = False

        def counted(program: TorchProgram, inputs: list[Tensor]) -> list[Tensor]:
            assert self.at_work
            self.log.append("inference")
            if not self._capturing:
                self.clock_ms += self.inference_ms + 10 * LAUNCH_MS
            return RUN(program, inputs)

        patch.setattr(TorchProgram, "__call__", counted)

    @contextmanager
    def working(self) -> Iterator[None]:
        self.at_work = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.at_work = False

    def capture(self, compute: Callable[[], list[Tensor]]) -> FakeGraph:
        assert self.at_work
        if self.refuses is not None and not self.sound:
            raise self.refuses
        self.sound -= 1
        before = len(self.log)
        self._capturing = True
        compute()
        inferences = len(self.log) - before
        self.log[before:] = [f"capture of {inferences}"]

        def again() -> list[Tensor]:
            self._capturing, length = True, len(self.log)
            try:
                return compute()
            finally:
                self._capturing = False
                del self.log[length:]

        graph = FakeGraph(self, again, inferences)
        self.graphs.add(graph)
        return graph

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        before = self.clock_ms
        work()
        return self.clock_ms - before
