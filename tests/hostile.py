"""Hostile files and words: every one ends in success or in one sentence, in time, and touches no other file.

``python -m tests.hostile --inputs 3000`` changes sound files (plans, reports, manifests, tables, jobs, weights, ONNX
files) and words of command lines at random, by bytes and by meaning, and gives them to the verbs that read them. The
last line is JSON: inputs, tracebacks, hangs, files outside. Inputs are drawn from a seed, in child processes that run
`CHUNK` of them each, so that one which ends its process is found and costs no other.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sluice.cli import main
from sluice.profiler.job import Job, write_job
from tests import tiny

HANG_S = 30
CHUNK = 25
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**10, 2**63, -(2**70), 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "w" * 300, "../../x", [], [[]], [0, 10**10], {}, {"": None}, [[0, 1]] * 50, "\ud800", "\x00",
]  # fmt: skip
WORDS = [
    "",
    "-1",
    "nan",
    "1e400",
    "\x00x"[1:],
    "@",
    "a@b:c",
    "--",
    "=",
    ":",
    "x:y",
    "/",
    "/dev/null",
    ".",
    "..",
    "0",
    "1/0",
    "9" * 40,
]


class Hang(BaseException):
    pass


def changed_json(text: str, rng: np.random.Generator) -> bytes:
    """One to three values of a JSON text replaced, removed or doubled; or its bytes changed."""
    if rng.random() < 0.25:
        return changed_bytes(text.encode(), rng)
    data = json.loads(text)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(data))
        if not places:
            break
        holder, key = places[rng.integers(len(places))]
        what = rng.random()
        if what < 0.6:
            holder[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])  # it may be changed in its turn
        elif what < 0.8:
            del holder[key]
        elif isinstance(holder, list):
            holder.extend([holder[key]] * int(rng.integers(1, 40)))
        else:
            holder[f"{key}x"] = holder[key]
    return json.dumps(data).encode()


def _places(data: Any) -> Any:
    keys = range(len(data)) if isinstance(data, list) else list(data) if isinstance(data, dict) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


def changed_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes replaced, cut off, doubled or removed."""
    data = bytearray(content)
    what = rng.integers(4)
    at = int(rng.integers(max(1, len(data))))
    length = int(rng.integers(1, 64))
    if what == 0:
        for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
            data[place] = int(rng.integers(256))
    elif what == 1:
        del data[at:]
    elif what == 2:
        del data[at : at + length]
    else:
        data[at:at] = data[at : at + length]
    return bytes(data)


def changed_onnx(content: bytes, rng: np.random.Generator) -> bytes:
    """A field of the graph changed by meaning, or its bytes."""
    if rng.random() < 0.4:
        return changed_bytes(content, rng)
    model = onnx.load_model_from_string(content)
    graph = model.graph
    for _ in range(rng.integers(1, 3)):
        node = graph.node[rng.integers(len(graph.node))]
        init = graph.initializer[rng.integers(len(graph.initializer))]
        what = rng.integers(10)
        if what == 0 and node.input:
            node.input[rng.integers(len(node.input))] = ["", "nowhere", node.output[0]][rng.integers(3)]
        elif what == 1:
            node.op_type = ["If", "Gemm", "Nothing", "Reshape", "Loop", "Split"][rng.integers(6)]
        elif what == 2 and node.attribute:
            del node.attribute[rng.integers(len(node.attribute))]
        elif what == 3 and init.dims:
            init.dims[rng.integers(len(init.dims))] = int(rng.choice([0, -1, 2**40, 7]))
        elif what == 4:
            init.raw_data = init.raw_data[: int(rng.integers(len(init.raw_data) + 1))]
        elif what == 5:
            init.data_type = int(rng.integers(0, 25))
        elif what == 6:
            del graph.output[:]
        elif what == 7:
            graph.input[0].type.tensor_type.elem_type = int(rng.integers(0, 25))
        elif what == 8:
            del graph.node[rng.integers(len(graph.node))]
        else:
            init.name = "x"
        if not graph.node:
            break
    return model.SerializeToString()


