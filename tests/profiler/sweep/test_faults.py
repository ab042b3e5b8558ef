"""A runtime that fails on some engines costs those points: they are told, and no plan uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

import sluice
from sluice.core.errors import EngineFault, SluiceError
from sluice.runtime.base.faults import building, running
from sluice.runtime.ort.cpu import OrtRunner
from tests import tiny

Meets = Callable[[onnx.ModelProto], bool]


class Broken:
    """An engine that fails when it is timed."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.clock = error, "thread_cpu"

    def sample(self, repeats: int) -> float:
        raise self.error


@contextmanager
def failing(meets: Meets, when: str, error: BaseException) -> Iterator[list[int]]:
    """Engines of networks that meet something fail at ``when``; how often it was tried."""
    tried: list[int] = []
    with tiny.simulated_device(), pytest.MonkeyPatch.context() as patch:
        build = OrtRunner.build

        def faulty(self: OrtRunner, model: Any, **more: Any) -> Any:
            if isinstance(model, onnx.ModelProto) and meets(model):
                tried.append(1)
                if when == "build":
                    raise error
                return Broken(error)
            return build(self, model, **more)

        patch.setattr(OrtRunner, "build", faulty)
        patch.setattr(OrtRunner, "build_part", faulty)
        yield tried


def convolves(*outputs: int) -> Meets:
    """Whether a convolution with a 3x3 kernel has so many output channels."""

    def meets(model: onnx.ModelProto) -> bool:
        return any(t.dims[0] in outputs for t in model.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3)

    return meets


def compressed(out: Path) -> sluice.Compressed:
    return sluice.compress(
        tiny.model(), tiny.inputs(), budget="60%", data=tiny.data(), table=out / "t.db", out=out / "out",
        batch=tiny.BATCH, methods=("filter",), epochs=0, progress=False,
    )  # fmt: skip


def widths(done: sluice.Compressed) -> set[int]:
    return {len(s.keep) for s in done.plan.slices if s.axis == 0}


@pytest.mark.parametrize("when", ["build", "run"])
@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor it"), MemoryError(), SluiceError("cannot build it")])
def test_a_fault_costs_its_points(
    when: str, error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if when == "run" and isinstance(error, SluiceError):
        pytest.skip("a sentence at run is of the clock, and of all engines")
    with tiny.simulated_device():
        (tmp_path / "sound").mkdir()
        usual = widths(compressed(tmp_path / "sound"))
    gone = usual - {10, 13}
    with failing(convolves(*gone), when, error) as tried:
        done = compressed(tmp_path)
    assert tried and not gone & widths(done)
    assert done.report.met()
    told = [name for name, _ in done.report.skipped if "Conv" in name and " at " in name]
    assert told and len(caplog.records) >= len(told)
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("when", ["build", "run"])
def test_a_dense_network_that_does_not_run_is_one_sentence(when: str, tmp_path: Path) -> None:
    with (
        failing(convolves(10), when, RuntimeError("no kernel")),
        pytest.raises(SluiceError, match=rf"part of the dense network, does not run: ort-cpu cannot {when} an engine"),
    ):
        compressed(tmp_path)


@pytest.mark.parametrize("when", ["build", "run"])
def test_a_runtime_that_does_nothing_is_one_sentence(when: str, tmp_path: Path) -> None:
    with failing(lambda model: True, when, OSError("no driver")), pytest.raises(EngineFault, match="no driver"):
        compressed(tmp_path)


def test_a_joint_that_fails_saves_what_is_estimated() -> None:
    def joins(model: onnx.ModelProto) -> bool:
        """Both convolutions of the network, and not the last layer that whole engines have."""
        kinds = [node.op_type for node in model.graph.node]
        first = any(len(t.dims) == 4 and t.dims[1] == 3 for t in model.graph.initializer)
        return first and kinds.count("Conv") == 2 and not {"Gemm", "MatMul"} & set(kinds)

    with failing(joins, "build", RuntimeError("no")) as tried:
        profile = sluice.profile(
            tiny.model(), tiny.inputs(), batch=tiny.BATCH, methods=("filter",), complete=True, progress=False
        )
        asked = len(tried)
        assert profile.ask([profile.latency.dense]) == 0
    assert asked == len(tried) > 0, "what was refused is not tried again"
    assert profile.refused and all(name.startswith("joint of") for name in profile.refused)
    assert profile.knows(profile.latency.dense) and 0.0 < profile.latency.dense_ms() < float("inf")


def test_faults_are_one_kind() -> None:
    with pytest.raises(EngineFault, match=r"x cannot build an engine \(MemoryError: MemoryError\)"), building("x"):
        raise MemoryError
    with pytest.raises(EngineFault, match="mine"), building("x"):
        raise SluiceError("mine")
    with pytest.raises(SluiceError, match="mine") as told, running("x"):
        raise SluiceError("mine")
    assert not isinstance(told.value, EngineFault)
    with pytest.raises(KeyboardInterrupt), running("x"):
        raise KeyboardInterrupt
