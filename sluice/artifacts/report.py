"""The report of a compression: promised and measured figures, and reasons of everything left alone, as a frozen value.

It is JSON (``version`` 8; 1, which knew widths only, 2, which knew fp32 only, 3, which did not say how often an engine
was measured, 4, which did not say how the slim network was trained, 5, which knew no plain export and no search for the
least latency, 6, whose figure of merit was always called accuracy, and 7, which compared no engines, still load) and a
terminal table. Times are milliseconds, ``parity_max_rel`` is the largest deviation of the slim network's output
relative to the dense output's scale. Figures that were not taken are ``None``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sluice.artifacts.report_least import LeastRow
from sluice.artifacts.report_recovery import RecoveryRow
from sluice.artifacts.report_rows import EditRow, GroupRow, MethodRow, PieceRow
from sluice.core.errors import SluiceError
from sluice.core.files import read_bytes, write_atomically
from sluice.core.schema import Misfit, parse, typed

__all__ = ["Report"]

VERSION = 8
# Fields that reports of earlier versions lack, by version.
MEASURING: dict[str, Any] = {
    "runs": None, "dense_runs": None, "uncertainty": None, "quiet": True, "points": None, "complete": None,
    "disturbed": 0, "estimated": 0.0, "gap": None,
}  # fmt: skip
OUTPUTS: dict[str, Any] = {"engine_error": None, "engine_tolerance": None}
FIGURE: dict[str, Any] = {"figure": "accuracy", **OUTPUTS}
NEWEST: dict[str, Any] = {
    "slower": 0.0, "plain_ms": None, "plain_uncertainty": None, "from_plain": False, "least": None,
    **FIGURE,
}  # fmt: skip
TRAINING: dict[str, Any] = {"recovery": None, **NEWEST}
LATER: dict[int, dict[str, Any]] = {
    1: {"methods": (), "edits": (), "readings": (), "metric_deployed": None, **MEASURING, **TRAINING},
    2: {"metric_deployed": None, **MEASURING, **TRAINING},
    3: {**MEASURING, **TRAINING},
    4: TRAINING,
    5: NEWEST,
    6: FIGURE,
    7: OUTPUTS,
    VERSION: {},
}


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one compression.

    ``readings`` are the scenarios that were rehearsed: name, promised milliseconds, held-out loss after every round
    that the plan took part in. The first is the chosen one. ``figure`` says what the metrics are; ``metric_deployed``
    is that of the file itself, where its precision (``fingerprint["precision"]``) is not fp32.

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

    Outputs of the deployed engine differ from fp32 (of an int8 engine from its file) by ``engine_error``, relative, of
    which the precision explains ``engine_tolerance``.

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
    figure: str = "accuracy"
    engine_error: float | None = None
    engine_tolerance: float | None = None

    def met(self) -> bool:
        """Whether the measured (where there is none, the promised) time is within the budget."""
        return (self.promised_ms if self.measured_ms is None else self.measured_ms) <= self.budget_ms

    def to_json(self) -> str:
        """Raises ``ValueError`` for figures that JSON does not have (NaN, infinity)."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        try:
            data = parse(text)
            version = data.pop("version", None) if isinstance(data, dict) else None
            if type(version) is not int or version not in LATER:
                raise Misfit(f"its version is {version!r:.20}, this package reads 1 to {VERSION}")
            data = {**LATER[version], **data}
            if lacks := sorted({f.name for f in fields(cls)} ^ data.keys()):
                raise Misfit(f"it lacks or adds {lacks[:3]}")
            found: Report = typed(cls, {name: list(v) if v == () else v for name, v in data.items()})
        except Misfit as error:
            raise SluiceError(
                f"this is no report: {error}; give the JSON that Report.save wrote, or make it again"
            ) from None
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Raises `SluiceError` for what is no report."""
        try:
            return cls.from_json(read_bytes(path, "a report").decode())
        except UnicodeDecodeError:
            raise SluiceError(
                f"{os.fspath(path)!r} is no report: it is no text; give the report.json of a result"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON whole or not at all: an old file at ``path`` stays until the new one is complete."""
        write_atomically(path, self.to_json().encode())