def changed_table(path: Path, rng: np.random.Generator) -> None:
    """Rows of other types, views, triggers, or other bytes."""
    if rng.random() < 0.4:
        path.write_bytes(changed_bytes(path.read_bytes(), rng))
        return
    value = VALUES[rng.integers(len(VALUES))]
    value = json.dumps(value) if isinstance(value, (list, dict)) else value
    column = ["key", "extents", "ms", "spread", "samples"][rng.integers(5)]
    programs: list[tuple[str, tuple[Any, ...]]] = [
        (f"UPDATE OR IGNORE points SET {column} = ? WHERE rowid IS NULL OR random() % 3 = 0", (value,)),
        (f"UPDATE OR IGNORE points SET {column} = ? WHERE random() % 5 = 0", (value,)),
        ("UPDATE OR IGNORE engines SET widths = ? WHERE random() % 2 = 0", (value,)),
        ("UPDATE OR IGNORE calibrations SET error = ?", (value,)),
        ("UPDATE OR IGNORE fingerprint SET json = ?", (value,)),
        ("UPDATE OR IGNORE pieces SET text = ?", (value,)),
        ("CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c", ()),
        ("CREATE TRIGGER g AFTER INSERT ON points BEGIN DELETE FROM points; END", ()),
        ("DROP TABLE engines", ()),
    ]
    sql, values = programs[rng.integers(1, len(programs))]
    connection = sqlite3.connect(path)
    with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError), connection:
        connection.execute(sql, values)
    connection.close()


