"""The text of a report: its first line says what was reached, what follows says how it came about and how sure it is.

    1.13 -> 0.51 ms (45.1% of dense, budget 48.6% met, promised 0.53), accuracy 94.4 -> 93.8 (-0.6), batch 8 ...

1. Then come what each method contributed, sizes, how it was measured, the plans that were compared, the training, and
   the `FEW` layers that saved most. What a layer saves is net of what took its place.
2. The full text has every piece instead, joints between pieces and those that saved nothing among them, and does not
   shorten lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sluice.artifacts.report import Report
from sluice.artifacts.report_rows import JOINT, PieceRow

__all__ = ["first_line", "report_text"]

FEW = 10
ERRORS = {
    "median_abs_err": "median error {:.1%}",
    "p95_abs_err": "95th percentile {:.1%}",
    "n": "on {:.0f} engines",
}  # of the figures of `sluice.core.latency.LatencyModel.error`, those that a reader of a report needs


def report_text(report: Report, full: bool = False) -> Group:
    """The report for a ``rich`` console; ``full`` leaves no row out."""
    # Text, not str: a name in brackets would be read as markup.
    parts: list[Any] = [Text(first_line(report)), *map(Text, _marks(report))]
    if report.methods and not _is_dense(report):
        parts += [Text(), _methods(report)]
    parts += [Text(), *map(Text, _sizes(report)), *map(Text, _certainty(report))]
    if report.readings:
        parts += [Text(), _readings(report)]
    if report.recovery is not None:
        tried = [report.recovery.table()] if report.recovery.trials else []
        parts += [Text(), *tried, *map(Text, report.recovery.lines())]
    if report.least is not None:
        parts += [Text(), report.least.table(), *map(Text, report.least.lines())]
    if report.pieces and full:
        parts += [Text(), _pieces(report.pieces)]
    elif report.pieces and not _is_dense(report):
        parts += [Text(), _layers(report)]
    edits = [f"{edit.method} {edit.name}: {edit.detail}" for edit in report.edits]
    skipped = [f"{name}: {reason}" for name, reason in report.skipped]
    for title, lines in (("restructured", edits), ("left alone", skipped)):
        if lines:
            parts += [Text(), Text(title), *map(Text, _shortened(lines, full))]
    return Group(*parts)


def first_line(report: Report) -> str:
    """The outcome in one line."""
    ms = report.promised_ms if report.measured_ms is None else report.measured_ms
    met = "met" if report.met() else "MISSED"
    budget = f"budget {_share(report.budget_ms, report.dense_ms)} {met}"
    promised = f"promised {report.promised_ms:.4g}" if report.measured_ms is not None else "as promised, not measured"
    parts = [f"{report.dense_ms:.4g} -> {ms:.4g} ms ({_share(ms, report.dense_ms)} of dense, {budget}, {promised})"]
    dense, slim = report.metric_dense, report.metric_slim
    if dense is not None and slim is not None:
        parts.append(f"{report.figure} {dense:.4g} -> {slim:.4g} ({slim - dense:+.4g})")
    made_for = report.fingerprint
    precision = made_for.get("precision", "fp32")
    if report.metric_deployed is not None:
        change = "" if dense is None else f" ({report.metric_deployed - dense:+.4g})"
        parts.append(f"in {precision} {report.metric_deployed:.4g}{change}")
    if "batch" in made_for:
        parts.append(f"batch {made_for['batch']}")
    parts += [str(made_for["runtime"])] if "runtime" in made_for else []
    if "threads" in made_for:
        parts.append(f"{made_for['threads']} thread{'' if made_for['threads'] == 1 else 's'}")
    parts.append(str(precision))
    return ", ".join([*parts, *([str(made_for["device"])] if made_for.get("device") else [])])


def _is_dense(report: Report) -> bool:
    return bool(report.groups) and not report.edits and all(g.kept == g.dense for g in report.groups)


def _marks(report: Report) -> Iterator[str]:
    """What a reader must know before the first line is believed."""
    if _is_dense(report):
        yield "the dense network already fits; nothing was cut"
    if not report.quiet:
        yield "measured on a machine that was never quiet: do not rely on these times, nor on the answer; measure again"
    elif report.slower:
        yield f"measured on a machine that took {report.slower:.1%} more than when it is quiet"
    if report.measured_ms is not None and report.measured_ms <= report.budget_ms < report.promised_ms:
        yield f"the measurement is within the budget of {report.budget_ms:.4g} ms, the promise is above it"


def _sizes(report: Report) -> Iterator[str]:
    yield _change("parameters", report.params_dense, report.params_slim)
    yield _change("multiply-accumulates", report.macs_dense, report.macs_slim)
    if report.groups:
        kept, dense = sum(g.kept for g in report.groups), sum(g.dense for g in report.groups)
        cut = sum(g.kept < g.dense for g in report.groups)
        yield f"{cut} of {len(report.groups)} groups cut, {kept} of {dense} channels kept"


def _certainty(report: Report) -> Iterator[str]:
    """How the figures were measured, and how far they can be trusted."""
    if report.runs:
        within = "" if report.uncertainty is None else f", within {report.uncertainty:.1%}"
        dense = f"the dense one {_times(report.dense_runs)} in {_rounds(report.rounds)}"
        yield f"engine measured {_times(report.runs)}, {dense}{within}"
    if report.plain_ms and report.dense_ms:
        yield _plain(report, report.plain_ms)
    if report.points:
        yield _knowing(report, report.points)
    errors = [text.format(report.error[name]) for name, text in ERRORS.items() if name in report.error]
    if errors:
        yield f"promises against engines of this network: {', '.join(errors)}"
    if report.parity_max_rel is not None:
        yield f"slim network, its file and the closed network differ by {report.parity_max_rel:.1e} of the output"
    if report.engine_tolerance is not None:
        of = "its int8 file" if report.fingerprint.get("precision") == "int8" else "the network in fp32"
        error = "no number" if report.engine_error is None else f"{report.engine_error:.1e}"
        yield f"the engine differs from {of} by {error}, of which its precision explains {report.engine_tolerance:.1e}"
    yield f"made in {report.seconds:,.0f} s"


def _plain(report: Report, plain_ms: float) -> str:
    slim_ms = report.promised_ms if report.measured_ms is None else report.measured_ms
    less = f"plain export takes {plain_ms / report.dense_ms:.1%} of the dense time"
    less += "" if report.plain_uncertainty is None else f", within {report.plain_uncertainty:.1%}"
    counts = ", and budgets in percent count from it" if report.from_plain else ""
    return f"{less}{counts}; slim takes {slim_ms / plain_ms:.1%} of it"


def _knowing(report: Report, points: int) -> str:
    told = f"{points:,} points measured of {report.complete:,} in a complete table"
    told += f", {report.disturbed:,} of them on a machine that was never quiet" if report.disturbed else ""
    if report.estimated:
        return f"{told}; {report.estimated:.1%} of the promise is estimated"
    return told if report.gap is None else f"{told}; the plan is within {report.gap:.1%} of the best one there"


def _methods(report: Report) -> Table:
    table = _table("method", "sites changed", "ms saved by it", "priced at a loss of", numbers=(1, 2, 3))
    for row in report.methods:
        loss = "-" if row.loss is None else f"{row.loss:.4g}"
        table.add_row(row.name, str(row.sites), f"{row.saved_ms:.3f}", loss)
    return table


def _readings(report: Report) -> Table:
    table = _table("rehearsed", "promised ms", "held-out losses", numbers=(1,))
    for name, ms, losses in report.readings:
        table.add_row(Text(name), f"{ms:.3f}", " ".join(f"{value:.4g}" for value in losses) or "-")
    return table


def _layers(report: Report) -> Table:
    """The layers that saved most, and what all others changed together."""
    layers: dict[str, list[PieceRow]] = {}
    for row in report.pieces:
        layers.setdefault(row.layer or row.name, []).append(row)
    saved = {name: sum(map(PieceRow.saved_ms, rows)) for name, rows in layers.items()}
    apart = {name for name, rows in layers.items() if all(row.description == JOINT for row in rows)}
    most = [name for name in sorted(saved.keys() - apart, key=lambda n: (-saved[n], n))[:FEW] if saved[name] > 0]
    table = _table("layer", "what it is", "ms before", "ms after", "saved", numbers=(2, 3, 4))
    for name in most:
        rows = layers[name]
        before, after = (sum(r.count * ms for r, ms in pairs) for pairs in (
            [(r, r.ms_before) for r in rows], [(r, r.ms_after) for r in rows],
        ))  # fmt: skip
        table.add_row(Text(name), Text(_became(rows)), f"{before:.3f}", f"{after:.3f}", f"{before - after:.3f}")
    rest = sum(saved.values()) - sum(saved[name] for name in most)
    if len(layers) > len(most):
        table.add_row(Text("everything else"), Text("joints between pieces included"), "", "", f"{rest:.3f}")
    return table


def _became(rows: Sequence[PieceRow]) -> str:
    first = next((row for row in rows if row.ms_before), rows[0])
    before, after = _extents(first)
    if first.ms_before and not first.ms_after:
        return f"{first.description}, replaced" if any(r.ms_after for r in rows) else f"{first.description}, gone"
    return first.description if before == after else f"{first.description}, {before} -> {after}"


def _pieces(rows: Iterable[PieceRow]) -> Table:
    table = _table("piece", "operator", "count", "sizes", "ms before", "ms after", "saved", numbers=(2, 4, 5, 6))
    for row in sorted(rows, key=PieceRow.saved_ms, reverse=True):
        before, after = _extents(row)
        sizes = before if before == after else f"{before} -> {after}"
        times = (f"{ms:.3f}" for ms in (row.ms_before, row.ms_after, row.saved_ms()))
        table.add_row(Text(row.name), Text(row.description), str(row.count), sizes, *times)
    return table


def _extents(row: PieceRow) -> tuple[str, str]:
    return "x".join(map(str, row.extents_before)), "x".join(map(str, row.extents_after))


def _shortened(lines: Sequence[str], full: bool) -> Iterator[str]:
    shown = lines if full or len(lines) <= FEW else lines[: FEW - 1]
    yield from (f"  {line}" for line in shown)
    if len(shown) < len(lines):
        yield f"  and {len(lines) - len(shown)} more; `sluice report DIR --full` has them all"


def _table(*heads: str, numbers: Sequence[int]) -> Table:
    table = Table(*heads, box=None, pad_edge=False)
    for place in numbers:
        table.columns[place].justify = "right"
    return table


def _change(what: str, dense: int, slim: int) -> str:
    return f"{what} {dense:,} -> {slim:,}" + (f" ({_share(slim, dense)})" if dense else "")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _times(count: int | None) -> str:
    return "once" if count == 1 else f"{count or 0} times"


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"
