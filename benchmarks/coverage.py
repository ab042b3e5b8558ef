"""How many of the field's architectures can be cut, and how much of them: ``python -m benchmarks.coverage``.

1. Every architecture of `benchmarks.coverage_networks` runs in a process by itself (`benchmarks.coverage_one`), for at
   most `SECONDS` of CPU, and leaves one row in the JSON file. A run goes on where the last one ended; ``--again``
   repeats rows that fell short. The process is a fork of one that has imported everything, so the seconds of a row are
   those of the network.
2. ``--show`` prints the table of the committed file and ends in one line of JSON, ``--write`` makes
   ``docs/coverage.md`` of it.

The packages are optional, in versions that fit each other:
``pip install --no-deps timm torchvision transformers diffusers ultralytics`` and what they import.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.coverage_networks import KINDS, NETWORKS, Network
from benchmarks.coverage_one import measure
from benchmarks.coverage_results import document, lines, summary
from benchmarks.coverage_row import Row
from sluice.commands.zoos import ZOOS, package_of
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "coverage.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
SECONDS = 600


def load(path: Path) -> dict[str, Row]:
    """The rows of a file, by spec; those of architectures that are listed no more are left out."""
    if not path.is_file():
        return {}
    found = {row["spec"]: Row(**row) for row in json.loads(path.read_text())["rows"]}
    return {network.spec: found[network.spec] for network in NETWORKS if network.spec in found}


def save(path: Path, rows: Iterable[Row]) -> None:
    text = ",\n".join(json.dumps(asdict(row)) for row in rows)
    write_atomically(path, f'{{"rows": [\n{text}\n]}}\n'.encode())


def run_one(network: Network) -> Row:
    """The row of one architecture, also if its process dies."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with os.fdopen(writer, "w") as out:
            json.dump(asdict(measure(network)), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as out:
        said = out.read()
    _, status = os.waitpid(child, 0)
    if not said or status:
        reason = f"the process ended with {os.waitstatus_to_exitcode(status)}, after at most {SECONDS} s"
        return Row(network.spec, network.kind, failed="process", reason=reason)
    return Row(**json.loads(said))


def state_of_code() -> str:
    """The last commit of the files that read and cut, as far as they are loaded; with ``+`` if one was changed since.

    Commits of other files leave the rows as they are. Empty where there is no checkout.
    """
    loaded = [m for name, m in sys.modules.items() if name == measure.__module__ or name.startswith("sluice.passes.")]
    files = [str(module.__file__) for module in loaded if getattr(module, "__file__", None)]
    with suppress(OSError, subprocess.CalledProcessError):
        last, changed = (
            subprocess.run(given, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
            for given in (
                ["git", "log", "-1", "--format=%h", "--abbrev=7", "--", *files],
                ["git", "status", "--porcelain", "--", *files],
            )
        )
        return last.stdout.strip() + ("+" if changed.stdout else "")
    return ""


def warm_up() -> None:
    """Import everything once; the processes are forks of this one."""
    torch.set_num_threads(1)
    for spec in ("benchmarks.coverage_recurrent:m5", "benchmarks.coverage_recurrent:transformer"):
        measure(next(network for network in NETWORKS if network.spec == spec))
    for zoo in ZOOS:
        with suppress(SluiceError):
            package_of(zoo, "")


def sweep(wanted: list[Network], path: Path, again: bool) -> dict[str, Row]:
    rows = load(path)
    warm_up()
    state = state_of_code()
    for network in wanted:
        known = rows.get(network.spec)
        if known is not None and not (again and known.failed):
            continue
        row = run_one(network)
        row.state = state
        rows = {**load(path), network.spec: row}  # others may have added rows
        save(path, (rows[n.spec] for n in NETWORKS if n.spec in rows))
        print(f"{row.kind} {row.spec}: {row.failed or 'cut'} {row.share:.3f} {row.reason}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage")
    parser.add_argument("--only", default="", help="words that a spec or kind must have one of, comma-separated")
    parser.add_argument("--again", action="store_true", help="repeat rows that fell short")
    parser.add_argument("--force", action="store_true", help="repeat all rows of --only")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="make docs/coverage.md of the rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    words = args.only.split(",")
    wanted = [n for n in NETWORKS if any(word in n.spec or word in n.kind for word in words)]
    if args.force:
        gone = {n.spec for n in wanted}
        save(args.results, (row for spec, row in load(args.results).items() if spec not in gone))
    rows = load(args.results) if args.show else sweep(wanted, args.results, args.again)
    if args.write:
        write_atomically(DOCUMENT, document(list(rows.values()), KINDS, len(NETWORKS)).encode())
    print("\n".join(lines(list(rows.values()), KINDS)))
    print(json.dumps(summary(list(rows.values()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
