from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sluice.errors import SluiceError
from sluice.profiler.fingerprint import Fingerprint, difference
from sluice.runtime.host import host_device

ORIGIN = Fingerprint("Some CPU", "onnxruntime", "1.2.3", 1, "fp32", 8, "thread_cpu")


def test_json_round_trip() -> None:
    assert Fingerprint.from_json(ORIGIN.to_json()) == ORIGIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        ORIGIN.to_json().replace('"threads": 1', '"threads": true'),
        ORIGIN.to_json()[:-1] + ', "x": 1}',
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(SluiceError, match="measure again"):
        Fingerprint.from_json(text)


def test_difference_names_every_field_that_differs() -> None:
    assert difference(ORIGIN, ORIGIN) == ()
    other = replace(ORIGIN, runtime_version="1.3.0", batch=4)
    assert difference(ORIGIN, other) == ("runtime version is '1.2.3', not '1.3.0'", "batch is 8, not 4")


def test_host_device_reads_the_model_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz: fast\nprocessor\t: 1\nmodel name\t: Other\n")
    assert host_device(cpuinfo) == "Some CPU @ 2 GHz: fast"


def test_host_device_has_a_fallback(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t:\n")
    assert host_device(cpuinfo) == host_device(tmp_path / "missing") != ""
