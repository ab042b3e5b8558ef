"""Run a job (`sluice.profiler.job`) on this device, which needs only Python, numpy, onnx and the runtime.

    python job.zip -o table.db                               all code from the job
    python -m sluice.profiler.agent job.zip -o table.db      where sluice is installed, with its dependencies or without

1. The table is made, from the table in the job if there is one, or continued. The same command after a kill goes on
   where it was; the call in flight is made again.
2. ``--shard 2/8`` measures one share of the job (`sluice.profiler.sweep.shards`).
3. The summary goes to standard output, progress and errors to standard error. Exit status 0: done; 1: a mistake of the
   user's, told in one sentence; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.core.stdout import Unwritable, give_up, keep_stdout
from sluice.profiler.job import SITE, read_job
from sluice.profiler.profile import fingerprint_here, profile_onnx, profile_shard
from sluice.profiler.summary import profile_summary, shard_summary
from sluice.profiler.sweep.shards import Shard, shard_argument
from sluice.profiler.table.fingerprint import Fingerprint, difference
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.table_file import exists

__all__ = ["main", "run_job"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; the exit status."""
    args = _parser().parse_args(argv)
    if argv is None:
        keep_stdout()
    try:
        data, text = run_job(args.job, args.out, args.shard, quiet=args.quiet)
    except SluiceError as error:
        print(f"sluice: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sluice: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    try:
        print(json.dumps(data, indent=2) if args.json else "\n".join(text), flush=True)
    except (BrokenPipeError, Unwritable) as error:
        give_up()
        if isinstance(error, Unwritable):
            print(f"sluice: error: {error}", file=sys.stderr)
        return 141 if isinstance(error, BrokenPipeError) else 1
    return 0


def run_job(
    path: str | Path, table: str | Path, shard: Shard | None = None, *, quiet: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Measure the points of the job, or of one shard, that ``table`` lacks; the summary as data and as lines.

    Raises:
        SluiceError: the job or the table is damaged, foreign or newer, or the runtime is not here.
    """
    job, model, known = read_job(path)
    if importlib.util.find_spec("onnx_graphsurgeon") is None:
        sys.path.append(f"{path}/{SITE}")
    fingerprint = fingerprint_here(job.deployment)
    if known is not None and not exists(str(table)):
        _check_known(known, str(path), fingerprint)
        write_atomically(table, known)
    settings: dict[str, Any] = {"deployment": job.deployment, "methods": job.methods, "exclude": job.exclude}
    settings["progress"] = not quiet
    if shard is not None:
        return shard_summary(profile_shard(model, table, shard, **settings))
    return profile_summary(profile_onnx(model, table, complete=True, **settings), job.methods)


def _check_known(table: bytes, job: str, here: Fingerprint) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "table.db"
        copy.write_bytes(table)
        with LatencyTable.open(copy) as opened:
            differences = difference(opened.fingerprint, here)
    if differences:
        raise SluiceError(
            f"the table in the job {job!r} was measured under other conditions: {'; '.join(differences)}; run the job "
            f"on that device, or pack it without --table"
        )


def _parser() -> argparse.ArgumentParser:
    started = Path(sys.argv[0])
    # Started from inside a job, `argparse` would call itself __main__.py.
    prog = f"python {started}" if started.suffix == ".zip" else "python -m sluice.profiler.agent"
    parser = argparse.ArgumentParser(prog=prog, description="Profile the network of a job on this device.")
    parser.add_argument("job", metavar="JOB.zip", help="what `sluice profile --pack` wrote")
    parser.add_argument("-o", "--out", required=True, metavar="TABLE.db", help="latency table, made or continued")
    parser.add_argument(
        "--shard",
        type=shard_argument,
        metavar="K/N",
        help="measure the share of one of N devices or hosts of this kind",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(main())
