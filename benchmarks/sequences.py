"""Transformers and recurrent networks, compressed by latency that is measured on this machine.

    python -m benchmarks.sequences [--runs vit-50 ... minilm-75 minilm-50] [--folder build/sequences]
    python -m benchmarks.sequences --show

1. ``vit``: a small vision transformer on 4,000 MNIST digits, 16 patches of 7 x 7 pixels as tokens; ``gru``: two layers
   of a GRU over the 28 rows. Both are trained for `EPOCHS`, and cut to a share of the dense latency (ONNX Runtime on
   the CPU, one thread, batch 1) with all methods. Beside each a thinner network of the same depth, which is the largest
   of its family within the budget, is trained from scratch for as many epochs as the dense and the slim network
   together.
   Accuracy is on 1,000 other digits, in percent: differences below 0.5 are noise.
2. ``minilm``: `benchmarks.minilm`.

A finished run is kept in the folder and never done again; the table of a network, its weights and what has finished
stay there, so the command may be stopped and given again. Last line: JSON, a row per run, which goes to
``benchmarks/results/sequences.json``; rows there of runs that the folder does not have stay. ``promise_error`` is
``promised_ms / measured_ms - 1``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sluice
from benchmarks.recovery import Shuffled
from sluice.artifacts.report import Report
from sluice.core.files import write_atomically
from sluice.models.mnist import Digits, accuracy, load_digits, train
from sluice.models.recurrent import gru_classifier
from sluice.models.vit import vit
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.profiler.timing.measure import measure
from sluice.runtime.targets import make_runner

__all__ = ["RUNS", "main", "row_of"]

RESULT = Path("benchmarks/results/sequences.json")
RUNS = ("vit-50", "vit-25", "gru-50", "gru-25", "minilm-75", "minilm-50")
EPOCHS, TUNED, REHEARSED = 20, 10, 0.5
BATCH, LR = 50, 3e-3


@dataclass(frozen=True)
class Network:
    """A network, and a family of thinner ones by a step from 1 to 8."""

    make: Callable[[], nn.Module]
    thin: Callable[[int], nn.Module]


NETWORKS: Mapping[str, Network] = {
    "vit": Network(
        lambda: vit(patch=7),
        lambda k: vit(patch=7, width=8 * k, heads=(k + 1) // 2, dims=16, hidden=16 * k),
    ),
    "gru": Network(lambda: gru_classifier(hidden=96), lambda k: gru_classifier(width=4 * k, hidden=12 * k)),
}


def trained(model: nn.Module, digits: Digits, epochs: int, seed: int, path: Path | None = None) -> nn.Module:
    """The network, trained; its weights are kept at ``path``."""
    if path is not None and path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(model, digits, epochs=epochs, lr=LR, batch=BATCH, seed=seed, augment=False, progress=False)
    if path is not None:
        save_file(model.state_dict(), path)
    return model.eval()


def row_of(report: Report) -> dict[str, Any]:
    """The figures of one compression."""
    assert report.measured_ms is not None
    return {
        "dense_ms": report.dense_ms,
        "share": report.measured_ms / report.dense_ms,
        "budget_share": report.budget_ms / report.dense_ms,
        "promise_error": report.promised_ms / report.measured_ms - 1.0,
        "met": report.met(),
        "rounds": report.rounds,
        "quiet": report.quiet,
        "uncertainty": report.uncertainty,
        "points": report.points,
        "complete": report.complete,
        "dense": report.metric_dense,
        "slim": report.metric_slim,
        "params_share": report.params_slim / report.params_dense,
        "groups": {g.name: [g.kept, g.dense] for g in report.groups},
        "edits": [f"{edit.method} {edit.name}: {edit.detail}" for edit in report.edits],
        "seconds": round(report.seconds),
    }


def thinner(network: Network, budget_share: float, x: Tensor) -> tuple[int, float]:
    """The largest step whose engine is within the share of the dense engine's time, and its share."""
    runner, rng = make_runner("ort-cpu", 1), np.random.default_rng(0)
    models = [network.make(), *(network.thin(k) for k in range(1, 9))]
    sessions = [runner.build(finalize(to_onnx(model.eval(), (x[:2],))), batch=1) for model in models]
    dense, *found = measure(sessions, min_bursts=60, rng=rng)
    shares = [m.ms / dense.ms for m in found]
    best = max((k for k, share in enumerate(shares, 1) if share <= budget_share), default=1)
    return best, shares[best - 1]


def digits_run(name: str, share: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """One network at one budget."""
    digits, network = load_digits(seed), NETWORKS[name]
    torch.manual_seed(seed)
    dense = trained(network.make(), digits, EPOCHS, seed, folder / f"{name}.safetensors")
    done = sluice.compress(
        dense, digits.test_x[:2], budget=f"{share}%", table=folder / f"{name}.db", epochs=TUNED, rehearsal=REHEARSED,
        data=Shuffled(digits, torch.Generator().manual_seed(seed), BATCH), out=folder / f"{name}-{share}",
        progress=False,
        evaluate=lambda model: accuracy(model, digits.test_x, digits.test_y),
    )  # fmt: skip
    row = row_of(done.report)
    step, thin_share = thinner(network, row["budget_share"], digits.test_x)
    torch.manual_seed(seed)
    thin = trained(network.thin(step), digits, EPOCHS + TUNED, seed)
    row["thinner"] = {"step": step, "share": thin_share, "accuracy": accuracy(thin, digits.test_x, digits.test_y)}
    row["epochs"] = {"dense": EPOCHS, "slim": TUNED, "rehearsal": REHEARSED * TUNED, "thinner": EPOCHS + TUNED}
    return row


def perform(run: str, folder: Path) -> dict[str, Any]:
    name, share = run.rsplit("-", 1)
    if name == "minilm":
        from benchmarks.minilm import minilm_run

        return minilm_run(int(share), folder)
    return digits_run(name, int(share), folder)


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A line per run."""
    for run, row in rows.items():
        parts = [
            f"{run}: {row['share']:.1%} of the latency for {row['budget_share']:.1%}",
            f"promise {row['promise_error']:+.1%}",
            f"{row['rounds']} round(s)",
            f"{row['dense']:.4g} -> {row['slim']:.4g}",
        ]
        if "thinner" in row:
            parts.append(f"thinner {row['thinner']['accuracy']:.4g} at {row['thinner']['share']:.1%}")
        print(", ".join(parts))
    print(json.dumps(rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, metavar="RUN")
    parser.add_argument("--folder", type=Path, default=Path("build/sequences"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="only print the result")
    options = parser.parse_args(argv)
    if not options.show:
        options.folder.mkdir(parents=True, exist_ok=True)
        for run in options.runs:
            kept, started = options.folder / f"{run}.json", time.perf_counter()
            if not kept.exists():
                write_atomically(kept, json.dumps(perform(run, options.folder), indent=1).encode())
                print(f"{run}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        known = json.loads(options.result.read_text()) if options.result.exists() else {}
        found = {run: options.folder / f"{run}.json" for run in RUNS}
        known |= {run: json.loads(path.read_text()) for run, path in found.items() if path.exists()}
        rows = {run: known[run] for run in RUNS if run in known}
        write_atomically(options.result, (json.dumps(rows, indent=1) + "\n").encode())
    show(json.loads(options.result.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
