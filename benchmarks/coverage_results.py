"""The rows of `benchmarks.coverage` as lines, as a page, and as the figures that are asked of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.coverage_row import Row

__all__ = ["document", "lines", "summary"]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """``captured`` and ``cut_with_parity`` are counts, ``silent`` is the number of matrices."""
    return {
        "n": len(rows),
        "captured": sum(row.captured for row in rows),
        "cut_with_parity": sum(not row.failed for row in rows),
        "median_share": round(median(row.share for row in rows), 4) if rows else 0.0,
        "silent": sum(len(row.silent) for row in rows),
    }


def table(rows: Sequence[Row], kinds: Sequence[str]) -> list[list[str]]:
    """A header, a row for every kind, and one of all."""
    cells = [["kind", "networks", "captured", "cut with parity", "median share", "least share", "silent", "CPU s"]]
    for kind in (*kinds, "all"):
        mine = [row for row in rows if kind in (row.kind, "all")]
        if mine:
            found = summary(mine)
            spent = median(sum(row.seconds.values()) for row in mine)
            cells.append([
                kind, str(found["n"]), str(found["captured"]), str(found["cut_with_parity"]),
                f"{found['median_share']:.3f}", f"{min(row.share for row in mine):.3f}", str(found["silent"]),
                f"{spent:.1f}",
            ])  # fmt: skip
    return cells


def lines(rows: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    cells = table(rows, kinds)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    out = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    for row in rows:
        if row.failed:
            out.append(f"{row.spec}: {row.failed}: {row.reason}")
    return out


def document(rows: Sequence[Row], kinds: Sequence[str], listed: int) -> str:
    """``docs/coverage.md``; ``listed`` is the number of networks, run or not."""
    found = summary(rows)
    cells = table(rows, kinds)
    text = [
        "# Coverage",
        "",
        "Which architectures can be captured and cut, and how much of them. This page is made by",
        "`python -m benchmarks.coverage --show --write` of `benchmarks/results/coverage.json`. Weights are random and",
        "images small; `benchmarks/coverage_networks.py` has the arguments of every network.",
        "",
        *(
            [f"Of {listed} networks that are listed, {found['n']} have been run so far.", ""]
            if found["n"] < listed
            else []
        ),
        _states(rows),
        "",
        f"Of {found['n']} networks {found['captured']} are captured. {found['cut_with_parity']} are cut by a random",
        "plan that halves every group, with parity of the slim network with the closed one in torch, and of the cut",
        "ONNX file with the slim network, at two batch sizes where the file leaves its batch free. The share is of",
        "matrix parameters: numbers in tensors of two axes and more that lie on a group of both readings. A matrix",
        "that lies on none and that no reason names is silent. CPU seconds are the median of everything but imports.",
        "",
        "| " + " | ".join(cells[0]) + " |",
        "|---" * len(cells[0]) + "|",
        *("| " + " | ".join(row) + " |" for row in cells[1:]),
        "",
    ]
    if any(row.failed for row in rows):
        text += ["## What falls short", "", "| network | stage | reason |", "|---|---|---|"]
        text += [f"| `{row.spec}` | {row.failed} | {_cell(row.reason)} |" for row in rows if row.failed]
        text.append("")
    text += ["## Networks", ""]
    for kind in kinds:
        mine = [row for row in rows if row.kind == kind]
        if mine:
            text += [
                f"### {kind[0].upper()}{kind[1:]}",
                "",
                "| network | matrices on a group | what else is left alone |",
            ]
            text += ["|---|---|---|"]
            text += [f"| `{row.spec}` | {row.share:.3f} | {_cell(_left(row))} |" for row in mine]
            text.append("")
    return "\n".join(text)


def _states(rows: Sequence[Row]) -> str:
    """How many rows are of which commit."""
    counted = Counter(row.state or "no commit that was noted" for row in rows)
    told = ", ".join(f"{count} of {state}" for state, count in counted.most_common())
    return f"Rows by the last commit of the files that read and cut, as they were measured: {told}."


def _left(row: Row) -> str:
    """The weightiest reason, if it holds much."""
    found = next(iter(row.left_alone.items()), None)
    return f"{found[1][0]:.1%}: {found[0]} ({found[1][1]})" if found and found[1][0] >= 0.001 else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
