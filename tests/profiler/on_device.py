"""Benches, surveys and profiles on the simulated device of `tests.device`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest

from sluice.core.deployment import Deployment
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler import profile as profile_module
from sluice.profiler import view as view_module
from sluice.profiler.fit.assemble import Layout
from sluice.profiler.pieces.partition import Partition, partition_static, static_at
from sluice.profiler.profile import profile_onnx
from sluice.profiler.survey import survey
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import make_reference_engine
from sluice.profiler.view import Profile
from tests.device import FakeRunner, chain

__all__ = ["bench_on", "everywhere", "profiled", "skipping", "surveyed"]


def bench_on(table: LatencyTable, runner: FakeRunner) -> Bench:
    rng = np.random.default_rng(0)
    return Bench(table, runner, make_reference_engine(table, runner, rng), rng)


def surveyed(model: onnx.ModelProto, bench: Bench, methods: Sequence[str] = ("filter",), batch: int = 2) -> Layout:
    """The slots of a network whose dense pieces and joints are in the table of the bench, measured now if need be."""
    static = static_at(model, batch)
    space = find_search_space(read_onnx(static), ())
    cut: Partition = partition_static(static, space.analysis, batch)
    return survey(cut, bench, methods=methods, space=space)


@contextmanager
def everywhere(runner: FakeRunner) -> Iterator[None]:
    """Whatever is profiled is profiled on this device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (profile_module, view_module):
            patch.setattr(module, "make_runner", lambda place, threads=1: runner)
        yield


def profiled(runner: FakeRunner, model: onnx.ModelProto, methods: Sequence[str] = ("filter",), **more: Any) -> Profile:
    """The profile of the network; arguments as those of `profile_onnx`."""
    with everywhere(runner):
        return profile_onnx(model, methods=methods, **{"deployment": Deployment(batch=2), "progress": False, **more})


def skipping(first: int, middle: int, **more: Any) -> onnx.ModelProto:
    """A chain of three convolutions with a residual addition: what the first makes is added to what the last makes."""
    model = chain([first, middle, first], batch="N", **more)
    at = next(k for k, node in enumerate(model.graph.node) if list(node.input) == ["c2"])
    model.graph.node[at].input[0] = "sum"
    model.graph.node.insert(at, onnx.helper.make_node("Add", ["c2", "a0"], ["sum"]))
    return model
