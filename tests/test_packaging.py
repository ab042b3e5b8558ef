"""What is installed is what is in the tree: one version, the checkpoint, the command; and files stay readable."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

import sluice

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHECKPOINT = "weights/resnet20_mnist.safetensors"


def test_version_is_written_once() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sluice.core.version.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sluice.__version__)
    assert f"## [{sluice.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" not in (ROOT / "setup.py").read_text()


def test_checkpoint_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sluice.models"]
    carried = [path for pattern in patterns for path in (ROOT / "sluice/models").glob(pattern)]
    assert ROOT / "sluice/models" / CHECKPOINT in carried
    assert all(1_000_000 < path.stat().st_size < 2_000_000 for path in carried)


def test_every_folder_of_modules_is_a_package() -> None:
    found = set(find_packages(str(ROOT), include=["sluice", "sluice.*"]))
    wanted = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sluice").rglob("*.py")}
    assert wanted == found
    assert {"sluice", "sluice.models", "sluice.passes", "sluice.profiler", "sluice.runtime"} <= found


def test_command_calls_the_command_line() -> None:
    from sluice.cli import main

    assert PROJECT["project"]["scripts"] == {"sluice": "sluice.cli:main"}
    assert callable(main)


def test_extras_hold_what_not_everybody_needs() -> None:
    named, always = PROJECT["project"]["optional-dependencies"], PROJECT["project"]["dependencies"]
    assert {"torch", "cpu", "gpu", "openvino", "trt"} <= set(named)
    assert not [name for name in always if name.startswith(("torch", "onnxruntime", "tensorrt", "openvino"))]
    assert (ROOT / "sluice/py.typed").exists() and PROJECT["tool"]["setuptools"]["package-data"]["sluice"] == [
        "py.typed"
    ]


def test_setup_is_only_a_shim() -> None:
    assert (ROOT / "setup.py").read_text().split() == ["from", "setuptools", "import", "setup", "setup()"]


def test_every_requirement_of_the_tests_is_pinned() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~ ]", name)[0]).lower()

    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normal(line) for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    named = ("torch", "cpu", "openvino", "dev", "demo")
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in named for name in extras[extra]), "setuptools"]
    wanted.remove("torch-sluice[torch,cpu,openvino]")
    assert [name for name in wanted if normal(name) not in pinned] == []


@pytest.mark.parametrize("path", sorted((ROOT / "sluice").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
