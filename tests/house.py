"""The house: its rooms, the floors they lie on, and the arrows between them, from the imports themselves.

``python -m tests.house`` prints the figures; `tests/test_layering.py` holds them to their bounds.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import sluice

__all__ = ["MODULES", "circles", "figures", "imports", "room_of", "rooms"]

ROOT = Path(next(iter(sluice.__path__)))
MODULES = {
    ".".join(("sluice", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
FRONT = ("sluice", "sluice.__main__")  # what users import; its names lie in every room


@cache
def imports(path: Path, top_level: bool = False) -> frozenset[str]:
    """Absolute names of imported modules, also those under a function unless ``top_level``."""
    tree = ast.parse(path.read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    typing = [i for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)]
    later = {id(node) for part in (*functions, *typing) for node in ast.walk(part)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if top_level and id(node) in later:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path.name} has a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def room_of(module: str) -> str:
    """The folder of a module below ``sluice``; ``cli`` is a room by itself."""
    path = MODULES[module].relative_to(ROOT)
    return path.stem if path.parent == Path() else path.parent.as_posix()


def arrows() -> dict[str, set[str]]:
    """By module the modules that it imports, at any place."""
    public = {f"sluice.{name}": module for name, module in sluice._WHERE.items()}
    return {
        m: {public.get(n, n) for n in imports(path) if public.get(n, n) in MODULES} - {m, *FRONT}
        for m, path in MODULES.items()
        if m not in FRONT
    }


def rooms() -> dict[str, set[str]]:
    """By room the rooms that it imports from."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in arrows().items():
        found[room_of(module)] |= {room_of(target) for target in targets if target not in FRONT}
    return {room: targets - {room} for room, targets in found.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other, of two and more."""
    reach = {node: set(_reached(graph, node)) for node in graph}
    found: list[list[str]] = []
    for node in sorted(graph):
        ring = sorted(other for other in reach[node] if node in reach.get(other, ()))
        if len(ring) > 1 and ring not in found:
            found.append(ring)
    return found


def _reached(graph: Mapping[str, set[str]], node: str) -> Iterator[str]:
    seen: set[str] = set()
    stack = list(graph.get(node, ()))
    while stack:
        here = stack.pop()
        if here not in seen:
            seen.add(here)
            stack += graph.get(here, ())
            yield here


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """By room the longest way down; only of a graph without circles."""
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            known[room] = 1 + max((floor(below) for below in graph.get(room, ())), default=0)
        return known[room]

    for room in graph:
        floor(room)
    return known


def figures() -> dict[str, object]:
    """Names under ``sluice``, the longest file, circles, arrows between rooms, floors."""
    graph = rooms()
    lines = {m: len(path.read_text().splitlines()) for m, path in MODULES.items()}
    longest = max(lines, key=lambda m: lines[m])
    names = sorted({path.relative_to(ROOT).parts[0] for path in MODULES.values()} - {"__init__.py", "__main__.py"})
    return {
        "names": names,
        "files": len(MODULES),
        "lines": sum(lines.values()),
        "longest": (longest, lines[longest]),
        "module circles": circles(arrows()),
        "room circles": circles(graph),
        "rooms": len(graph),
        "arrows": sum(map(len, graph.values())),
        "floors": 0 if circles(graph) else max(floors(graph).values()),
    }


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name}: {value}")
