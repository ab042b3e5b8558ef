"""Memory of making an ONNX file faster without torch: ``python -m benchmarks.onnx_memory``.

1. Each file of `FILES_HERE`, and each chain of `benchmarks.onnx_memory_chains`, goes through `sluice.compress_onnx` in
   a process of its own in which torch cannot be imported, and which gives free blocks back as the command does
   (`sluice.core.heap`). Counted is the peak of its resident memory, less what it holds when everything is imported, one
   file has run in ONNX Runtime and the examples are drawn.
2. The bound is

       CONSTANT + 8 x file + 2 x statistics of one layer + values of one batch + 2 x a session

   The statistics are in float64 ``A^T A`` and ``A^T Y`` of the layer that needs most of them
   (`sluice.training.least_squares`), once more while they are solved. The values of
   a batch grow with the inputs and not with the file: the sum of all inner values of one example, times the examples
   that run at once. A session is what a plain one of the file takes by itself, in another process, over the same start,
   for one example after the other. Two are timed in turns, as they are deployed, and whoever runs the file has one.
3. ``CONSTANT`` is what comes with every file: code that is loaded on the way, and what is known of graph and points.
4. A finished row is kept. ``--show`` prints the committed rows. The last line is JSON: ``rows``, how many of them are
   ``within`` the bound, and how many take less than 4 times the file and the statistics alone, ``without_more``. A row
   beyond the bound is an error: the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.onnx_memory_chains import CHAINS, made, size_of
from benchmarks.wild import CACHE, fetch, save
from benchmarks.wild_files import FILES

__all__ = ["main"]

RESULT = Path(__file__).parent / "results" / "onnx-memory.json"
# Shapes of one example of the single input.
FILES_HERE = {
    "openwakeword/hey_mycroft_v0.1.onnx": (16, 96),
    "openwakeword/embedding_model.onnx": (76, 32, 1),
    "brainmaze-eeg-models/modelA_paper.onnx": (100, 64),
    "nudenet/320n.onnx": (3, 320, 320),
    **{name: chain.shape for name, chain in CHAINS.items()},
}
EXAMPLES = 48
MB = 1e6
CONSTANT = 24.0  # megabytes


@dataclass(frozen=True, slots=True)
class Row:
    """Megabytes; ``over`` is the peak less the start."""

    file: str
    size: float
    start: float
    over: float
    statistics: float
    values: float
    floor: float = 0.0

    @property
    def aim(self) -> float:
        """Without what does not follow from the file."""
        return 4 * self.size + self.statistics

    @property
    def bound(self) -> float:
        """Rule 2."""
        return CONSTANT + 8 * self.size + 2 * self.statistics + self.values + 2 * self.floor


def _peak_mb() -> float:
    """Of this process alone: what ``getrusage`` tells is at least what the parent took when it started this one."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) * 1024 / MB


def child(name: str, path: Path, *, plainly: bool) -> None:
    """One file, in a process without torch; the row as JSON, or the megabytes of the floor."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnx
    import onnx_graphsurgeon  # noqa: F401
    import onnxscript.optimizer  # noqa: F401
    import rich.table  # noqa: F401
    import scipy.optimize
    import scipy.sparse  # noqa: F401
    import tqdm  # noqa: F401

    import sluice
    from sluice.core.heap import give_back_blocks
    from sluice.passes.files.read import read_onnx_file
    from sluice.passes.files.rows import rows_of
    from sluice.passes.graph.onnx_graph import OnnxGraph
    from sluice.passes.graph.static_shapes import static_sizes
    from sluice.profiler.profile import profile_onnx  # noqa: F401
    from sluice.runtime.targets import make_runner
    from sluice.training.refit_onnx import COLUMNS

    give_back_blocks()
    shown = np.random.default_rng(0).random((EXAMPLES, *FILES_HERE[name]), np.float32)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "xy"]
    tiny = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:1], ends[1:]),
        ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    make_runner("ort-cpu").build(tiny).run({"x": np.zeros(3, np.float32)})
    start = _peak_mb()
    if plainly:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for example in shown:
            session.run(None, {session.get_inputs()[0].name: example[None]})
        print(json.dumps(_peak_mb() - start))
        return
    given = [info.name for info in read_onnx_file(path).model.graph.input]
    sluice.compress_onnx(path, {given[0]: shown}, budget="75%", methods=("filter",), minutes=1.0, progress=True)
    peak = _peak_mb()
    file = read_onnx_file(path, {given[0]: shown[:2]})
    needed = [0.0]
    for node in file.model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in OnnxGraph(file.model).initializers:
            dims = OnnxGraph(file.model).initializers[node.input[1]].dims
            outputs, columns = (dims[0], int(np.prod(dims[1:]))) if node.op_type == "Conv" else (dims[1], dims[0])
            needed.append(8.0 * columns * (columns + outputs) if columns <= COLUMNS else 0.0)
    shapes = OnnxGraph(static_sizes(file.model, 1)).shapes
    held = sum(4.0 * np.prod(shapes[n]) for node in file.model.graph.node for n in node.output if n in shapes)
    values = held * rows_of(read_onnx_file(path, {given[0]: shown}), {given[0]: shown}).at_once
    row = Row(name, size_of(path) / MB, start, peak - start, max(needed) / MB, float(values) / MB)
    print(json.dumps({k: v for k, v in asdict(row).items() if k != "floor"}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_memory")
    parser.add_argument("--only", default="", help="word that a file's name must have")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plainly", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child[0], Path(args.child[1]), plainly=args.plainly)
        return 0
    rows = [Row(**row) for row in json.loads(args.result.read_text())["rows"]] if args.result.is_file() else []
    for name in [] if args.show else FILES_HERE:
        if args.only not in name or any(row.file == name for row in rows):
            continue
        if name in CHAINS:
            path = made(name, args.cache)
        else:
            path = fetch(next(wild for wild in FILES if wild.name == name), args.cache)
        asked = [sys.executable, "-m", "benchmarks.onnx_memory", "--child", name, str(path)]
        row, floor = (
            json.loads(
                subprocess.run([*asked, *more], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            for more in ([], ["--plainly"])
        )
        rows.append(Row(**row, floor=floor))
        save(args.result, rows)
    for row in rows:
        print(
            f"{row.file}: {row.size:.1f} MB, {row.over:.0f} MB more than the {row.start:.0f} at the start; bound "
            f"{row.bound:.0f} with {row.statistics:.0f} of one layer, {row.values:.0f} of a batch's values and "
            f"{row.floor:.0f} of a plain session"
        )
    within = sum(row.over <= row.bound for row in rows)
    less = sum(row.over <= row.aim for row in rows)
    print(json.dumps({"rows": len(rows), "within": within, "without_more": less}))
    return 0 if within == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
