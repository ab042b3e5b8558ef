"""The main job, end to end: ResNet-20 on real MNIST digits, made to fit half of its measured latency.

    python -m examples.demo            (or ``make demo``)

Leaves ``build/demo/table.db`` and ``build/demo/50/`` with plan.json, slim.safetensors, slim.onnx and report.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import sluice
from sluice.models import resnet20_mnist
from sluice.models.mnist import Digits, accuracy, load_digits, random_affine
from sluice.passes.decide import least_ms
from sluice.profiler.profile import Profile
from sluice.verify import measure_widths

BATCH = 8  # of the deployment
THREADS = 1


class Batches:
    """Shuffled, augmented training batches; a fresh order every epoch."""

    def __init__(self, digits: Digits, size: int, seed: int):
        self.digits, self.size = digits, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.digits.train_x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits.train_x), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield random_affine(self.digits.train_x[chosen], self.generator), self.digits.train_y[chosen]


def say_least(console: Console, profile: Profile) -> None:
    """The least latency that filter gates can reach, promised and measured, and what then takes the time."""
    latency = profile.latency
    least = least_ms(latency)
    dense_ms, ms = measure_widths(profile, [latency.dense, least.widths])
    console.print(
        f"\nleast latency that filter gates can reach: {least.promised_ms:.3f} ms promised, {ms:.3f} ms measured, "
        f"{ms / dense_ms:.1%} of dense ({dense_ms:.3f} ms)"
    )
    left = sorted((t for t in latency.terms if t.weight > 0), key=lambda t: -t.at(least.widths))[:3]
    names = ", ".join(f"{t.name} {t.at(least.widths):.3f} ms" for t in left)
    console.print(
        f"what is left there: {len([t for t in latency.terms if t.weight > 0])} pieces that filters cannot take away, "
        f"the largest {names}; only dropping residual blocks or merging layers could go lower"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--gate-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    digits = load_digits()
    dense = resnet20_mnist()
    options.out.mkdir(parents=True, exist_ok=True)
    example = digits.test_x[:BATCH]
    table = options.out / "table.db"
    done = sluice.compress(
        dense,
        example,
        budget="50%",
        data=Batches(digits, 64, options.seed),
        table=table,
        out=options.out / "50",
        batch=BATCH,
        threads=THREADS,
        gate_epochs=options.gate_epochs,
        epochs=options.epochs,
        evaluate=lambda model: accuracy(model, digits.test_x, digits.test_y),
    )
    console = Console()
    done.report.render(console)
    say_least(console, sluice.profile(dense, example, table, batch=BATCH, threads=THREADS))
    console.print(f"total {time.perf_counter() - started:.0f} s; artefacts in {options.out}")
    report = done.report
    return 0 if report.met() else 1


if __name__ == "__main__":
    sys.exit(main())
