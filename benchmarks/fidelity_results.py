"""The records of runs, the runs that make the result, and the errors of promises.

1. A *run* is a network on a number of threads: profiled once, then compared with random plans that no fit has seen.
2. The error of a plan is ``|promised / measured - 1|``. Totals pool the plans of all runs, but for Spearman's rank
   correlation: it is the worst run's, since large and small networks together are ranked well by any promise.
3. Where the plans of a run have no rank correlation, because all are promised or take the same, there is no total of
   it either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.profiler.fit.least_squares import errors
from sluice.solver.options import METHODS

__all__ = [
    "BATCHES",
    "PLANS",
    "SEED",
    "STANDARD",
    "THREADS",
    "Outcome",
    "Record",
    "Run",
    "Store",
    "detail",
    "product",
    "read_result",
    "summary",
    "table",
    "write_result",
]

# Network -> batch size. One large image takes long enough to measure; a single small one does not.
BATCHES: Mapping[str, int] = {
    "resnet20": 8,
    "resnet1d": 8,
    "se_resnet": 8,
    "densenet": 8,
    "mobilenet_v2": 8,
    "vgg16_bn": 8,
    "crepe_tiny": 8,
    "resnet50": 1,
}
THREADS = (1, 2)
PLANS = 40
SEED = 1000
WORST = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One network, profiled for ``batch`` and ``threads`` with all edits of ``methods``; plans from ``seed``."""

    network: str
    batch: int
    threads: int
    methods: tuple[str, ...]
    plans: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-b{self.batch}-t{self.threads}-{'-'.join(self.methods)}-p{self.plans}-s{self.seed}"

    @property
    def table(self) -> str:
        """File name of the latency table, which runs share that differ in plans or methods alone."""
        return f"{self.network}-b{self.batch}-t{self.threads}.db"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One random plan: its numbers of factorised layers, dropped branches and merged runs, its milliseconds."""

    promised_ms: float
    measured_ms: float
    ranks: int
    drops: int
    merges: int

    @property
    def ratio(self) -> float:
        return self.promised_ms / self.measured_ms


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of a run on this device; ``profile_seconds`` without those of calls that were stopped.

    The table holds ``points`` of the network, ``disturbed`` of which were measured on a machine that was never quiet. A
    complete table has ``grid`` points; in records of tables that were filled beforehand that is all widths and ranks.
    """

    run: Run
    device: str
    runtime: str
    profile_seconds: float
    points: int
    grid: int
    disturbed: int
    outcomes: tuple[Outcome, ...]

    @property
    def figures(self) -> dict[str, float]:
        counts = {"points": self.points, "grid": self.grid, "disturbed": self.disturbed}
        return {**_errors([self]), "profile_seconds": self.profile_seconds, **{k: float(v) for k, v in counts.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        run = Run(**{**data["run"], "methods": tuple(data["run"]["methods"])})
        outcomes = tuple(Outcome(**outcome) for outcome in data["outcomes"])
        counts = (data["points"], data["grid"], data["disturbed"])
        return Record(run, data["device"], data["runtime"], data["profile_seconds"], *counts, outcomes)


@dataclass(frozen=True, slots=True)
class Store:
    """One file for every finished run, so that a kill costs one run and two processes may share the folder."""

    folder: Path

    def save(self, record: Record) -> None:
        write_atomically(self._path(record.run), (json.dumps(asdict(record), allow_nan=False) + "\n").encode())

    def get(self, run: Run) -> Record | None:
        """The record of a run that is finished.

        Raises:
            SluiceError: the run's file holds no record.
        """
        path = self._path(run)
        try:
            record = Record.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SluiceError(f"{str(path)!r} is no record of a run ({error!r}); delete it, to run it again") from None
        if record.run != run:
            raise SluiceError(f"{str(path)!r} is the record of another run, {record.run.name}; move it away")
        return record

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"


def product(
    networks: Sequence[str],
    threads: Sequence[int] = THREADS,
    methods: Sequence[str] = METHODS,
    plans: int = PLANS,
    seed: int = SEED,
    batch: int | None = None,
) -> tuple[Run, ...]:
    """All networks on all thread counts, each once; ``batch`` replaces the networks' own."""
    return tuple(
        Run(name, batch or BATCHES[name], count, tuple(m for m in METHODS if m in methods), plans, seed)
        for name in dict.fromkeys(networks)
        for count in dict.fromkeys(threads)
    )


STANDARD = product(tuple(BATCHES))


def summary(records: Sequence[Record], runs: Sequence[Run]) -> dict[str, Any]:
    """Totals over the records of ``runs``, the figures of each by network and thread count, and the runs left."""
    used = _of(records, runs)
    per_network: dict[str, dict[str, dict[str, float]]] = {}
    for record in used:
        per_network.setdefault(record.run.network, {})[str(record.run.threads)] = record.figures
    correlations = [record.figures.get("spearman") for record in used]
    known = [value for value in correlations if value is not None]
    return {
        "median_abs_err": None,
        "p95_abs_err": None,
        "n": 0.0,
        **_errors(used),
        "spearman": min(known) if known and len(known) == len(used) else None,
        "runs_left": len(runs) - len(used),
        "machines": sorted({f"{record.device}, runtime {record.runtime}" for record in used}),
        "per_network": per_network,
    }


def table(records: Sequence[Record], runs: Sequence[Run]) -> str:
    """One line per network and thread count."""
    head = f"{'network':<14}{'batch':>6}{'threads':>8}{'plans':>6}{'median':>9}{'p95':>8}{'worst':>8}{'spearman':>10}"
    return "\n".join([head, *(_line(record) for record in _of(records, runs))])


def detail(record: Record) -> str:
    """Promised / measured of every plan in the order of drawing, and the edits of the worst."""
    ratios = " ".join(f"{outcome.ratio:.3f}" for outcome in record.outcomes)
    worst = sorted(record.outcomes, key=lambda outcome: -abs(outcome.ratio - 1.0))[:WORST]
    return "\n".join([f"  promised/measured {ratios}", *(f"  worst: {_edits(outcome)}" for outcome in worst)])


def write_result(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """The records of ``runs`` with their summary, a line each.

    Raises:
        SluiceError: there is none.
    """
    used = _of(records, runs)
    if not used:
        raise SluiceError(f"no run of the result is finished, so {str(path)!r} stays as it is; run the benchmark first")
    rows = ",\n".join(json.dumps(asdict(record), allow_nan=False) for record in used)
    head = json.dumps(summary(used, runs), allow_nan=False)
    write_atomically(path, f'{{"summary": {head},\n"records": [\n{rows}\n]}}\n'.encode())


def read_result(path: Path) -> list[Record]:
    """The records of a result.

    Raises:
        SluiceError: there is no such file, it is no result, or it has totals alone, as older ones do.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "per_network" in content:
            raise SluiceError(
                f"the result {str(path)!r} is an older one, of totals without plans; run the benchmark, then --publish"
            )
        return [Record.from_dict(data) for data in content["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SluiceError(f"cannot read the result {str(path)!r} ({error!r}); run the benchmark") from None


def _of(records: Sequence[Record], runs: Sequence[Run]) -> list[Record]:
    """The records of ``runs``, in their order."""
    found = {record.run: record for record in records}
    return [found[run] for run in runs if run in found]


def _errors(records: Sequence[Record]) -> dict[str, float]:
    """`errors` of all plans together; nothing where there is none."""
    outcomes = [outcome for record in records for outcome in record.outcomes]
    if not outcomes:
        return {}
    return errors(np.array([o.promised_ms for o in outcomes]), np.array([o.measured_ms for o in outcomes]))


def _line(record: Record) -> str:
    run, found = record.run, record.figures
    worst = max(abs(outcome.ratio - 1.0) for outcome in record.outcomes)
    shares = f"{found['median_abs_err']:>9.2%}{found['p95_abs_err']:>8.2%}{worst:>8.2%}"
    correlation = f"{found['spearman']:.4f}" if "spearman" in found else "-"
    return f"{run.network:<14}{run.batch:>6}{run.threads:>8}{len(record.outcomes):>6}{shares}{correlation:>10}"


def _edits(outcome: Outcome) -> str:
    counts = {"ranks": outcome.ranks, "drops": outcome.drops, "merges": outcome.merges}
    edits = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{outcome.ratio:.3f} ({outcome.promised_ms:.3f} of {outcome.measured_ms:.3f} ms): {edits}"