def changed_job(content: bytes, rng: np.random.Generator) -> bytes:
    """Its settings or its network changed, in a sound zip file; or its bytes."""
    what = rng.random()
    if what < 0.3:
        return changed_bytes(content, rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename == "job.json" and what < 0.8:
                data = changed_json(data.decode(), rng)
            elif entry.filename == "model.onnx" and what >= 0.8:
                data = changed_onnx(data, rng)
            new.writestr(entry, data)
    return changed.getvalue()


@cache
def job_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        write_job(Path(name) / "job.zip", onnx.load(tiny.dense_onnx_in(Path(name))), Job())
        return (Path(name) / "job.zip").read_bytes()


def attempt(kind: str, folder: Path, rng: np.random.Generator) -> list[list[object]]:
    """Put sound files into ``folder``, change one, and return the command lines that read it."""
    dense, slim, table = tiny.dense_onnx_in(folder), tiny.compressed_in(folder), tiny.table_in(folder)
    out = folder / "out.onnx"
    if kind == "plan":
        (slim / "plan.json").write_bytes(changed_json((slim / "plan.json").read_text(), rng))
        return [["apply", dense, slim / "plan.json", "-o", out]]
    if kind in ("manifest", "weights", "slim"):
        name = {"manifest": "manifest.json", "weights": "slim.safetensors", "slim": "slim.onnx"}[kind]
        content = (slim / name).read_bytes()
        changed = changed_json(content.decode(), rng) if kind == "manifest" else (
            changed_onnx(content, rng) if kind == "slim" else changed_bytes(content, rng)
        )  # fmt: skip
        (slim / name).write_bytes(changed)
        if kind != "manifest":
            (slim / "manifest.json").unlink()
        return [["check", dense, slim]]
    if kind == "onnx":
        dense.write_bytes(changed_onnx(dense.read_bytes(), rng))
        return [["inspect", dense], ["apply", dense, slim / "plan.json", "-o", out]]
    if kind == "table":
        changed_table(table, rng)
        (folder / "b.db").write_bytes(tiny.table_bytes())
        return [["table", "show", table], ["table", "csv", table], ["table", "diff", table, folder / "b.db"],
                ["table", "merge", folder / "b.db", table, "-o", folder / "all.db"]]  # fmt: skip
    if kind == "job":
        job = folder / "job.zip"
        job.write_bytes(changed_job(job_bytes(), rng))
        return [["job", job, "-o", folder / "j.db"]]
    words = ["inspect", "apply", "check", "bench", "table", "show", "csv", "merge", "-o", "--json", "--exclude",
             "--batch", "--methods", str(dense), str(slim), str(slim / "plan.json"), str(table), *WORDS]  # fmt: skip
    return [[words[rng.integers(len(words))] for _ in range(rng.integers(1, 7))]]


KINDS = ("plan", "manifest", "weights", "slim", "onnx", "table", "job", "words")
ALLOWED = {"out.onnx", "all.db", "j.db", "FILE.csv"}


def verdict(words: list[object]) -> str:
    """How one command line ends: fine, hang, or what is wrong."""
    from sluice.profiler.job import read_job

    said, told = io.StringIO(), io.StringIO()

    def late(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            if words[0] == "job":
                from sluice.core.errors import SluiceError

                with contextlib.suppress(SluiceError):
                    read_job(str(words[1]))
                return "fine"
            status = main([str(word) for word in words])
    except SystemExit as error:
        return "fine" if error.code in (0, 2) else f"exit {error.code}"
    except Hang:
        return "hang"
    except BaseException:
        return "traceback " + traceback.format_exc().strip()
    finally:
        signal.alarm(0)
    error = told.getvalue().strip()
    if status == 1 and words[0] in ("check",) and not error:
        return "fine"  # a check that failed
    return (
        "fine" if status == 0 or ("\n" not in error and error.startswith("sluice: error: ")) else f"many lines {error}"
    )


def chunk(kind: str, seeds: list[int], report: Callable[[dict[str, Any]], None]) -> None:
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name, tiny.simulated_device():
            rng, folder = np.random.default_rng([seed, KINDS.index(kind)]), Path(name) / "in"
            folder.mkdir()
            os.chdir(folder)
            for words in attempt(kind, folder, rng):
                report({"at": [kind, seed, [str(w) for w in words]]})
                before = tiny.files_of(Path(name))
                ended = verdict(words)
                after = tiny.files_of(Path(name))
                outside = [n for n in after if after[n] != before.get(n) and Path(n).name not in ALLOWED]
                outside = [
                    n for n in outside if not (n.endswith((".db", ".onnx")) and kind == "words" and n not in before)
                ]
                outside += [n for n in before if n not in after]
                report({"ended": ended, "outside": outside})
            os.chdir("/")


def in_child(kind: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The outcomes of a chunk in a process of its own; one that ends it is a traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as file:
            chunk(kind, seeds, lambda told: print(json.dumps(told), file=file, flush=True))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = [json.loads(line) for line in file]
    _, status = os.waitpid(child, 0)
    found = [{**at, **ended} for at, ended in zip(lines[::2], lines[1::2], strict=False)]
    if status:
        at = lines[-1].get("at", [kind, seeds, "?"]) if lines else [kind, seeds, "?"]
        found.append({"at": at, "ended": f"traceback process ended with {status}", "outside": []})
    return found


def run(inputs: int, kinds: tuple[str, ...] = KINDS, seed: int = 0, show: int = 20) -> dict[str, int]:
    """The figures; the first ``show`` faults are printed."""
    tiny.table_bytes(), tiny._compressed(), tiny._dense_bytes(), job_bytes()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    each = -(-inputs // len(kinds))
    for kind in kinds:
        started = time.perf_counter()
        for first in range(0, each, CHUNK):
            for one in in_child(kind, [seed + n for n in range(first, min(each, first + CHUNK))]):
                word = "fine" if one["ended"] == "fine" else one["ended"].split()[0]
                counts[kind][word] += 1
                counts[kind]["outside"] += len(one["outside"])
                if (word != "fine" or one["outside"]) and show > 0:
                    show -= 1
                    print(one["at"], one["outside"], one["ended"][-1500:], sep="\n", flush=True)
        print(kind, each, dict(counts[kind]), f"{time.perf_counter() - started:.0f} s", flush=True)
    total = sum(counts.values(), Counter())
    wrong = sum(count for word, count in total.items() if word not in ("fine", "hang", "outside"))
    return {"inputs": each * len(kinds), "tracebacks": wrong, "hangs": total["hang"], "outside": total["outside"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = run(args.inputs, tuple(args.kinds), args.seed)
    print(json.dumps(found))
    sys.exit(any(found[key] for key in ("tracebacks", "hangs", "outside")))
