"""``sluice table``: show, compare, merge, mend and export latency tables."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sluice.commands.words import print_result

__all__ = ["add_table"]


def add_table(verbs: Any) -> None:
    """Hook the verb and its own verbs into the command line."""
    text = "Show, compare, merge, mend and export latency tables."
    tools = verbs.add_parser("table", help=text, description=text).add_subparsers(required=True, metavar="TOOL")

    def tool(run: Any) -> argparse.ArgumentParser:
        words = str(run.__doc__).strip()
        made: argparse.ArgumentParser = tools.add_parser(run.__name__, help=words, description=words)
        made.set_defaults(run=run)
        return made

    joined = tool(merge)
    joined.add_argument("tables", nargs="+", metavar="TABLE.db", help="tables; times become those of the first")
    joined.add_argument("-o", "--out", required=True, metavar="ALL.db", help="the table to write")
    shown = tool(show)
    shown.add_argument("table", metavar="TABLE.db")
    compared = tool(diff)
    compared.add_argument("a", metavar="A.db")
    compared.add_argument("b", metavar="B.db")
    mended = tool(forget)
    mended.add_argument("table", metavar="TABLE.db")
    for made in (joined, shown, compared, mended):
        made.add_argument("--json", action="store_true", help="print the result as JSON")
    rows = tool(csv)
    rows.add_argument("table", metavar="TABLE.db")
    rows.add_argument("-o", "--out", metavar="FILE.csv", help="the file to write (default: standard output)")


def merge(args: argparse.Namespace) -> int:
    """Make one table of several from devices or hosts of the same kind."""
    from sluice.profiler.table_tools.merge import merge_tables

    done = merge_tables(args.tables, args.out)
    data = {
        "out": args.out,
        "points": done.points,
        "engines": done.engines,
        "tables": [{"file": f, "times": r} for f, r in zip(args.tables, done.ratios, strict=True)],
    }
    lines = [f"{args.out}: {done.points} points, {done.engines} engines"]
    lines += [f"  {f}: times multiplied by {r:.4f}" for f, r in zip(args.tables, done.ratios, strict=True)]
    return print_result(args, data, lines)


def show(args: argparse.Namespace) -> int:
    """Show what a table holds: conditions, pieces, points, engines, calibration errors."""
    from sluice.commands.table_listing import to_data, to_lines
    from sluice.profiler.table.latency_table import LatencyTable

    with LatencyTable.open(args.table) as table:
        data = to_data(table)
    return print_result(args, data, to_lines(data))


def diff(args: argparse.Namespace) -> int:
    """Compare two tables piece by piece, those with the largest effect first; they may be of different devices."""
    from sluice.commands.table_diff import diff_data, diff_lines
    from sluice.profiler.table.latency_table import LatencyTable

    with LatencyTable.open(args.a) as a, LatencyTable.open(args.b) as b:
        data = diff_data(a, b)
    return print_result(args, data, diff_lines(data, (args.a, args.b)))


def forget(args: argparse.Namespace) -> int:
    """Forget the times of a machine that was never quiet, which are uncertain; they are taken anew where needed."""
    from sluice.profiler.table.latency_table import LatencyTable
    from sluice.profiler.table.measurement import UNCERTAIN
    from sluice.profiler.timing.reference_engine import KEY

    with LatencyTable.open(args.table) as table:
        points, engines = table.forget(UNCERTAIN, but=KEY)
    text = (
        f"{args.table}: {points} points and {engines} engines forgotten; profile again on the device, when it is quiet"
    )
    return print_result(args, {"points": points, "engines": engines}, [text])


def csv(args: argparse.Namespace) -> int:
    """Write one row per point: key, description, extents, ms, spread, samples."""
    from sluice.commands.table_listing import to_csv
    from sluice.core.files import check_output, write_atomically
    from sluice.profiler.table.latency_table import LatencyTable

    with LatencyTable.open(args.table) as table:
        if args.out:
            check_output(args.out, {"the latency table": args.table})
        text = to_csv(table)
    if args.out:
        write_atomically(args.out, text.encode())
    else:
        sys.stdout.write(text)
    return 0
