from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.runtime.base import nvidia


class FakeCuda:
    """libcuda of a process that sees two GPUs; ``failing`` is the call that reports an error."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def _status(self, name: str) -> int:
        return int(name == self.failing)

    def cuInit(self, flags: int) -> int:
        return self._status("cuInit")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return self._status("cuDeviceGetCount")

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index + 10
        return self._status("cuDeviceGet")

    def cuDeviceGetName(self, text: Any, size: int, handle: ctypes.c_int) -> int:
        text.value = {10: b"Big GPU", 11: b"Small GPU"}[handle.value]
        return self._status("cuDeviceGetName")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: ctypes.c_int) -> int:
        value._obj.value = {(75, 10): 9, (76, 10): 3}[attribute, handle.value]
        return self._status(f"cuDeviceGetAttribute {attribute}")

    def cuDeviceGetPCIBusId(self, text: Any, size: int, handle: ctypes.c_int) -> int:
        text.value = {10: b"0000:41:00.0"}[handle.value]
        return self._status("cuDeviceGetPCIBusId")

    def cuDeviceGetUuid(self, number: Any, handle: ctypes.c_int) -> int:
        number._obj[:] = range(handle.value, handle.value + 16)
        return self._status("cuDeviceGetUuid")


class FakeNvml:
    def __init__(self, failing: str = "") -> None:
        self.failing, self.opened = failing, 0

    def nvmlInit_v2(self) -> int:
        self.opened += 1
        return int(self.failing == "nvmlInit_v2")

    def nvmlShutdown(self) -> int:
        self.opened -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.159.03"
        return int(self.failing == "nvmlSystemGetDriverVersion")

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: Any, handle: Any) -> int:
        assert bus.value == b"0000:41:00.0"
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, clock: Any) -> int:
        assert (handle.value, kind) == (7, 1)
        clock._obj.value = 1980
        return int(self.failing == "nvmlDeviceGetClockInfo")

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int, clock: Any) -> int:
        assert (handle.value, kind) == (7, 1)
        clock._obj.value = 2010
        return int(self.failing == "nvmlDeviceGetMaxClockInfo")

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, degrees: Any) -> int:
        assert (handle.value, sensor) == (7, 0)
        degrees._obj.value = 54
        return int(self.failing == "nvmlDeviceGetTemperature")

    def nvmlDeviceGetPowerManagementLimit(self, handle: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 700_000
        return int(self.failing == "nvmlDeviceGetPowerManagementLimit")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, bits: Any) -> int:
        failed = self.failing == "nvmlDeviceGetCurrentClocksThrottleReasons"
        bits._obj.value = 0 if failed else 0x1 | 0x4 | 0x40  # idle is no reason
        return int(failed)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def use(cuda: Any = None, nvml: Any = None, cudnn: Any = None) -> None:
        def load(names: Sequence[str]) -> Any:
            return {nvidia.LIBCUDA: cuda, nvidia.NVML: nvml, nvidia.CUDNN: cudnn}[tuple(names)]

        monkeypatch.setattr(nvidia, "load", load)

    return use


def test_names_clocks_and_driver(install: Install) -> None:
    nvml = FakeNvml()
    install(FakeCuda(), nvml)
    assert nvidia.gpu_names() == ("Big GPU", "Small GPU")
    assert nvidia.driver_version() == "580.159.03"
    assert nvidia.sm_clock_mhz() == 1980
    assert nvidia.compute_capability() == (9, 3)
    assert nvml.opened == 0  # closed as often as opened


def test_without_a_driver_nothing_is_known(install: Install) -> None:
    install()
    assert (nvidia.gpu_names(), nvidia.driver_version(), nvidia.sm_clock_mhz()) == ((), "unknown", None)
    assert nvidia.compute_capability() is None


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName"])
def test_a_driver_that_fails_shows_no_gpu(failing: str, install: Install) -> None:
    install(FakeCuda(failing), FakeNvml())
    assert nvidia.gpu_names() == ()


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute 75", "cuDeviceGetAttribute 76"])
def test_a_driver_that_fails_tells_no_capability(failing: str, install: Install) -> None:
    install(FakeCuda(failing), FakeNvml())
    assert nvidia.compute_capability() is None


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlSystemGetDriverVersion", "nvmlDeviceGetClockInfo"])
def test_what_nvml_does_not_tell_is_unknown(failing: str, install: Install) -> None:
    install(FakeCuda(), FakeNvml(failing))
    assert (nvidia.driver_version() == "unknown") == (failing != "nvmlDeviceGetClockInfo")
    assert (nvidia.sm_clock_mhz() is None) == (failing != "nvmlSystemGetDriverVersion")


def test_what_holds_the_clock_is_told(install: Install) -> None:
    install(FakeCuda(), FakeNvml())
    state = nvidia.gpu_state()
    assert state == nvidia.GpuState(1980, 2010, 54, 700, ("the power limit", "heat, by hardware"))
    assert state is not None and state.lines() == [
        "the GPU computes at 1980 MHz of 2010, 54 degrees, power limit 700 W, "
        "held back by the power limit and heat, by hardware",
        "steadier figures: sudo nvidia-smi -lgc 1980 (and -rgc afterwards)",
    ]


@pytest.mark.parametrize(
    ("failing", "lacks"),
    [
        ("nvmlDeviceGetMaxClockInfo", "most_mhz"),
        ("nvmlDeviceGetTemperature", "celsius"),
        ("nvmlDeviceGetPowerManagementLimit", "limit_w"),
    ],
)
def test_one_figure_that_is_not_told_hides_no_other(failing: str, lacks: str, install: Install) -> None:
    nvml = FakeNvml(failing)
    install(FakeCuda(), nvml)
    state = nvidia.gpu_state()
    assert state is not None and getattr(state, lacks) is None and state.sm_mhz == 1980 and nvml.opened == 0
    assert sum(value is None for value in (state.most_mhz, state.celsius, state.limit_w)) == 1
    install(FakeCuda(), FakeNvml("nvmlDeviceGetCurrentClocksThrottleReasons"))
    unknown = nvidia.gpu_state()
    assert unknown is not None and "held back" not in unknown.lines()[0]


def test_the_device_and_cudnn_are_identified(install: Install) -> None:
    install(FakeCuda(), FakeNvml(), SimpleNamespace(cudnnGetVersion=lambda: 91301))
    assert nvidia.uuid() == "GPU-0a0b0c0d-0e0f-1011-1213-141516171819"
    assert nvidia.cudnn_version() == "9.13.1"
    install(FakeCuda("cuDeviceGetUuid"), FakeNvml())
    assert (nvidia.uuid(), nvidia.cudnn_version()) == ("no GPU", "unknown")


def test_a_library_that_is_not_there_is_none() -> None:
    assert nvidia.load(("libno-such-library.so.1",)) is None
