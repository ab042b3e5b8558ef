"""The records of runs, the runs that are left, and the comparison of ours with the best other.

1. A *cell* is a job at a budget. Every arm runs with the first seed; ours and the best *other* (Torch-Pruning, thin)
   with all. The other arms are ours without a part or with one more, and compete with nobody. A budget that has no
   stops on its way down has no arm with them.
2. The figure of an arm in a cell is its mean accuracy over its seeds. An arm whose file takes more than `LIMIT` of the
   budget, measured anew beside the plain export of the dense network, does not reach it: engines that are built again
   differ by 1 to 2% from themselves. The rule is the same for all.
3. ``ours_minus_best_other_min_B`` is the least over jobs at budget B, of cells whose first seeds are through. Where an
   other arm reaches a budget that ours misses, there is no number: none would be bad enough. Where ours alone reaches
   it, there is nothing to compare.
4. ``least_share``: of the measured shares with at most `LOST` points lost the least, over the budgets of a job at which
   the first seeds of ours and the others are through; the dense network itself, at 1, counts for everybody. The ratio
   is ours by the best other's. A job with fewer than `SEVERAL` such budgets has none. Budgets are halves of each other
   or less, so a ratio tells which budget an arm can still afford, and no more.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.pipeline.progressive import stops

__all__ = [
    "ARMS",
    "CELLS",
    "OTHERS",
    "SEEDS",
    "Cells",
    "Record",
    "Run",
    "Store",
    "figures",
    "least_shares",
    "of_cell",
    "outstanding",
    "summary",
]

OURS = "ours"
OTHERS = ("torch-pruning", "thin")
ARMS = (OURS, *OTHERS, "ours-old-defaults", "no-portfolio", "gates", "gates-first", "progressive")
SEEDS = (0, 1, 2)
LIMIT = 1.02
LOST = 1.0
SEVERAL = 2
ROUNDING = 1e-6  # of percent that come as float32
# (job, budget) -> epochs in all
Cells = Mapping[tuple[str, str], int]
EPOCHS = {"ds-cnn": 14, "resnet20-mnist": 7, "crepe-tiny": 7, "mobilenet_v2-mnist": 7}
CELLS: Cells = {(job, budget): EPOCHS[job] for job in EPOCHS for budget in ("50%", "25%", "15%", "10%")}
DIFFERENCES = ("50%", "25%", "15%")


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """A job at a budget by an arm, with a seed, and epochs in all."""

    job: str
    budget: str
    arm: str
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.job}-{self.budget.removesuffix('%')}-{self.arm}-s{self.seed}-e{self.epochs}"

    @property
    def share(self) -> float:
        return BudgetSpec.parse(self.budget).ms(1.0)


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of a run: percent, milliseconds, seconds; without an engine (``reason`` says why) most are None.

    ``dense_ms`` is of the plain export, ``measured_ms`` of the finished file. ``log`` is what was tried.
    """

    run: Run
    device: str
    dense_accuracy: float
    seconds: float
    accuracy: float | None = None
    dense_ms: float | None = None
    measured_ms: float | None = None
    params: int | None = None
    detail: str = ""
    reason: str = ""
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        return None if self.measured_ms is None or self.dense_ms is None else self.measured_ms / self.dense_ms

    @property
    def met(self) -> bool:
        return self.share is not None and self.share <= LIMIT * self.run.share

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in asdict(self).items() if k != "run"}
        return {**asdict(self.run), **own, "share": self.share, "met": self.met}

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
    """The runs that are known to be left, first seeds first; the best other is known when its rivals are through."""
    done = {record.run for record in records}
    all_firsts = [Run(*cell, arm, SEEDS[0], epochs) for cell, epochs in cells.items() for arm in ARMS]
    firsts = [run for run in all_firsts if run.arm != "progressive" or stops(run.share)]
    seconds = []
    for cell, epochs in cells.items():
        arms = [OURS]
        if all(Run(*cell, arm, SEEDS[0], epochs) in done for arm in OTHERS):
            arms += [best for best in [_best_other(_figures(records, cell, epochs))] if best]
        seconds += [Run(*cell, arm, seed, epochs) for arm in arms for seed in SEEDS[1:]]
    return [run for run in firsts + seconds if run not in done]


