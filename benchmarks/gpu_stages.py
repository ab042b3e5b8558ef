"""The stages of `benchmarks.gpu`: functions from a runner, a model or a profile to figures that JSON can hold."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.models import mobilenet_v2, mobilenet_v2_224, resnet20, resnet50
from sluice.models.imagenet import ImageNetResNet
from sluice.passes.precision.to_precision import to_precision
from sluice.pipeline.verify import measure_configurations
from sluice.profiler.fit.least_squares import errors
from sluice.profiler.need import solve_by_need, walk
from sluice.profiler.profile import Profile, profile_onnx
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import measure_engines
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.measure import measure
from sluice.profiler.timing.reference_engine import make_reference_engine
from sluice.runtime.base.runner import Runner
from sluice.solver.amplitude_losses import amplitude_losses
from sluice.solver.decide import decide, least_ms
from sluice.solver.random_configurations import random_configuration

__all__ = [
    "CHECK",
    "FULL",
    "SMALL",
    "Layer",
    "Network",
    "Sizes",
    "dense",
    "device_tests",
    "fidelity",
    "half",
    "pieces",
    "profiled",
    "staircase",
]

SHARE = 0.5
TESTS_S = 150.0  # for the tests that need a GPU
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider")
AT_A_TIME = 24  # sessions that are alive together
SOLVER_S = 5.0  # for each problem: the GPU waits meanwhile


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution whose output channels are varied: kernel x kernel, on ``size`` x ``size``."""

    into: int
    size: int
    kernel: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A network without weights that matter, and one image of it."""

    make: Callable[[], nn.Module]
    image: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amount of measuring."""

    layer: Layer
    networks: Mapping[str, Network]
    batches: tuple[int, ...]
    staircases: tuple[str, ...]  # precisions
    precision: str
    plans: int


# The 3x3 convolutions of ResNet-50's second stage; every eighth width, and some that no tile divides.
FULL = Sizes(
    Layer(128, 28, 3, tuple(sorted({*range(8, 257, 8), *range(1, 257, 32), *range(31, 256, 32), 4}))),
    {"mobilenet_v2_224": Network(mobilenet_v2_224, (3, 224, 224)), "resnet50": Network(resnet50, (3, 224, 224))},
    (1, 32),
    ("fp16", "fp32"),
    "fp16",
    12,
)
# What a GPU that is lent for some minutes is asked, after the tests that need one.
CHECK = Sizes(
    FULL.layer,
    {"resnet20": Network(resnet20, (1, 28, 28)), "mobilenet_v2": Network(mobilenet_v2, (1, 28, 28))},
    (8,),
    (),
    "fp16",
    12,
)
SMALL = Sizes(
    Layer(8, 9, 3, (1, 8, 15, 16, 17, 24, 32)),
    {"resnet": Network(lambda: ImageNetResNet((1,), (6,), 5, 3), (3, 33, 33))},
    (1, 2),
    ("fp32",),
    "fp32",
    4,
)


def staircase(runner: Runner, layer: Layer, batch: int, precision: str) -> list[tuple[int, float]]:
    """(output channels, ms) of the convolution with its activation, measured in random order."""
    rng = np.random.default_rng(0)
    order = [layer.widths[k] for k in rng.permutation(len(layer.widths))]
    found: dict[int, float] = {}
    for start in range(0, len(order), AT_A_TIME):
        widths = order[start : start + AT_A_TIME]
        sessions = [runner.build(to_precision(_conv(layer, width, batch), precision, part=True)) for width in widths]
        found |= {width: m.ms for width, m in zip(widths, measure(sessions, rng=rng), strict=True)}
    return sorted(found.items())


def dense(runner: Runner, model: onnx.ModelProto, batch: int, precision: str) -> dict[str, Any]:
    """Milliseconds of a whole network as it is."""
    session = runner.build(to_precision(model, precision), batch=batch)
    found = measure([session], min_bursts=60, rng=np.random.default_rng(0))[0]
    return {"ms": found.ms, "spread": found.spread}


def profiled(model: onnx.ModelProto, table: Path, *, batch: int, target: str, precision: str) -> dict[str, Any]:
    """The counts and the stated error of profiling; ``profile`` is the profile itself."""
    profile = profile_onnx(model, table, deployment=Deployment(target, batch, 1, precision), progress=False)
    walk(profile, ("filter",))
    with LatencyTable.open(table) as opened:
        points = len(opened)
    return {
        "profile": profile,
        "points": points,
        "calibration": dict(profile.latency.error),
        "promised_dense_ms": profile.latency.dense_ms(),
    }


