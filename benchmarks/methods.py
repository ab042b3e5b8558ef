"""What ours makes of a network at a measured latency, beside what others make of it at their own best setting.

    python -m benchmarks.methods [--job ds-cnn] [--budget 50%] [--arm ours] [--seed 0] [--dry-run]
    python -m benchmarks.methods --show

Jobs are in `benchmarks.methods_jobs`. Budgets are shares of the measured latency of plain export. Arms: ours, the
default of `sluice.compress`; ``torch-pruning`` and ``thin``, a uniformly thinner network from scratch, each at the best
of the rates and losses that our trial has, chosen by the accuracy that is told; ours at its old defaults, without
portfolio, with gates in it, with stops on the way down, and with gates before everything else. Everything that trains
counts, and the others get as many epochs in all for *every* setting that they try (`benchmarks.methods_runs`). Three
seeds for ours and the best other, one for the rest. All runs together take many hours on two cores: a finished run is
kept in ``build/methods/runs`` and never done again, so the command may be stopped and given again, for a part or for
all.
``torch-pruning`` is no dependency of ours: ``pip install --no-deps torch-pruning==1.6.1``.

When nothing is left, or with ``--publish``, the result goes to ``benchmarks/results`` and a plot of it to ``docs``.
``--show`` prints that result; the last line is JSON with the number of ``points`` (cells compared),
``ours_minus_best_other_min_50``, ``_25`` and ``_15`` in points of accuracy, and ``least_share_ratio_worst`` and
``_median``: the least share of dense latency at no more than a point lost, ours by the best other's, and the shares
themselves by job (`benchmarks.methods_results` has the rules).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.methods_results import ARMS, CELLS, SEEDS, Cells, Record, Run, Store, figures, outstanding, summary
from benchmarks.methods_table import table
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically

__all__ = ["main", "read_result", "work", "write_result"]

RESULT = Path("benchmarks/results/methods-ort-cpu.json")
PLOT = Path("docs/methods.svg")


def work(
    store: Store,
    cells: Cells,
    perform: Callable[[Run], Record],
    wanted: Callable[[Run], bool] = lambda run: True,
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Do the wanted runs that are left, and save each; returns those that broke, which are left for another time."""
    broken: list[Run] = []
    while True:
        left = [run for run in outstanding(store.load(), cells) if wanted(run) and run not in broken]
        if not left:
            return broken
        run = left[0]
        say(f"{run.name} ({len(left)} left)")
        started = time.perf_counter()
        try:
            record = perform(run)
        except Exception:
            # The other runs take hours, and go on although this one failed.
            say(f"  broke after {time.perf_counter() - started:.0f} s\n{traceback.format_exc()}")
            broken.append(run)
            continue
        store.save(record)
        say(f"  {_outcome(record)}, {record.seconds:.0f} s")


def _outcome(record: Record) -> str:
    if record.accuracy is None or record.share is None:
        return f"cannot reach: {record.reason}"
    late = "" if record.met else ", OVER BUDGET"
    return f"{record.accuracy:.2f}% (dense {record.dense_accuracy:.2f}%) at {record.share:.1%}{late}, {record.detail}"


def write_result(records: Sequence[Record], cells: Cells, result: Path, plot: Path) -> None:
    """Records of the standard cells with their summary as JSON, and the plot."""
    from benchmarks.methods_plot import dot_plot

    used = [r for r in records if cells.get((r.run.job, r.run.budget)) == r.run.epochs]
    content = {"summary": summary(used, cells), "records": [record.to_dict() for record in used]}
    write_atomically(result, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    panels = {f"{job} at {budget}": found for (job, budget), found in figures(used, cells).items()}
    title = "Accuracy against dense at a share of the measured latency, points"
    write_atomically(plot, dot_plot(title, panels, ARMS).encode())


def read_result(path: Path) -> list[Record]:
    """The records of a result.

    Raises:
        SluiceError: there is no such file, or it is no result.
    """
    try:
        return [Record.from_dict(data) for data in json.loads(path.read_text())["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SluiceError(f"cannot read the result {str(path)!r} ({error}); run the benchmark") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--job", action="append", help="only this job (may be repeated, as the next three)")
    parser.add_argument("--budget", action="append", help="only this budget, such as 50%%")
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--epochs", type=int, help="in all, to try something out; not part of the result")
    parser.add_argument("--folder", type=Path, default=Path("build/methods"), help="tables, weights, finished runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--dry-run", action="store_true", help="only list what is left")
    parser.add_argument("--publish", action="store_true", help="write result and plot although runs are left")
    parser.add_argument("--show", action="store_true", help="only print the result")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if a run broke or for a mistake of the user's."""
    options = _parser().parse_args(argv)
    cells = {cell: options.epochs or epochs for cell, epochs in CELLS.items()}
    store = Store(options.folder / "runs")

    parts: dict[str, list[Any] | None] = {key: getattr(options, key) for key in ("job", "budget", "arm", "seed")}

    def wanted(run: Run) -> bool:
        return all(chosen is None or getattr(run, key) in chosen for key, chosen in parts.items())

    try:
        _check(options, cells)
        if options.show:
            records = read_result(options.result)
            print(table(records, CELLS))
            print(json.dumps(summary(records, CELLS)))
            return 0
        if options.dry_run:
            left = [run for run in outstanding(store.load(), cells) if wanted(run)]
            print("\n".join([*(run.name for run in left), f"{len(left)} runs left that are known by now"]))
            return 0
        broken = work(store, cells, _performer(options.folder, store), wanted)
        records = store.load()
        if options.publish or not outstanding(records, CELLS):
            write_result(records, CELLS, options.result, options.plot)
            print(f"written: {options.result}, {options.plot}")
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if broken else 0


def _check(options: argparse.Namespace, cells: Cells) -> None:
    jobs, budgets = {job for job, _ in cells}, {budget for _, budget in cells}
    wrong = sorted({*(options.job or ())} - jobs) + sorted({*(options.budget or ())} - budgets)
    if wrong:
        raise SluiceError(
            f"there is no {wrong[0]!r}; choose of {', '.join(f'{job} {budget}' for job, budget in cells)}"
        )


def _performer(folder: Path, store: Store) -> Callable[[Run], Record]:
    """Makes a job when its first run comes, and keeps one at a time."""
    import torch

    from benchmarks.methods_jobs import JOBS, Job
    from benchmarks.methods_latency import Shares
    from benchmarks.methods_runs import perform

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, tuple[Job, Shares]] = {}

    def one(run: Run) -> Record:
        if run.job not in made:
            made.clear()
            job = JOBS[run.job](folder)
            made[run.job] = job, Shares(job.model, job.example, job.batch, folder / f"{job.name}-shares.json")
        job, shares = made[run.job]
        first = replace(run, seed=SEEDS[0])
        known = {} if run == first else {r.run: r for r in store.load() if r.accuracy is not None}
        return perform(job, run, folder, shares, known.get(first))

    return one


if __name__ == "__main__":
    sys.exit(main())
