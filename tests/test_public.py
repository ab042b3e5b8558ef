"""The public names, and that asking for one of them is what loads torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sluice
from sluice.core.version import INSTALL_TORCH
from tests.tiny import dense_onnx_in

PUBLIC = """Budget LatencyTable Plan Recovery Report SluiceError __version__ analyze capture close_gates compress
compress_onnx export
finish gate_parameters insert_gates load other_parameters profile rewrite_onnx rewrite_torch sweep""".split()  # noqa: SIM905
ROOT = Path(__file__).resolve().parent.parent


def test_public_names() -> None:
    assert sorted(sluice.__all__) == PUBLIC
    assert dir(sluice) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_importable_and_documented(name: str) -> None:
    found = getattr(sluice, name)
    if name != "__version__":
        assert found.__name__ == name
        assert found.__doc__
        assert name in sys.modules[found.__module__].__all__


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'sluice' has no attribute 'prune'"):
        _ = sluice.prune


def loaded(code: str) -> list[str]:
    """Which of the heavy packages are loaded after ``code`` in a fresh interpreter."""
    heavy = ["torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "scipy", "numpy", "rich", "tqdm"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*[m for m in {heavy} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.split()


def test_lean_imports() -> None:
    assert loaded("import sluice, sluice.cli") == []
    assert loaded("import sluice\nsluice.Plan, sluice.SluiceError, sluice.Report") == ["numpy"]
    assert "torch" not in loaded("import sluice\nsluice.LatencyTable, sluice.rewrite_onnx")
    assert "torch" in loaded("import sluice\nsluice.capture")


def test_without_torch_files_are_inspected_and_the_rest_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = dense_onnx_in(tmp_path)
    code = f"""
import sys
sys.modules["torch"] = None
import sluice
from sluice.cli import main
assert main(["inspect", {str(model)!r}]) == 0
assert main(["inspect", "sluice:resnet20"]) == 1
try:
    sluice.compress
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 groups, 23 channels that can be cut" in done.stdout
    assert done.stderr == f"sluice: error: this needs PyTorch; {INSTALL_TORCH}\n"
    assert done.stdout.splitlines()[-1] == f"sluice.compress needs PyTorch; {INSTALL_TORCH}"