def pieces(profile: Profile) -> dict[str, Any]:
    """Milliseconds of every distinct piece of the dense network as measured, and of the whole engine."""
    count = Counter(piece.key for piece in profile.partition.pieces)
    dense, table = profile.partition.dense, profile.bench.table
    rows: list[dict[str, Any]] = []
    for piece in {piece.key: piece for piece in profile.partition.pieces}.values():
        found = table.require(piece.key, tuple(int(extent.at(dense)) for extent in piece.extents))
        rows.append({"piece": piece.description, "times": count[piece.key], "ms": found.ms, "spread": found.spread})
    engine = next(m.ms for widths, m in table.engines(profile.model_key) if widths == dict(profile.layout.dense))
    return {"engine_ms": engine, "pieces_ms": sum(row["times"] * row["ms"] for row in rows), "rows": rows}


def device_tests(command: Sequence[str] = PYTEST) -> dict[str, Any]:
    """The tests that need a GPU: exit status, and the last lines of what they say.

    Raises:
        SluiceError: they failed, or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_S, check=False)
    except subprocess.TimeoutExpired:
        raise SluiceError(f"the tests took more than {TESTS_S:.0f} s; run `pytest -m device` by itself") from None
    last = done.stdout.strip().splitlines()[-12:]
    if done.returncode:
        raise SluiceError(f"the tests failed with status {done.returncode}: {' | '.join(last)}")
    return {"status": done.returncode, "told": last}


def fidelity(profile: Profile, table: Path, plans: int, seed: int = 1000) -> dict[str, Any]:
    """Promised against measured ms of random plans that no fit has seen."""
    rng = np.random.default_rng(seed)
    drawn = [random_configuration(profile.latency, rng) for _ in range(plans)]
    profile.ask(drawn)
    promised = np.array([profile.latency.ms(plan) for plan in drawn])
    runner = profile.runner()
    with LatencyTable.open(table) as opened:
        bench = Bench(opened, runner, make_reference_engine(opened, runner, rng), rng)
        known = opened.engines(profile.model_key)
        measured = np.array(measure_engines(profile.partition, bench, drawn, known=known))
    return {**errors(promised, measured), "promised_ms": promised.tolist(), "measured_ms": measured.tolist()}


def half(profile: Profile, share: float = SHARE) -> dict[str, Any]:
    """The solver's widths for a share of the dense time, its promise, and dense and slim engines measured in turns.

    Channels are scored at random, since the time of a network does not depend on its weights. A share that widths alone
    do not reach becomes the least share that they reach.
    """
    latency, rng = profile.latency, np.random.default_rng(0)
    scores = {group: rng.exponential(size=levels[-1]) for group, levels in latency.levels.items()}
    losses = amplitude_losses(latency.levels, scores)
    least = solve_by_need(profile, lambda model, near: least_ms(model, time_limit_s=SOLVER_S))
    target_ms = max(share * latency.dense_ms(), least.promised_ms)
    choice = solve_by_need(
        profile, lambda model, near: decide(model, losses, target_ms, time_limit_s=SOLVER_S, near=near)
    )
    dense_ms, slim_ms = measure_configurations(profile, [latency.dense, choice.widths])
    return {
        "share": share,
        "target_ms": target_ms,
        "promised_ms": choice.promised_ms,
        "dense_ms": dense_ms,
        "slim_ms": slim_ms,
        "slim_over_dense": slim_ms / dense_ms,
        "promised_over_measured": choice.promised_ms / slim_ms,
        "channels_kept": sum(choice.widths.values()) / sum(latency.dense.values()),
    }


def _conv(layer: Layer, width: int, batch: int) -> onnx.ModelProto:
    rng = np.random.default_rng(width)
    weight = rng.standard_normal((width, layer.into, layer.kernel, layer.kernel)) / layer.kernel / layer.into**0.5
    values = {"w": weight, "b": rng.standard_normal(width)}
    pads = [layer.kernel // 2] * 4
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=pads),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "staircase",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, layer.into, layer.size, layer.size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, width, layer.size, layer.size])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
