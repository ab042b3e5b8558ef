"""What a verb prints: its result, as JSON for programs or in lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluice.artifacts.report import Report

__all__ = ["print_report", "print_result"]


def print_result(args: argparse.Namespace, data: Any, lines: Iterable[str]) -> int:
    """Print a result; the exit status of success."""
    print(json.dumps(data, indent=2) if args.json else "\n".join(lines))
    return 0


def print_report(args: argparse.Namespace, report: Report) -> None:
    """Print a report, as its file is or to be read."""
    from rich.console import Console

    from sluice.artifacts.report_text import report_text

    if args.json:
        print(report.to_json(), end="")
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(report_text(report, args.full))
