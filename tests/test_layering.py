"""Who may import whom, held against the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sluice

ROOT = Path(next(iter(sluice.__path__)))
MODULES = {
    ".".join(("sluice", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# These serve on targets that have no torch; a trailing dot means everything below.
NUMPY_ONLY = (
    "sluice.core.errors",
    "sluice.core.files",
    "sluice.core.plan",
    "sluice.core.algebra",
    "sluice.core.latency",
    "sluice.passes.graph.view",
    "sluice.passes.graph.blocks",
    "sluice.passes.graph.chains",
    "sluice.passes.graph.segments",
    "sluice.passes.cut.merge_region",
    "sluice.passes.cut.compose",
    "sluice.solver.dynamic_program",
    "sluice.solver.beam_search",
    "sluice.passes.cut.factor",
    "sluice.solver.options",
)
WITHOUT_TORCH = (
    *NUMPY_ONLY,
    "sluice.passes.graph.coupling",
    "sluice.solver.milp",
    "sluice.solver.decide",
    "sluice.solver.random_configurations",
    "sluice.passes.graph.groups",
    "sluice.passes.cut.resolve",
    "sluice.passes.graph.onnx_axes",
    "sluice.passes.graph.onnx_graph",
    "sluice.passes.graph.static_shapes",
    "sluice.passes.cut.drop_onnx",
    "sluice.passes.cut.merge_onnx",
    "sluice.passes.cut.factor_onnx",
    "sluice.passes.cut.rewrite_onnx",
    "sluice.passes.precision.fold",
    "sluice.passes.precision.keep_float32",
    "sluice.passes.precision.half",
    "sluice.passes.precision.qdq_placement",
    "sluice.passes.precision.quantize",
    "sluice.passes.precision.to_precision",
    "sluice.profiler.",
    "sluice.runtime.",
    "sluice.passes.graph.onnx_file",
    "sluice.passes.precision.emulation",
    "sluice.artifacts.rounding_check",
    "sluice.artifacts.check",
    "sluice.cli",
    "sluice.commands.options",
    "sluice.commands.table",
    "sluice.artifacts.macs",
    "sluice.artifacts.report",
)
# (from, to): no module of the first may import one of the second.
FORBIDDEN = (
    ("sluice.passes.", "sluice.runtime."),
    ("sluice.runtime.", "sluice.passes."),
    ("sluice.", "sluice.cli"),
)
# Imported inside the function that needs them, never at import.
LAZY = ("tensorrt", "tensorrt_rtx", "onnxruntime", "timm", "matplotlib", "optuna", "onnx_graphsurgeon", "mlxtend")


def matches(module: str, pattern: str) -> bool:
    return (
        module.startswith(pattern) or module == pattern.removesuffix(".")
        if pattern.endswith(".")
        else module == pattern
    )


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names of imported modules, also those under a function unless ``top_level``."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    lazy = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    typing = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        if top_level and (id(node) in lazy or id(node) in typing):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path.name} has a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("source", "target"), FORBIDDEN)
def test_forbidden_imports(source: str, target: str) -> None:
    users = [m for m in MODULES if matches(m, source) and m not in ("sluice.cli", "sluice.__main__")]
    assert users
    assert not [(m, name) for m in users for name in imports(MODULES[m]) if matches(name, target)]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if any(matches(m, p) for p in WITHOUT_TORCH)))
def test_no_torch_in_the_source(module: str) -> None:
    assert not [
        name for name in imports(MODULES[module], top_level=True) if name.split(".")[0] in ("torch", "torchvision")
    ]


def test_the_table_names_modules_that_exist() -> None:
    for pattern in WITHOUT_TORCH:
        assert any(matches(m, pattern) for m in MODULES), pattern


def test_heavy_packages_are_lazy() -> None:
    found = [(m, n) for m, path in MODULES.items() for n in imports(path, top_level=True) if n.split(".")[0] in LAZY]
    assert not found


def test_importing_leaves_torch_out() -> None:
    wanted = sorted(m for m in MODULES if any(matches(m, p) for p in WITHOUT_TORCH))
    code = f"""
import importlib, sys
for name in {[m for m in wanted if m in NUMPY_ONLY]!r}:
    importlib.import_module(name)
early = {{"torch", "onnx", "onnxruntime", "scipy"}} & set(sys.modules)
for name in {wanted!r}:
    importlib.import_module(name)
print(sorted(early), sorted({{"torch", "onnxruntime", "onnx_graphsurgeon"}} & set(sys.modules)))
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
lacking = {"torch", "scipy", "tqdm", "rich", "safetensors", "onnxscript", "onnx_graphsurgeon", "onnxruntime"}
print(sorted(lacking & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=120
    )
    assert done.stdout.strip() == "[]"
