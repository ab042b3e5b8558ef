"""``sluice report``: a saved report, read again."""

from __future__ import annotations

import argparse
from pathlib import Path

from sluice.commands.words import print_report

__all__ = ["report"]


def report(args: argparse.Namespace) -> int:
    """Print the report of a folder that `sluice compress` wrote; with --full, every row of it."""
    from sluice.artifacts.report import Report

    path = Path(args.report)
    print_report(args, Report.load(path / "report.json" if path.is_dir() else path))
    return 0
