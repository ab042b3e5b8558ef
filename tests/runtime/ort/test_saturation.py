"""The probe says what the processor's flags say, and files for this machine have weights to match."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest

from sluice.artifacts import in_precision
from sluice.artifacts.in_precision import deploy_onnx
from sluice.runtime.ort.saturation import sums_saturate
from tests.exported import arrays, deployed, random_feeds

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.is_file(), reason="needs the flags of an x86")
def test_the_probe_agrees_with_the_processor() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert sums_saturate() == (not {"avx512_vnni", "avx_vnni"} & set(flags))


def largest_weight(model: onnx.ModelProto) -> int:
    return max(int(np.abs(x.astype(int)).max()) for x in arrays(model).values() if x.dtype == np.int8 and x.ndim > 1)


@pytest.mark.parametrize("saturates", [False, True])
def test_weights_have_seven_bits_where_sums_saturate(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_precision, "sums_saturate", lambda: saturates)
    dense = deployed("plain")
    data = [random_feeds(dense)]

    def weight(target: str, reduce_range: bool | None = None) -> int:
        return largest_weight(deploy_onnx(dense, "int8", data, target=target, reduce_range=reduce_range))

    assert weight("ort-cpu") == weight("openvino") == (64 if saturates else 127)
    assert weight("tensorrt") == 127
    assert weight("ort-cpu", True) == 64
    assert weight("ort-cpu", False) == 127
