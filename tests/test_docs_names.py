"""Modules, names in them, rules of theirs and files that the docs and the docstrings point to are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sluice

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("sluice/**/*.py", "benchmarks/*.py", "examples/**/*.py", "docs/*.md", "*.md", "benchmarks/*/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # tells of what is gone, too
)
DOTTED = re.compile(r"`((?:sluice|benchmarks|examples)(?:\.\w+)+)`(?:,\s+(?:rules? )?(\d+)(?!\s*,\s*\d))?")
PATHS = re.compile(r"`((?:\w+/)+\w+\.(?:py|md|json))`")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def names(path: Path) -> frozenset[str]:
    """What a module holds: definitions, assignments and imports at its top, and names of other modules beside it."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def module_of(name: str) -> tuple[Path, tuple[str, ...]] | None:
    """The file of the longest module that begins the dotted name, and the parts that are left over."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:count])
        for path in (folder.with_suffix(".py"), folder / "__init__.py"):
            if path.exists():
                return path, tuple(parts[count:])
    return None


def missing(text: str) -> Iterator[str]:
    """What the text points to and is not there."""
    for name, rule in DOTTED.findall(text):
        found = module_of(name)
        if found is None:
            yield name
            continue
        path, rest = found
        public = path == ROOT / "sluice/__init__.py" and rest and rest[0] in dir(sluice)
        if rest and rest[0] not in names(path) and not public:
            yield name
        elif rule and not rest and not re.search(rf"^ *{rule}\. ", ast.get_docstring(parsed(path)) or "", re.MULTILINE):
            yield f"{name}, {rule}"
    for name in PATHS.findall(text):
        if not any((ROOT / folder / name).exists() for folder in ("", "sluice", "docs", "benchmarks/results")):
            yield name


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=shown)
def test_what_is_named_exists(path: Path) -> None:
    assert list(missing(path.read_text())) == []


def test_names_that_are_gone_are_found() -> None:
    text = """
    `sluice.core.latency` `sluice.core.latency.Term` `sluice.profile` (`sluice.profiler.fit.assemble`, 4)
    `sluice.core.gone` `sluice.core.latency.Gone` `sluice.gone` (`sluice.profiler.fit.assemble`, rule 40)
    `profiler/fit/cost_law.py` `sluice/core/latency.py` `docs/design.md` `profiler/fit/gone.py`
    """
    assert list(missing(text)) == [
        "sluice.core.gone",
        "sluice.core.latency.Gone",
        "sluice.gone",
        "sluice.profiler.fit.assemble, 40",
        "profiler/fit/gone.py",
    ]
