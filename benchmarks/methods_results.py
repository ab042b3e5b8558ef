"""The records of runs, the runs that are left, and the comparison of joint with the best single method.

1. A *cell* is a job at a budget. Every method runs with the first seed; joint and the best single method with all.
2. The figure of a method in a cell is its mean accuracy over its seeds. The best single method is the one with the
   highest figure. Its figure counts only when it has all seeds, so that a lucky first seed makes no winner.
3. A single method whose engine misses the budget in the last measurement still competes; joint's does not count then.
4. ``joint_minus_best_single`` is taken in the cells that joint and some single method reach. Where a single method
   reaches a budget that joint misses, there is no worst and no mean: no number would be bad enough.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically

__all__ = [
    "CELLS",
    "METHODS",
    "SEEDS",
    "SINGLES",
    "Cells",
    "Record",
    "Run",
    "Store",
    "figures",
    "outstanding",
    "summary",
    "table",
]

SINGLES = ("filter", "rank", "block", "merge", "bsr")
METHODS = (*SINGLES, "joint", "thin")
SEEDS = (0, 1)
# (job, budget) -> epochs of fine-tuning
Cells = Mapping[tuple[str, str], int]
CELLS: Cells = {
    ("resnet20-mnist", "50%"): 10,
    ("resnet20-mnist", "25%"): 10,
    ("crepe-tiny", "50%"): 6,
    ("crepe-tiny", "25%"): 6,
    ("mobilenet_v2-mnist", "50%"): 10,
}


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """One compression: job, budget, method, seed, and epochs of fine-tuning."""

    job: str
    budget: str
    method: str
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.job}-{self.budget.removesuffix('%')}-{self.method}-s{self.seed}-e{self.epochs}"


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of a run: percent, milliseconds, seconds; without an engine (``reason`` says why) most are None."""

    run: Run
    device: str
    dense_accuracy: float
    seconds: float
    accuracy: float | None = None
    dense_ms: float | None = None
    budget_ms: float | None = None
    measured_ms: float | None = None
    params: int | None = None
    detail: str = ""
    reason: str = ""

    @property
    def met(self) -> bool:
        return self.measured_ms is not None and self.budget_ms is not None and self.measured_ms <= self.budget_ms

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.run), **{k: v for k, v in asdict(self).items() if k != "run"}, "met": self.met}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        own = {f.name for f in fields(Record)} - {"run"}
        return Record(Run(**{f.name: data[f.name] for f in fields(Run)}), **{name: data[name] for name in own})


@dataclass(frozen=True, slots=True)
class Store:
    """One file for every finished run, so that a kill costs one run and two processes may share the folder."""

    folder: Path

    def save(self, record: Record) -> None:
        text = json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(self.folder / f"{record.run.name}.json", text.encode())

    def load(self) -> list[Record]:
        """All records, in the order of their runs.

        Raises:
            SluiceError: a file is not such a record.
        """
        found = []
        for path in self.folder.glob("*.json"):
            try:
                found.append(Record.from_dict(json.loads(path.read_text())))
            except (ValueError, KeyError, TypeError) as error:
                raise SluiceError(
                    f"{str(path)!r} is no record of a run ({error!r}); delete it, to run it again"
                ) from None
        return sorted(found, key=lambda record: record.run)


def outstanding(records: Sequence[Record], cells: Cells) -> list[Run]:
    """The runs that are known to be left; second seeds become known when the first seeds are through."""
    done = {record.run for record in records}
    left = []
    for (job, budget), epochs in cells.items():
        firsts = [Run(job, budget, method, SEEDS[0], epochs) for method in METHODS]
        methods = ["joint"]
        if all(run in done for run in firsts if run.method in SINGLES):
            methods = [name for name in (_best_single(_figures(records, job, budget, epochs)), "joint") if name]
        seconds = [Run(job, budget, method, seed, epochs) for method in methods for seed in SEEDS[1:]]
        left += [run for run in firsts + seconds if run not in done]
    return left


