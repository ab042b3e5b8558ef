from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest

from sluice.core.deployment import ON_CPU, PRECISIONS, TARGETS, UNFIT, check_fit, check_target
from sluice.core.errors import SluiceError
from sluice.runtime.base.runner import (
    LEAST_LAUNCH_MS,
    MOST_INFERENCES,
    MOST_TRIALS,
    TRIAL,
    TRIALS_MS,
    inferences_per_launch,
)
from sluice.runtime.openvino import runner as openvino
from sluice.runtime.openvino.runner import OpenVinoRunner
from sluice.runtime.ort import cpu as ort
from sluice.runtime.ort import cuda as ort_cuda
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.ort.cuda import OrtCudaRunner
from sluice.runtime.targets import available_targets, make_runner
from sluice.runtime.torch_cuda import runner as torch_cuda
from sluice.runtime.torch_cuda.runner import TorchCudaRunner
from sluice.runtime.trt import runner as tensorrt

MODULES: dict[str, ModuleType] = {
    "ort-cpu": ort, "openvino": openvino, "ort-cuda": ort_cuda, "torch-cuda": torch_cuda, "tensorrt": tensorrt
}  # fmt: skip


@pytest.fixture
def nothing_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        monkeypatch.setattr(module, "missing", lambda: "")


def test_every_target_has_a_runner(nothing_missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "TensorRtRunner", lambda: "TensorRT")
    assert available_targets() == dict.fromkeys(TARGETS, "")
    made = [make_runner(target) for target in TARGETS]
    assert made == [OrtRunner(1), OpenVinoRunner(1), OrtCudaRunner(), TorchCudaRunner(), "TensorRT"]


def test_threads_are_the_cpus(nothing_missing: None) -> None:
    assert make_runner("ort-cpu", threads=3) == OrtRunner(3)
    assert make_runner("openvino", threads=3) == OpenVinoRunner(3)
    for target in sorted(set(TARGETS) - ON_CPU):
        with pytest.raises(
            SluiceError, match=f"cannot run target '{target}' with threads=2: a GPU has no such threads"
        ):
            make_runner(target, threads=2)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_missing_is_one_sentence(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "missing", lambda own=name: "" if own == "ort-cpu" else "there is no such device")
    monkeypatch.setattr(MODULES[target], "missing", lambda: "the runtime is not installed; install it")
    here = "none" if target == "ort-cpu" else "ort-cpu"
    reason = f"^target '{target}' cannot run here: the runtime is not installed; install it; targets that can: {here}$"
    with pytest.raises(SluiceError, match=reason):
        make_runner(target)
    assert available_targets()[target] == "the runtime is not installed; install it"


def test_an_unknown_target_names_all() -> None:
    for refuse in (make_runner, check_target, lambda target: check_fit(target, "fp32")):
        with pytest.raises(
            SluiceError,
            match=r"^there is no target 'abacus'; choose one of ort-cpu, openvino, ort-cuda, torch-cuda, tensorrt$",
        ):
            refuse("abacus")


def test_what_fits_is_not_asked_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        monkeypatch.setattr(module, "missing", lambda: pytest.fail("asked"))
    for target, precision in itertools.product(TARGETS, PRECISIONS):
        assert check_target(target) == target
        if (target, precision) not in UNFIT:
            check_fit(target, precision)
            continue
        with pytest.raises(SluiceError, match=f"^{target} cannot be timed in {precision}: .*; choose fp16, or another"):
            check_fit(target, precision)
    assert {target for target, _ in UNFIT} <= set(TARGETS) and {p for _, p in UNFIT} <= set(PRECISIONS)


def test_this_machine_runs_onnx_runtime() -> None:
    found = available_targets()
    assert list(found) == list(TARGETS) and found["ort-cpu"] == ""
    for target, reason in found.items():
        if reason:
            with pytest.raises(SluiceError):
                make_runner(target)


class Device:
    """One launch takes ``ms``, and ``slow`` times as long until it has worked for ``ramp_ms``."""

    def __init__(self, ms: float, slow: float = 1.0, ramp_ms: float = 0.0) -> None:
        self.ms, self.slow, self.ramp_ms = ms, slow, ramp_ms
        self.worked = 0.0
        self.bursts: list[int] = []

    def burst_ms(self, launches: int) -> float:
        taken = launches * self.ms * (self.slow if self.worked < self.ramp_ms else 1.0)
        self.worked += taken
        self.bursts.append(launches)
        return taken


@pytest.mark.parametrize("ms", [0.0014, 0.006, 0.03, 0.15, 0.9])
@pytest.mark.parametrize("slow", [1.0, 7.0])
def test_a_launch_holds_what_it_needs_at_the_highest_clock(ms: float, slow: float) -> None:
    device = Device(ms, slow, ramp_ms=15.0)
    found = inferences_per_launch(device.burst_ms)
    # What is still slow after the whole of the trials is far longer than its launch.
    assert found == max(1, min(MOST_INFERENCES, math.ceil(LEAST_LAUNCH_MS / ms)))
    assert set(device.bursts) == {TRIAL} and TRIALS_MS <= device.worked < TRIALS_MS + TRIAL * ms * slow + 1e-9


def test_a_clock_that_stands_still_does_not_stop_the_trials() -> None:
    device = Device(0.0)
    assert inferences_per_launch(device.burst_ms) == MOST_INFERENCES
    assert len(device.bursts) == MOST_TRIALS
