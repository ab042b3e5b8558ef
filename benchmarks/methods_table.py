"""What `benchmarks.methods` prints: one line per cell and arm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.methods_results import ARMS, Cells, Record, of_cell

__all__ = ["table"]


def table(records: Sequence[Record], cells: Cells) -> str:
    """Mean accuracy, its change against dense, measured share of the plain export, parameters, seeds, and how."""
    lines = []
    for cell, epochs in cells.items():
        mine = of_cell(records, cell, epochs)
        if not mine:
            continue
        dense = mine[0].dense_accuracy
        lines += ["", f"{cell[0]} at {cell[1]} of the plain export, dense {dense:.2f}%, {epochs} epochs in all"]
        lines.append(f"  {'arm':<18}{'accuracy':>9}{'change':>8}{'of dense':>10}{'params':>11}{'seeds':>7}")
        for arm in ARMS:
            own = [r for r in mine if r.run.arm == arm]
            reached = [r for r in own if r.accuracy is not None]
            if own and not reached:
                lines.append(f"  {arm:<18}cannot reach: {own[0].reason}")
            elif own:
                lines.append(_line(arm, dense, reached, len(own)))
    return "\n".join(lines)


def _line(arm: str, dense: float, reached: Sequence[Record], runs: int) -> str:
    mean = statistics.fmean(r.accuracy for r in reached if r.accuracy is not None)
    share = statistics.fmean(r.share for r in reached if r.share is not None)
    params = round(statistics.fmean(r.params for r in reached if r.params is not None))
    notes = ["over budget"] if not all(r.met for r in reached) else []
    notes += dict.fromkeys(r.detail for r in reached if r.detail)
    seeds = f"{len(reached)}" if len(reached) == runs else f"{len(reached)}/{runs}"
    row = f"  {arm:<18}{mean:>8.2f}%{mean - dense:>+8.2f}{share:>10.1%}{params:>11,d}{seeds:>7}"
    return f"{row}  {'; '.join(notes)}".rstrip()
