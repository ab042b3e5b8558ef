"""A pitch tracker with its published weights, made to fit half of its measured latency without a single label.

    python -m examples.crepe --budget 50% --epochs 6 --out build/crepe

1. The slim network learns from the outputs of the dense one (`distillation`), on synthesised tones without their
   pitches. Pitches serve only to measure, for the report, the accuracy on tones that it was not trained on.
2. The latency is that of a single frame: a live tracker gets one every 10 ms and cannot wait for a batch.

Leaves ``OUT/table.db`` and, in ``OUT/slim``, plan.json, slim.safetensors, slim.onnx and report.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import sluice
from examples.crepe.model import crepe_tiny
from examples.crepe.tones import Frames, Tones, make_tones, raw_pitch_accuracy
from sluice.artifacts.report_text import report_text
from sluice.pipeline.compress import Compressed
from sluice.solver.options import METHODS

__all__ = ["compress_tracker", "distillation", "main"]

BATCH = 1  # of the deployment, see 2
THREADS = 1
# Statistics that never move, as published, would be those of another network after the cut.
MOMENTUM = 0.1
TRAIN_SEED, TEST_SEED = 1, 2  # of the tones
TEST_FRAMES = 2000


def distillation(outputs: Tensor, taught: Tensor, labels: Any) -> Tensor:
    """Divergence of the teacher's probabilities from the student's, ``(N, bins)``: summed over bins, mean over frames.

    ``KL = BCE(outputs, taught) - BCE(taught, taught)`` for every bin, zero where both agree; labels are not read.
    """
    cross = F.binary_cross_entropy(outputs, taught, reduction="sum")
    return (cross - F.binary_cross_entropy(taught, taught, reduction="sum")) / len(outputs)


def compress_tracker(
    model: nn.Module,
    train: Tones,
    test: Tones,
    *,
    budget: str,
    out: Path,
    methods: Sequence[str] = METHODS,
    gate_epochs: int = 0,
    epochs: int = 6,
    rehearsal: float = 0.25,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """`sluice.compress` on frames alone, judged by the raw pitch accuracy on ``test``."""
    torch.manual_seed(seed)
    return sluice.compress(
        model,
        test.frames[:BATCH],
        budget=budget,
        data=Frames(train, batch, seed),
        table=out / "table.db",
        out=out / "slim",
        batch=BATCH,
        threads=THREADS,
        methods=methods,
        gate_epochs=gate_epochs,
        epochs=epochs,
        rehearsal=rehearsal,
        loss=distillation,
        evaluate=lambda tracker: raw_pitch_accuracy(tracker, test),
        progress=progress,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compress, report; exit status 0 if the budget is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.crepe", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="50%", help="share of the dense latency, or milliseconds as in 1.5ms")
    parser.add_argument("--methods", default=",".join(METHODS), help="of filter, rank, block, merge")
    parser.add_argument("--gate-epochs", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--frames", type=int, default=2048, help="to train on")
    parser.add_argument("--out", type=Path, default=Path("build/crepe"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        done = compress_tracker(
            crepe_tiny(momentum=MOMENTUM),
            make_tones(options.frames, TRAIN_SEED),
            make_tones(TEST_FRAMES, TEST_SEED),
            budget=options.budget,
            out=options.out,
            methods=options.methods.split(","),
            gate_epochs=options.gate_epochs,
            epochs=options.epochs,
            seed=options.seed,
        )
    except sluice.SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(report_text(done.report))
    console.print(
        f"metric: percent of {TEST_FRAMES} unseen frames with the pitch within 50 cents; artefacts in {options.out}"
    )
    return 0 if done.report.met() else 1


if __name__ == "__main__":
    sys.exit(main())
