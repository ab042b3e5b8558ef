"""Promised against measured milliseconds, on random plans that no fit has seen.

    python -m benchmarks.fidelity [--networks resnet20 crepe_tiny] [--threads 1 2] [--plans 40] [--batch 8]
                                  [--methods filter rank block merge] [--tables build/fidelity]
    python -m benchmarks.fidelity --dry-run | --publish | --show
    python -m benchmarks.fidelity --chosen [--networks ...] [--target openvino]     plans that users get, see `chosen`

ResNet-20, ResNet-1D, SE-ResNet, DenseNet, MobileNetV2 and VGG16-BN for small inputs, CREPE tiny, all with batch 8, and
ResNet-50 at 224x224 with batch 1, each on one and on two threads (``--batch`` is for all of them). Every one is
profiled (`benchmarks.fidelity_runs`). Then 40 fresh random plans are drawn from all widths, ranks, dropped blocks and
merged runs on offer, and their engines built and measured.

All runs together take hours on two cores: a finished run is kept in ``build/fidelity/runs`` and never done again, and
measured points stay in the tables, so the command may be stopped and given again, for a part or for all. With one
thread the clock is that thread's CPU time, with more it is wall time, so nothing else should run then.

Last line: JSON with fractions for every network and thread count, and in all; totals pool all plans, ``spearman`` is
the worst run's. When no run with the standard settings is left, their result goes to ``benchmarks/results``;
``--publish`` only writes the result of the finished runs, ``--show`` only prints the written one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.fidelity_results import (
    BATCHES,
    PLANS,
    SEED,
    STANDARD,
    THREADS,
    Record,
    Run,
    Store,
    detail,
    product,
    read_result,
    summary,
    table,
    write_result,
)
from sluice.core.errors import SluiceError
from sluice.solver.options import METHODS

__all__ = ["main", "work"]

RESULT = Path("benchmarks/results/fidelity-ort-cpu.json")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def work(
    store: Store, runs: Sequence[Run], perform: Callable[[Run], Record], say: Callable[[str], None] = _progress
) -> list[Run]:
    """Do the runs that are left, and save each; returns those that broke, which are left for another time."""
    broken: list[Run] = []
    for number, run in enumerate(runs, 1):
        record = store.get(run)
        say(f"{run.name} ({number} of {len(runs)}{'' if record is None else ', kept'})")
        if record is None:
            started = time.perf_counter()
            try:
                record = perform(run)
            except Exception as error:
                # The other runs take hours, and go on although this one failed.
                reason = f"error: {error}" if isinstance(error, SluiceError) else traceback.format_exc()
                say(f"  broke after {time.perf_counter() - started:.0f} s\n{reason}")
                broken.append(run)
                continue
            store.save(record)
        say(f"  {json.dumps(record.figures)}\n{detail(record)}")
    return broken


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(BATCHES), choices=BATCHES, metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=_positive, default=list(THREADS), metavar="N")
    parser.add_argument("--plans", type=_positive, default=PLANS)
    parser.add_argument("--batch", type=_positive, help="of all networks, in place of their own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tables", type=Path, default=Path("build/fidelity"), help="tables and finished runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--chosen", action="store_true", help="plans chosen for budgets, in place of random ones")
    parser.add_argument("--target", default="ort-cpu", help="with --chosen")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only list what is left")
    only.add_argument("--publish", action="store_true", help="only write the result, although runs may be left")
    only.add_argument("--show", action="store_true", help="only print the result")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if a run broke or for a mistake of the user's."""
    options = _parser().parse_args(argv)
    if options.chosen:
        from benchmarks.chosen import choose_all, published, show

        show(published() if options.show else choose_all(options.networks, options.target, options.threads[0]))
        return 0
    asked = product(
        options.networks, options.threads, options.methods, options.plans, options.seed, batch=options.batch
    )
    store = Store(options.tables / "runs")
    broken: list[Run] = []
    try:
        if options.show:
            shown, runs = read_result(options.result), STANDARD
        elif options.dry_run:
            left = [run.name for run in asked if store.get(run) is None]
            print("\n".join([*left, f"{len(left)} of {len(asked)} runs left"]))
            return 0
        elif options.publish:
            shown, runs = _finished(store, STANDARD), STANDARD
            _publish(shown, STANDARD, options.result)
        else:
            _finished(store, [*STANDARD, *asked])  # an unreadable file is an error now, not hours later
            broken = work(store, asked, _performer(options.tables))
            shown, runs = _finished(store, asked), asked
            standing = _finished(store, STANDARD)
            if len(standing) == len(STANDARD):
                _publish(standing, STANDARD, options.result)
        print(table(shown, runs))
        print(json.dumps(summary(shown, runs)))
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for run in broken:
        _progress(f"broke: {run.name}")
    return 1 if broken else 0


def _finished(store: Store, runs: Sequence[Run]) -> list[Record]:
    return [record for run in runs if (record := store.get(run)) is not None]


def _publish(records: Sequence[Record], runs: Sequence[Run], result: Path) -> None:
    write_result(records, runs, result)
    _progress(f"written: {result}")


def _performer(tables: Path) -> Callable[[Run], Record]:
    def one(run: Run) -> Record:
        # Kept runs are printed without torch.
        from benchmarks.fidelity_runs import perform

        return perform(run, tables)

    return one


if __name__ == "__main__":
    sys.exit(main())
