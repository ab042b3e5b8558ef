"""The report of a compression: promised and measured figures, and reasons of everything left alone, as a frozen value.

It is JSON (``version`` 6; 1, which knew widths only, 2, which knew fp32 only, 3, which did not say how often an engine
was measured, 4, which did not say how the slim network was trained, and 5, which knew no plain export and no search for
the least latency, still load) and a terminal table. Times are milliseconds, ``parity_max_rel`` is the largest deviation
of the slim network's output relative to the dense output's scale. Figures that were not taken are ``None``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from sluice.artifacts.report_least import LeastRow, least_row
from sluice.artifacts.report_recovery import RecoveryRow, recovery_row
from sluice.artifacts.report_rows import EditRow, GroupRow, MethodRow, PieceRow, piece_row
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console, Group

__all__ = ["Report"]

VERSION = 6
# Fields that reports of earlier versions lack, by version.
MEASURING: dict[str, Any] = {
    "runs": None, "dense_runs": None, "uncertainty": None, "quiet": True, "points": None, "complete": None,
    "disturbed": 0, "estimated": 0.0, "gap": None,
}  # fmt: skip
NEWEST: dict[str, Any] = {
    "slower": 0.0, "plain_ms": None, "plain_uncertainty": None, "from_plain": False, "least": None,
}  # fmt: skip
TRAINING: dict[str, Any] = {"recovery": None, **NEWEST}
LATER: dict[int, dict[str, Any]] = {
    1: {"methods": (), "edits": (), "readings": (), "metric_deployed": None, **MEASURING, **TRAINING},
    2: {"metric_deployed": None, **MEASURING, **TRAINING},
    3: {**MEASURING, **TRAINING},
    4: TRAINING,
    5: NEWEST,
    VERSION: {},
}


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one compression.

    ``readings`` are the scenarios that were rehearsed: name, promised milliseconds, held-out loss after every round
    that the plan took part in. The first is the chosen one. ``metric_deployed`` is the figure of merit of the file
    itself, where its precision (``fingerprint["precision"]``) is not fp32.

    The slim engine was measured ``runs`` times, built anew for each, and the dense one ``dense_runs`` times in all
    ``rounds``. ``uncertainty`` is that of their ratio, relative. Unless the machine was ``quiet`` for a moment of that,
    or close to it, the times are not to be relied on, and neither is the answer of `met`. ``slower`` is by how much it
    was from it, relative, in the quietest moment; 0 where it was quiet.

    The file that plain ``torch.onnx.export`` writes of the dense network takes ``plain_ms``, within the relative
    ``plain_uncertainty``. Where that is clearly less than ``dense_ms``, budgets in percent count from it
    (``from_plain``).

    The table held ``points`` of those that a ``complete`` one holds, ``disturbed`` of them of a machine that was never
    quiet. The part ``estimated`` of the promise rests on points that were not measured. Unless one of these takes less
    than its bound (`sluice.profiler.need`), no plan has a loss that is lower by more than the share ``gap``.

    ``recovery`` says how the slim network was trained, and by what trial; None where it was not. ``least`` is the
    curve of a search for the least latency, whose result has this report.
    """

    budget_ms: float
    dense_ms: float
    promised_ms: float
    measured_ms: float | None
    parity_max_rel: float | None
    params_dense: int
    params_slim: int
    macs_dense: int
    macs_slim: int
    metric_dense: float | None
    metric_slim: float | None
    seconds: float
    rounds: int
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    pieces: tuple[PieceRow, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    error: Mapping[str, float] = field(default_factory=dict)
    methods: tuple[MethodRow, ...] = ()
    edits: tuple[EditRow, ...] = ()
    readings: tuple[tuple[str, float, tuple[float, ...]], ...] = ()
    metric_deployed: float | None = None
    runs: int | None = None
    dense_runs: int | None = None
    uncertainty: float | None = None
    quiet: bool = True
    points: int | None = None
    complete: int | None = None
    disturbed: int = 0
    estimated: float = 0.0
    gap: float | None = None
    recovery: RecoveryRow | None = None
    slower: float = 0.0
    plain_ms: float | None = None
    plain_uncertainty: float | None = None
    from_plain: bool = False
    least: LeastRow | None = None

    def met(self) -> bool:
        """Whether the measured (where there is none, the promised) time is within the budget."""
        return (self.promised_ms if self.measured_ms is None else self.measured_ms) <= self.budget_ms

    def to_json(self) -> str:
        """Raises ``ValueError`` for figures that JSON does not have (NaN, infinity)."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SluiceError(f"this is no report: {error}; give the JSON that Report.save wrote") from None
        version = data.pop("version", None) if isinstance(data, dict) else None
        if version not in LATER:
            raise SluiceError(
                f"report has version {version!r}, this package reads 1 to {VERSION}; make the report again"
            )
        data = {**LATER[version], **data}
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise SluiceError(f"report lacks or adds {sorted(set(data) ^ names)}; make the report again")
        data["pieces"] = tuple(piece_row(row) for row in data["pieces"])
        data["groups"] = tuple(GroupRow(**row) for row in data["groups"])
        data["skipped"] = tuple((name, reason) for name, reason in data["skipped"])
        data["methods"] = tuple(MethodRow(**row) for row in data["methods"])
        data["edits"] = tuple(EditRow(**row) for row in data["edits"])
        data["readings"] = tuple((name, ms, tuple(losses)) for name, ms, losses in data["readings"])
        data["recovery"] = recovery_row(data["recovery"])
        data["least"] = least_row(data["least"])
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON whole or not at all: an old file at ``path`` stays until the new one is complete."""
        write_atomically(path, self.to_json().encode())

    def table(self) -> Group:
        """The report for a ``rich`` console.

        It holds the summary, the methods, the rehearsal, the training, the curve of a search, the pieces by saved time,
        the edits, and the reasons of everything left alone.
        """
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [self._summary(), Text(self._verdict())]
        if self.runs:
            parts.append(Text(self._measuring()))
        if self.plain_ms and self.dense_ms:
            parts.append(Text(self._plain(self.plain_ms)))
        if self.points:
            parts.append(Text(self._knowing()))
        if self.methods:
            parts += [Text(), self._methods()]
        if self.readings:
            parts += [Text(), self._readings()]
        if self.recovery is not None:
            tried = [self.recovery.table()] if self.recovery.trials else []
            parts += [Text(), *tried, *map(Text, self.recovery.lines())]
        if self.least is not None:
            parts += [Text(), self.least.table(), *map(Text, self.least.lines())]
        if self.pieces:
            parts += [Text(), self._pieces()]
        if self.groups:
            kept, dense = sum(g.kept for g in self.groups), sum(g.dense for g in self.groups)
            cut = sum(g.kept < g.dense for g in self.groups)
            parts += [Text(), Text(f"{cut} of {len(self.groups)} groups cut, {kept} of {dense} channels kept")]
        if self.edits:
            parts += [Text(), Text("restructured")]
            parts += [Text(f"  {edit.method} {edit.name}: {edit.detail}") for edit in self.edits]
        if self.skipped:
            parts += [Text(), Text("left alone")]
            parts += [Text(f"  {name}: {reason}") for name, reason in self.skipped]
        return Group(*parts)

    def render(self, console: Console) -> None:
        console.print(self.table())

    def _summary(self) -> Any:
        from rich.table import Table

        table = Table("", "dense", "slim", "slim/dense", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        rows: list[tuple[str, float | None, float | None, str]] = [
            ("promised ms", self.dense_ms, self.promised_ms, ",.3f"),
            ("measured ms", None, self.measured_ms, ",.3f"),
            ("parameters", self.params_dense, self.params_slim, ",d"),
            ("MACs", self.macs_dense, self.macs_slim, ",d"),
        ]
        for name, dense, slim, style in rows:
            share = f"{100 * slim / dense:.1f}%" if dense and slim is not None else ""
            table.add_row(name, _figure(dense, style), _figure(slim, style), share)
        if self.metric_dense is not None or self.metric_slim is not None:
            both = self.metric_dense is not None and self.metric_slim is not None
            change = f"{(self.metric_slim or 0.0) - (self.metric_dense or 0.0):+.4g}" if both else ""
            table.add_row("metric", _figure(self.metric_dense, ".4f"), _figure(self.metric_slim, ".4f"), change)
        if self.metric_deployed is not None:
            name = f"metric in {self.fingerprint.get('precision', 'the file')}"
            both = self.metric_dense is not None
            change = f"{self.metric_deployed - (self.metric_dense or 0.0):+.4g}" if both else ""
            table.add_row(name, "", _figure(self.metric_deployed, ".4f"), change)
        return table

    def _verdict(self) -> str:
        what = "promised" if self.measured_ms is None else "measured"
        busy = f" on a machine that took {self.slower:.1%} more than when it is quiet" if self.slower else ""
        busy = busy if self.quiet else " on a machine that was never quiet"
        lines = [f"budget {self.budget_ms:.3f} ms {'met' if self.met() else 'MISSED'} as {what}{busy}"]
        if self.measured_ms is not None and self.measured_ms <= self.budget_ms < self.promised_ms:
            lines.append(f"while {self.promised_ms:.3f} ms, which is more, were promised")
        if self.parity_max_rel is not None:
            lines.append(f"parity {self.parity_max_rel:.1e}")
        lines += [f"{name} {value:.4g}" for name, value in self.error.items()]
        lines.append(f"{_rounds(self.rounds)}, {self.seconds:.1f} s")
        return ", ".join(lines)

    def _measuring(self) -> str:
        within = "" if self.uncertainty is None else f", within {self.uncertainty:.1%}"
        dense = f"the dense one {_times(self.dense_runs)} in {_rounds(self.rounds)}"
        return f"engine measured {_times(self.runs)}, {dense}{within}{'' if self.quiet else '; measure again'}"

    def _plain(self, plain_ms: float) -> str:
        slim_ms = self.promised_ms if self.measured_ms is None else self.measured_ms
        less = f"plain export takes {plain_ms / self.dense_ms:.1%} of the dense time"
        less += "" if self.plain_uncertainty is None else f", within {self.plain_uncertainty:.1%}"
        counts = ", and budgets in percent count from it" if self.from_plain else ""
        return f"{less}{counts}; slim takes {slim_ms / plain_ms:.1%} of it"

    def _knowing(self) -> str:
        told = f"{self.points:,} points measured of {self.complete:,} in a complete table"
        told += f", {self.disturbed:,} of them on a machine that was never quiet" if self.disturbed else ""
        if self.estimated:
            return f"{told}; {self.estimated:.1%} of the promise is estimated"
        return told if self.gap is None else f"{told}; the plan is within {self.gap:.1%} of the best one there"

    def _methods(self) -> Any:
        from rich.table import Table

        table = Table("method", "sites changed", "ms saved by it", "priced at a loss of", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.methods:
            table.add_row(row.name, str(row.sites), f"{row.saved_ms:.3f}", _figure(row.loss, ".4g"))
        return table

    def _readings(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table("rehearsed", "promised ms", "held-out losses", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name, ms, losses in self.readings:
            table.add_row(Text(name), f"{ms:.3f}", " ".join(f"{value:.4g}" for value in losses) or "-")
        return table

    def _pieces(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(
            "piece", "operator", "count", "extents", "ms before", "ms after", "saved", box=None, pad_edge=False
        )
        for column in (table.columns[2], *table.columns[4:]):
            column.justify = "right"
        for row in sorted(self.pieces, key=PieceRow.saved_ms, reverse=True):
            before, after = ("x".join(map(str, e)) for e in (row.extents_before, row.extents_after))
            table.add_row(
                # Text, not str: a name in brackets would be read as markup.
                Text(row.name),
                Text(row.description),
                str(row.count),
                before if before == after else f"{before} -> {after}",
                f"{row.ms_before:.3f}",
                f"{row.ms_after:.3f}",
                f"{row.saved_ms():.3f}",
            )
        return table


def _times(count: int | None) -> str:
    return "once" if count == 1 else f"{count or 0} times"


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"


def _figure(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
