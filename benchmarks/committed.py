"""Committed results that are rows by name, in a JSON file with a head of what holds for all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["demand_rows", "read_rows", "write_rows"]


def read_rows(path: Path) -> dict[str, Any]:
    """The rows of a file; none where there is no file."""
    return dict(json.loads(path.read_text())["rows"]) if path.exists() else {}


def write_rows(path: Path, head: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def demand_rows(path: Path, rows: Mapping[str, Any]) -> None:
    """Exit with a sentence where there is nothing to show."""
    if not rows:
        sys.exit(f"there is no result yet in {path}; run this without --show")
