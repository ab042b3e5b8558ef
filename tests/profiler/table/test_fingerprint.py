from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from sluice.core.errors import SluiceError
from sluice.profiler.table.fingerprint import Fingerprint, difference
from sluice.runtime.base.host import host_device, host_identity

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


X86 = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: 2\nmodel name\t: {}\nstepping\t: 1\n"
ARM = "processor\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n"


def test_host_device_reads_the_model_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz: fast\nprocessor\t: 1\nmodel name\t: Other\n")
    assert host_device(cpuinfo, tmp_path / "missing") == "Some CPU @ 2 GHz: fast"


def test_host_device_tells_cpus_of_one_name_apart(tmp_path: Path) -> None:
    names = []
    for family in (25, 26):
        cpuinfo = tmp_path / f"cpuinfo-{family}"
        cpuinfo.write_text("".join(X86.format(core, family, "AMD EPYC") for core in range(2)))
        names.append(host_device(cpuinfo, tmp_path / "missing"))
    assert names == ["AMD EPYC (family 25 model 2 stepping 1)", "AMD EPYC (family 26 model 2 stepping 1)"]


def test_host_device_without_a_model_name_is_the_board_with_all_kinds_of_cores(tmp_path: Path) -> None:
    cpuinfo, board = tmp_path / "cpuinfo", tmp_path / "model"
    cpuinfo.write_text("".join(ARM.format(core, part) for core, part in enumerate(["0xd0a", "0xd05", "0xd05"])))
    board.write_bytes(b"Some Board Developer Kit\0")
    assert host_device(cpuinfo, board) == "Some Board Developer Kit (implementer 0x41 part 0xd05/0xd0a)"


def test_host_device_has_a_fallback(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t:\n")
    missing = tmp_path / "missing"
    assert host_device(cpuinfo, missing) == host_device(missing, missing) != ""


def test_a_host_is_known_by_its_boot_or_by_its_number_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def host(machine: str, name: str, boot: str) -> frozenset[str]:
        files = [tmp_path / "machine-id", tmp_path / "boot_id"]
        for file, text in zip(files, (machine, boot), strict=True):
            file.write_text(f"{text}\n")
        monkeypatch.setattr(platform, "node", lambda: name)
        return host_identity(*files)

    here = host("m", "n", "b")
    assert len(here) == 2 and here & host("m", "n", "c") and here & host("", "pod-1", "b")
    # A container of the same image on another host, another machine, and nothing to go by.
    assert not here & host("m", "pod-2", "c") and not here & host("o", "n", "c") and host("", "n", "") == frozenset()
    assert not any("secret" in text for text in host("secret", "n", "b"))
