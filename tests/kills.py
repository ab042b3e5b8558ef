"""Kills: a run that is killed at any moment loses no finished point, mixes no results, and leaves no draft behind.

``python -m tests.kills --kills 60`` starts each command in a child process, kills it (SIGKILL) at a moment drawn from
the time that it takes, looks at what is left, and runs the same command again. The last line is JSON: kills, points
that were in the table before or after the kill and are not after the next run, folders whose readers got files of two
runs, drafts left after the next run, and results that differ from those of an unbroken run where they must not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch

from sluice.artifacts.folder import FILES, held, save_together
from sluice.cli import main
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.profiler.agent import run_job
from sluice.profiler.job import Job, write_job
from tests import tiny

DEVICE = f"--batch {tiny.BATCH} --quiet"
Points = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Command:
    """``setup`` makes the files in a folder, ``run`` does the work, ``same`` says what must equal an unbroken run."""

    name: str
    setup: Callable[[Path], None]
    run: Callable[[Path], object]
    same: Callable[[Path], object]


def words(*parts: object) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        return main([str(folder / word[1:]) if word.startswith("@") else word for word in tiny.words(*parts)])

    return run


def commands() -> Sequence[Command]:
    return (
        Command("profile", dense, words("profile @dense.onnx --table @t.db", DEVICE, "--methods filter"), keys_of),
        Command(
            "compress", older,
            words("compress tests.tiny:model --shape 3,9,9 --data tests.tiny:data --budget 60% --epochs 3 "
                  "--rehearsal 0 --methods filter --seed 3 --table @t.db --out @slim", DEVICE), weights,
        ),
        Command("export", older, words("export tests.tiny:model --shape 3,9,9 -o @dense.onnx"), file("dense.onnx")),
        Command("merge", two_tables, words("table merge @a.db @t.db -o @all.db"), points_in("all.db")),
        Command("job", job, run_a_job, points_in("j.db")),
        Command("save", older, save, whole),
    )  # fmt: skip


def dense(folder: Path) -> None:
    tiny.dense_onnx_in(folder)


def older(folder: Path) -> None:
    tiny.dense_onnx_in(folder)
    tiny.table_in(folder)
    tiny.compressed_in(folder)


def two_tables(folder: Path) -> None:
    tiny.table_in(folder)
    (folder / "a.db").write_bytes(tiny.dense_table_bytes())


def job(folder: Path) -> None:
    model = onnx.load(tiny.dense_onnx_in(folder))
    write_job(folder / "j.zip", model, Job(Deployment(batch=tiny.BATCH), ("filter",)), tiny.dense_table_bytes())


def run_a_job(folder: Path) -> object:
    return run_job(folder / "j.zip", folder / "j.db", quiet=True)


def save(folder: Path) -> object:
    """A result of other content over the one that is there."""

    def write(draft: Path) -> None:
        for name, content in tiny._compressed().items():
            if name != "manifest.json":
                (draft / name).write_bytes(content + (b"\n" if name.endswith("json") else b""))

    save_together(folder / "slim", write)
    return 0


def keys_of(folder: Path) -> object:
    return sorted(points_of(folder / "t.db"))


def points_in(name: str) -> Callable[[Path], object]:
    return lambda folder: sorted(points_of(folder / name).items())


def file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).read_bytes()


def whole(folder: Path) -> object:
    return sorted(path.name for path in (folder / "slim").iterdir())


def weights(folder: Path) -> object:
    """Plan and weights, to the bit: a run that goes on comes to those of an unbroken one."""
    return [(folder / "slim" / name).read_bytes() for name in ("plan.json", "slim.safetensors")]


def points_of(path: Path) -> Points:
    if not path.exists() or not path.stat().st_size:
        return {}
    connection = sqlite3.connect(path)
    try:
        return {(key, at): ms for key, at, ms in connection.execute("SELECT key, extents, ms FROM points")}
    finally:
        connection.close()


def mixed(folder: Path) -> bool:
    """Whether readers get files of two runs, or cannot read the folder at all."""
    if not (folder / "slim").is_dir():
        return False
    copy = folder.parent / "copy"
    shutil.copytree(folder / "slim", copy)
    try:
        there = [held(copy / name) for name in FILES if (copy / name).exists()]
        manifest = json.loads((copy / "manifest.json").read_text())["files"]
        return {p.name for p in there} - {"manifest.json"} != set(manifest)
    except SluiceError:
        return True
    finally:
        shutil.rmtree(copy)


def drafts(folder: Path) -> list[str]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    left = (".draft", ".sluice-complete", ".unfinished", ".trained")
    return [n for n in names if any(word in n for word in left) or n.endswith((".part", "-journal", "-wal"))]


def in_child(work: Callable[[], object], after_s: float | None) -> float:
    """Seconds until the child ended, or was killed."""
    started = time.perf_counter()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            with contextlib.suppress(BaseException), tiny.simulated_device():
                work()
            os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.perf_counter() - started


def run(kills: int, seed: int = 0, asked: Sequence[Command] | None = None) -> dict[str, int]:
    """The figures; ``asked`` are other commands than `commands`."""
    asked = commands() if asked is None else asked
    tiny.table_bytes(), tiny._compressed(), tiny.dense_table_bytes()
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    found = {"kills": 0, "points_lost": 0, "mixed": 0, "drafts": 0, "differ": 0}
    each = -(-kills // len(asked))
    for command in asked:
        with tempfile.TemporaryDirectory() as name:
            unbroken = Path(name) / "in"
            unbroken.mkdir()
            command.setup(unbroken)
            takes = in_child(partial(command.run, unbroken), None)
            expected = command.same(unbroken)
        own = dict.fromkeys(found, 0)
        for _ in range(each):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "in"
                folder.mkdir()
                command.setup(folder)
                tables = [folder / table for table in ("t.db", "a.db", "j.db", "all.db")]
                before = {path: points_of(path) for path in tables}
                in_child(partial(command.run, folder), float(rng.uniform(0, 1.05 * takes)))
                killed = {path: points_of(path) for path in tables}
                own["mixed"] += mixed(folder)
                in_child(partial(command.run, folder), None)
                after = {path: points_of(path) for path in tables}
                for path in tables:
                    own["points_lost"] += len((before[path].keys() | killed[path].keys()) - after[path].keys())
                own["drafts"] += len(drafts(folder))
                own["mixed"] += mixed(folder)
                own["differ"] += command.same(folder) != expected
                own["kills"] += 1
        print(command.name, f"{takes:.1f} s", own, flush=True)
        found = {key: found[key] + own[key] for key in found}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.kills, args.seed)
    print(json.dumps(result))
    sys.exit(any(result[key] for key in ("points_lost", "mixed", "drafts", "differ")))
