"""The profiler's stages on engines of OpenVINO; the times are this machine's and nothing is said of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sluice.core.deployment import Deployment
from sluice.profiler.profile import profile_known, profile_onnx
from sluice.profiler.table.latency_table import LatencyTable
from tests.device import chain


@pytest.mark.slow
def test_a_small_network_is_profiled(tmp_path: Path) -> None:
    model, path = chain([12, 8], batch="N"), tmp_path / "t.db"
    profile = profile_onnx(model, path, deployment=Deployment("openvino", 2), progress=False)
    assert math.isfinite(profile.latency.dense_ms()) and profile.latency.dense_ms() > 0
    assert all(math.isfinite(profile.latency.ms({"conv0": width, "conv1": 8})) for width in (1, 5, 12))
    with LatencyTable.open(path) as table:
        assert profile.coverage.points > 0 and len(table) >= profile.coverage.points
        assert (table.fingerprint.runtime, table.fingerprint.precision) == ("openvino", "fp32")
    known = profile_known(model, path)
    assert known.latency.ms({"conv0": 8, "conv1": 5}) == profile.latency.ms({"conv0": 8, "conv1": 5})
