"""Who may import whom: floors of folders, and the folders that do without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house import MODULES, ROOT, circles, figures, imports, room_of, rooms

# From the roof down. A folder imports from floors below its own, never from its neighbours.
FLOORS = (
    ("cli",),
    ("commands", "pipeline"),
    ("artifacts", "importance", "models"),
    ("training",),
    ("profiler",),
    ("solver", "passes", "runtime"),
    ("core",),
)
# These serve on devices that have no torch. In `passes` torch is for the files that say so by their name.
TORCH_FREE = ("cli", "commands", "core", "solver", "profiler", "runtime", "passes", "artifacts")
TORCH_FILES = ("_torch", "aten", "capture", "export", "deploy", "result", "store")
TORCH_ROOMS = ("passes/gates",)
# These need no more than numpy: neither onnx nor scipy, which is for the modules that solve.
NUMPY_ONLY = ("core", "solver", "passes/graph", "passes/cut")
SOLVES = ("decide", "descent", "milp", "milp_axes", "milp_highs", "milp_rows", "random_configurations")
READS_ONNX = ("onnx", "static_shapes", "resolve")
LAZY = (
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "openvino",
    "timm",
    "matplotlib",
    "optuna",
    "onnx_graphsurgeon",
    "mlxtend",
)


def is_torch_free(module: str) -> bool:
    room, name = room_of(module), module.rpartition(".")[2]
    if module in ("sluice", "sluice.__main__") or room in TORCH_ROOMS:
        return module == "sluice"
    by_name = room.startswith(("passes", "artifacts")) and any(
        name.endswith(t) or name.startswith(t) for t in TORCH_FILES
    )
    return room.split("/")[0] in TORCH_FREE and not by_name


def is_numpy_only(module: str) -> bool:
    name = module.rpartition(".")[2]
    onnx = any(word in name for word in READS_ONNX)
    return room_of(module) in NUMPY_ONLY and is_torch_free(module) and name not in SOLVES and not onnx


def test_folders_import_from_floors_below() -> None:
    level = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}
    assert level.keys() == {room.split("/")[0] for room in rooms()}
    wrong = [
        (room, other)
        for room, others in rooms().items()
        for other in others
        if (mine := room.split("/")[0]) != (theirs := other.split("/")[0]) and level[mine] >= level[theirs]
    ]
    assert not wrong


def test_no_circle_and_a_house_that_fits_a_page() -> None:
    found = figures()
    assert found["module circles"] == [] and found["room circles"] == []
    assert len(found["names"]) <= 14, found["names"]  # type: ignore[arg-type]
    assert found["longest"][1] <= 320, found["longest"]  # type: ignore[index]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if is_torch_free(m)))
def test_no_torch_in_the_source(module: str) -> None:
    packages = {name.split(".")[0] for name in imports(MODULES[module], top_level=True)}
    assert not packages & {"torch", "torchvision"}


def test_heavy_packages_are_lazy() -> None:
    found = [(m, n) for m, path in MODULES.items() for n in imports(path, top_level=True) if n.split(".")[0] in LAZY]
    assert not found


def test_importing_leaves_torch_out() -> None:
    wanted = sorted(m for m in MODULES if is_torch_free(m))
    code = f"""
import importlib, sys
for name in {[m for m in wanted if is_numpy_only(m)]!r}:
    importlib.import_module(name)
early = {{"torch", "onnx", "onnxruntime", "scipy"}} & set(sys.modules)
for name in {wanted!r}:
    importlib.import_module(name)
print(sorted(early), sorted({{"torch", "onnxruntime", "openvino", "onnx_graphsurgeon"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )
    assert done.stdout.strip() == "[] []"


def test_the_agent_needs_numpy_and_onnx_alone() -> None:
    """What profiles on a device loads nothing that a device may lack."""
    code = """
import sys
import sluice.profiler.agent
lacking = {"torch", "scipy", "tqdm", "rich", "safetensors", "onnxscript", "onnx_graphsurgeon"}
lacking |= {"onnxruntime", "openvino"}
print(sorted(lacking & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )
    assert done.stdout.strip() == "[]"
