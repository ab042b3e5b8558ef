"""What networks keep that are cut and not trained: ours refitted by least squares, and cut by norm with onnxsim.

    python -m benchmarks.untrained [--job ds-cnn]
    python -m benchmarks.untrained --show

1. The networks are those of `benchmarks.methods_jobs`, at 75 and 50% of the measured latency of plain export. Ours is
   `sluice.compress` with ``epochs=0``, which refits by default (`sluice.training.compensate`); *cut* is the same plan
   without that.
2. onnxsim 0.8.1 cuts the plain export by norm, as few channels as bring it to the measured latency of ours
   (`benchmarks.onnx_ways_norm`); its ``apply_pruning_finetune`` then refits what it refits, MatMul and Gemm, on as many
   inputs as ours. Where no share of channels is fast enough the row says so. It is installed by ``pip install
   --no-deps onnxsim==0.8.1``.
3. Accuracy is that of the finished file in ONNX Runtime, on the test data of the job; 1,000 to 2,000 items, so
   differences below one point are noise far from 100%. ``ours_seconds`` are of all of `compress`, with all measuring.

A finished row is kept and not done again. The last line is JSON: ``points``, and over all rows the least and the median
of what the refit gives in points (``refit_gain_*``) and of ours less onnxsim's better figure (``ours_minus_onnxsim_*``,
where it has one).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from benchmarks.onnx_ways_norm import cut_by_norm
from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError, first_line
from sluice.core.files import write_atomically

if TYPE_CHECKING:
    from benchmarks.methods_jobs import Job

__all__ = ["Row", "main", "summary"]

RESULT = Path(__file__).parent / "results" / "untrained.json"
BUDGETS = ("75%", "50%")


@dataclass(frozen=True, slots=True)
class Row:
    """Percent; shares are of the plain export, measured. None where there is no file, with the reason."""

    job: str
    budget: str
    dense: float
    share: float | None = None
    cut: float | None = None
    refitted: float | None = None
    onnxsim_share: float | None = None
    onnxsim: float | None = None
    onnxsim_refitted: float | None = None
    onnxsim_reason: str = ""
    layers: int = 0
    ours_seconds: float = 0.0
    reason: str = ""


def run(job: Job, budget: str, folder: Path) -> Row:
    """One network at one budget."""
    import sluice
    from benchmarks.methods_latency import TARGET, THREADS, Shares, our_file
    from sluice.passes.cut.export import finalize, to_onnx
    from sluice.passes.cut.rewrite_onnx import rewrite_onnx

    shares = Shares(job.model, job.example, job.batch, folder / f"{job.name}-shares.json")
    dense = to_onnx(job.model, job.example)
    own = BudgetSpec.parse(budget).ms(1.0) / shares.of_ours(our_file(job.model, job.example))
    row, started = Row(job.name, budget, job.evaluate(job.model)), time.perf_counter()
    try:
        done = sluice.compress(
            job.model, job.example, budget=f"{100 * own:.3f}%", data=job.data(0), table=folder / f"{job.name}.db",
            batch=job.batch, target=TARGET, threads=THREADS, loss=job.loss, epochs=0, progress=False,
        )  # fmt: skip
    except SluiceError as error:
        return replace(row, reason=str(error))
    seconds = time.perf_counter() - started
    dense_ms, ms = shares.measured(done.deployed)
    cut = finalize(rewrite_onnx(dense, done.plan))
    row = replace(
        row, share=ms / dense_ms, cut=_judged(job, cut), refitted=_judged(job, done.deployed), ours_seconds=seconds,
        layers=0 if done.report.recovery is None else done.report.recovery.refitted,
    )  # fmt: skip
    return _by_norm(row, job, shares.plain())


def _by_norm(row: Row, job: Job, plain: onnx.ModelProto) -> Row:
    from torch.utils import _pytree as pytree

    from sluice.training.compensate import INPUTS
    from sluice.training.train import split_batch

    assert row.share is not None
    name = plain.graph.input[0].name
    norm = cut_by_norm(plain, {name: job.example.numpy()}, row.share)
    row = replace(row, onnxsim_share=norm.share, onnxsim_reason=norm.reason)
    if norm.model is None or norm.given is None:
        return row
    row = replace(row, onnxsim=_judged(job, norm.model))
    given = [pytree.tree_leaves(split_batch(batch)[0])[0] for batch in job.data(0)]
    seen = [x for batch in given for x in batch.split(job.batch) if len(x) == job.batch]
    try:
        from onnxsim import apply_pruning_finetune

        shown = [{name: x.numpy()} for x in seen[: INPUTS // job.batch]]
        refitted = apply_pruning_finetune(norm.given, norm.model, calibration_data=shown)
    except (ValueError, RuntimeError, KeyError) as error:
        return replace(row, onnxsim_reason=f"its refit fails with {type(error).__name__}: {first_line(error)}")
    return replace(row, onnxsim_refitted=_judged(job, refitted))


def _judged(job: Job, file: onnx.ModelProto) -> float:
    """The job's figure of merit of a file of a fixed batch."""
    import numpy as np
    import onnxruntime as ort
    import torch

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    class Sliced(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            rows, parts = x.numpy(), []
            for start in range(0, len(rows), job.batch):
                part = rows[start : start + job.batch]
                full = np.concatenate([part, part[-1:].repeat(job.batch - len(part), 0)])
                parts.append(session.run(None, {name: full})[0])
            return torch.from_numpy(np.concatenate(parts)[: len(rows)])

    return job.evaluate(Sliced())


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Over the rows that have the figures."""
    gains = [row.refitted - row.cut for row in rows if row.refitted is not None and row.cut is not None]
    beside = []
    for row in rows:
        theirs = [figure for figure in (row.onnxsim, row.onnxsim_refitted) if figure is not None]
        if row.refitted is not None and theirs:
            beside.append(row.refitted - max(theirs))
    return {
        "points": len(gains),
        **_least_and_median("refit_gain", gains),
        "beside_onnxsim": len(beside),
        **_least_and_median("ours_minus_onnxsim", beside),
    }


def _least_and_median(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        f"{name}_min": round(min(values), 2) if values else None,
        f"{name}_median": round(statistics.median(values), 2) if values else None,
    }


def _line(row: Row) -> str:
    if row.share is None:
        return f"{row.job} at {row.budget}: {row.reason}"
    theirs = (
        f"onnxsim {_figure(row.onnxsim)} at {row.onnxsim_share:.1%}, refitted {_figure(row.onnxsim_refitted)}"
        if row.onnxsim is not None and row.onnxsim_share is not None
        else f"onnxsim: {row.onnxsim_reason}"
    )
    return (
        f"{row.job} at {row.budget}, dense {row.dense:.2f}: ours at {row.share:.1%} cut {_figure(row.cut)}, refitted "
        f"{_figure(row.refitted)} ({row.layers} layers), {theirs}"
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.untrained", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--job", action="append", help="only this job (may be repeated)")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--folder", type=Path, default=Path("build/methods"), help="tables and weights")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    rows = [Row(**row) for row in json.loads(args.result.read_text())["rows"]] if args.result.is_file() else []
    for name in [] if args.show else args.job or ["ds-cnn", "resnet20-mnist"]:
        import torch

        from benchmarks.methods_jobs import JOBS

        torch.set_num_threads(1)
        left = [b for b in BUDGETS if (name, b) not in {(row.job, row.budget) for row in rows}]
        if left and name not in JOBS:
            print(f"error: there is no job {name!r}; choose of {', '.join(JOBS)}", file=sys.stderr)
            return 1
        args.folder.mkdir(parents=True, exist_ok=True)
        job = JOBS[name](args.folder) if left else None
        for budget in left:
            assert job is not None
            print(f"{name} at {budget}", file=sys.stderr, flush=True)
            rows.append(run(job, budget, args.folder))
            content = {"summary": summary(rows), "rows": [asdict(row) for row in rows]}
            write_atomically(args.result, (json.dumps(content, indent=1) + "\n").encode())
    print("\n".join(_line(row) for row in rows))
    print(json.dumps(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