def summary(records: Sequence[Record], cells: Cells) -> dict[str, Any]:
    """The comparison by rules 3 and 4, and where there is none, with the reason."""
    left = outstanding(records, cells)
    differences: dict[str, list[float]] = {budget: [] for budget in DIFFERENCES}
    points, missed, alone = 0, [], []
    for cell, epochs in cells.items():
        if any((run.job, run.budget) == cell and run.arm in (OURS, *OTHERS) and run.seed == SEEDS[0] for run in left):
            continue
        found = _figures(records, cell, epochs)
        best = _best_other(found)
        if best is not None and OURS in found:
            points += 1
            differences.setdefault(cell[1], []).append(found[OURS] - found[best])
        elif best is not None:
            missed.append(" ".join(cell))
        elif OURS in found:
            alone.append(" ".join(cell))
    shares = least_shares(records, cells)
    ratios = [ours / other for _, ours, other in shares.values()]
    least = {}
    for budget in DIFFERENCES:
        known = differences[budget] and not any(name.endswith(f" {budget}") for name in missed)
        least[f"ours_minus_best_other_min_{budget.removesuffix('%')}"] = (
            round(min(differences[budget]), 4) if known else None
        )
    return {
        "points": points,
        **least,
        "least_share_ratio_worst": round(max(ratios), 4) if ratios else None,
        "least_share_ratio_median": round(statistics.median(ratios), 4) if ratios else None,
        "least_share_jobs": {
            job: {"budgets": list(budgets), OURS: round(ours, 4), "best other": round(other, 4)}
            for job, (budgets, ours, other) in shares.items()
        },
        "ours_misses": missed,
        "ours_alone": alone,
        "runs_left": len(left),
    }


def figures(records: Sequence[Record], cells: Cells) -> dict[tuple[str, str], dict[str, float | None]]:
    """For every cell with records, every arm that ran: mean accuracy minus dense, None where it cannot reach."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for cell, epochs in cells.items():
        for record in of_cell(records, cell, epochs):
            mean = _figures(records, cell, epochs).get(record.run.arm)
            change = None if mean is None else mean - record.dense_accuracy
            found.setdefault(cell, {})[record.run.arm] = change
    return found


def of_cell(records: Sequence[Record], cell: tuple[str, str], epochs: int) -> list[Record]:
    return [r for r in records if (r.run.job, r.run.budget, r.run.epochs) == (*cell, epochs)]


def _figures(records: Sequence[Record], cell: tuple[str, str], epochs: int) -> dict[str, float]:
    """Mean accuracy over its seeds of every arm that meets the budget with all of them."""
    found: dict[str, list[Record]] = {}
    for record in of_cell(records, cell, epochs):
        found.setdefault(record.run.arm, []).append(record)
    return {
        arm: statistics.fmean(r.accuracy for r in own if r.accuracy is not None)
        for arm, own in found.items()
        if all(record.met for record in own)
    }


def _best_other(found: Mapping[str, float]) -> str | None:
    return max((arm for arm in OTHERS if arm in found), key=lambda arm: found[arm], default=None)


def least_shares(records: Sequence[Record], cells: Cells) -> dict[str, tuple[tuple[str, ...], float, float]]:
    """Rule 4: by job the budgets that count, and the least shares of ours and of the best other."""
    done, found = {record.run for record in records}, {}
    for job in dict.fromkeys(job for job, _ in cells):
        through = [
            cell
            for cell, epochs in cells.items()
            if cell[0] == job and all(Run(*cell, arm, SEEDS[0], epochs) in done for arm in (OURS, *OTHERS))
        ]
        if len(through) >= SEVERAL:
            own, other = (_least(records, {cell: cells[cell] for cell in through}, arms) for arms in ((OURS,), OTHERS))
            found[job] = tuple(budget for _, budget in through), own, other
    return found


def _least(records: Sequence[Record], cells: Cells, arms: Sequence[str]) -> float:
    shares = [1.0]
    for cell, epochs in cells.items():
        for arm in arms:
            own = [r for r in of_cell(records, cell, epochs) if r.run.arm == arm and r.accuracy is not None]
            lost = [r.dense_accuracy - r.accuracy for r in own if r.accuracy is not None]
            if own and statistics.fmean(lost) <= LOST + ROUNDING:
                shares.append(statistics.fmean(r.share for r in own if r.share is not None))
    return min(shares)