def summary(records: Sequence[Record], cells: Cells) -> dict[str, Any]:
    """The comparison over all cells to which the rules apply, and the other cells, with the reason."""
    left = outstanding(records, cells)
    differences, missed, alone = [], [], []
    for (job, budget), epochs in cells.items():
        if any((run.job, run.budget) == (job, budget) and run.method != "thin" for run in left):
            continue
        found = _figures(records, job, budget, epochs)
        best = _best_single(found)
        own = [r for r in records if r.run in {Run(job, budget, "joint", seed, epochs) for seed in SEEDS}]
        joint = found.get("joint") if all(record.met for record in own) else None
        if best is not None and joint is not None:
            differences.append(joint - found[best])
        elif best is not None:
            missed.append(f"{job} {budget}")
        elif joint is not None:
            alone.append(f"{job} {budget}")
    known = bool(differences) and not missed
    return {
        "points": len(differences),
        "joint_minus_best_single_worst": round(min(differences), 4) if known else None,
        "joint_minus_best_single_mean": round(statistics.fmean(differences), 4) if known else None,
        "joint_misses": missed,
        "joint_alone": alone,
        "runs_left": len(left),
    }


def table(records: Sequence[Record], cells: Cells) -> str:
    """One line per cell and method: mean accuracy, its change against dense, milliseconds, seeds."""
    lines = []
    for (job, budget), epochs in cells.items():
        mine = [r for r in records if (r.run.job, r.run.budget, r.run.epochs) == (job, budget, epochs)]
        if not mine:
            continue
        dense = mine[0].dense_accuracy
        lines += ["", f"{job} at {budget} of the dense latency, dense {dense:.2f}%, {epochs} epochs of fine-tuning"]
        lines.append(f"  {'method':<8}{'accuracy':>10}{'change':>9}{'of dense':>10}{'params':>11}{'seeds':>7}")
        for method in METHODS:
            own = [r for r in mine if r.run.method == method]
            reached = [r for r in own if r.accuracy is not None]
            if own and not reached:
                lines.append(f"  {method:<8}cannot reach: {own[0].reason}")
            elif own:
                lines.append(_line(method, dense, reached, len(own)))
    return "\n".join(lines)


def _line(method: str, dense: float, reached: Sequence[Record], runs: int) -> str:
    mean = statistics.fmean(r.accuracy for r in reached if r.accuracy is not None)
    share = statistics.fmean(r.measured_ms / r.dense_ms for r in reached if r.measured_ms and r.dense_ms)
    params = round(statistics.fmean(r.params for r in reached if r.params is not None))
    notes = sorted(
        {r.detail for r in reached if r.detail} | ({"over budget"} if not all(r.met for r in reached) else set())
    )
    seeds = f"{len(reached)}" if len(reached) == runs else f"{len(reached)}/{runs}"
    row = f"  {method:<8}{mean:>9.2f}%{mean - dense:>+9.2f}{share:>10.1%}{params:>11,d}{seeds:>7}"
    return f"{row}  {', '.join(notes)}".rstrip()


def figures(records: Sequence[Record], cells: Cells) -> dict[tuple[str, str], dict[str, float | None]]:
    """For every cell with records, every method that ran: mean accuracy minus dense, None where it cannot reach."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for (job, budget), epochs in cells.items():
        for record in records:
            if (record.run.job, record.run.budget, record.run.epochs) == (job, budget, epochs):
                mean = _figures(records, job, budget, epochs).get(record.run.method)
                change = None if mean is None else mean - record.dense_accuracy
                found.setdefault((job, budget), {})[record.run.method] = change
    return found


def _figures(records: Sequence[Record], job: str, budget: str, epochs: int) -> dict[str, float]:
    """Mean accuracy over its seeds of every method that reaches the budget with some seed."""
    found: dict[str, list[float]] = {}
    for record in records:
        run = record.run
        if (run.job, run.budget, run.epochs) == (job, budget, epochs) and record.accuracy is not None:
            found.setdefault(run.method, []).append(record.accuracy)
    return {method: statistics.fmean(values) for method, values in found.items()}


def _best_single(found: Mapping[str, float]) -> str | None:
    return max((m for m in SINGLES if m in found), key=lambda m: found[m], default=None)
