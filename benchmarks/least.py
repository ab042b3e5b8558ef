"""How fast a small network gets at an allowed drop, and how well short trainings foresee what it keeps.

    python -m benchmarks.least [--seed 0] [--drop 1.0] [--epochs 12] [--rehearsal 0.5]

The network of `benchmarks.recovery` is trained on 2,000 MNIST digits of 14 x 14 pixels, and `sluice.compress` seeks its
least latency on this machine, batch 8, one thread (`sluice.pipeline.least`). Accuracy is on 1,000 other digits, in
percent: differences below 0.5 are noise.

Prints the curve. Last line: JSON, the dense accuracy and every row of the curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console

import sluice
from benchmarks.recovery import BATCH, Shuffled, network, small_digits
from sluice.models.mnist import accuracy, train


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rehearsal", type=float, default=0.5)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    digits = small_digits(options.seed)
    dense = train(
        network(), digits, epochs=20, lr=3e-3, batch=BATCH, seed=options.seed, augment=False, progress=False
    ).eval()
    done = sluice.compress(
        dense, digits.test_x[:8], budget=f"-{options.drop}", batch=8, epochs=options.epochs,
        data=Shuffled(digits, torch.Generator().manual_seed(options.seed)), rehearsal=options.rehearsal,
        evaluate=lambda model: accuracy(model, digits.test_x, digits.test_y),
    )  # fmt: skip
    curve = done.report.least
    assert curve is not None
    console = Console()
    console.print(curve.table(), *curve.lines(), sep="\n")
    print(json.dumps(asdict(curve)))
    return 0 if curve.met() else 1


if __name__ == "__main__":
    sys.exit(main())
