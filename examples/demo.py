"""The main job, end to end: ResNet-20 on real MNIST digits, made to fit half of its measured latency.

    python -m examples.demo                                      (or ``make demo``)
    python -m examples.demo --budgets 50% 25% --least            (or ``make demo-all``)

One table serves all budgets. Leaves ``build/demo/table.db``, and in ``build/demo/50/`` plan.json, slim.safetensors,
slim.onnx and report.json. ``--least`` tells the least latency that is reached. The exit status is 1 if a budget is
missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import sluice
from sluice.artifacts.report_text import report_text
from sluice.models import resnet20_mnist
from sluice.models.mnist import Digits, accuracy, load_digits, random_affine
from sluice.pipeline.verify import measure_configurations
from sluice.profiler.need import solve_by_need
from sluice.profiler.profile import Profile
from sluice.solver.decide import least_ms, restricted
from sluice.solver.options import METHODS

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


def say_least(console: Console, profile: Profile, methods: Sequence[str]) -> None:
    """Print the least latency that these methods can reach, promised and measured, and the slowest pieces then."""
    sites = profile.options.sites(profile.latency, methods)
    least = solve_by_need(profile, lambda latency, near: least_ms(restricted(latency, sites)))
    latency = profile.latency
    dense_ms, ms = measure_configurations(profile, [latency.dense, least.widths])
    console.print(
        f"\nleast latency by {', '.join(methods)}: {least.promised_ms:.3f} ms promised, {ms:.3f} ms measured, "
        f"{ms / dense_ms:.1%} of dense ({dense_ms:.3f} ms)"
    )
    left = {t.name: t.at(least.widths) for t in latency.terms if t.weight > 0 and t.on(least.widths)}
    names = ", ".join(f"{name} {left[name]:.3f} ms" for name in sorted(left, key=lambda n: -left[n])[:3])
    console.print(f"what is left there: {len(left)} pieces, the largest {names}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", nargs="+", default=["50%"])
    parser.add_argument("--least", action="store_true", help="tell the least latency that is reached, too")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rehearsal", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    digits = load_digits()
    dense = resnet20_mnist()
    options.out.mkdir(parents=True, exist_ok=True)
    example = digits.test_x[:BATCH]
    table = options.out / "table.db"
    console, reports = Console(), []
    for _, done in sluice.sweep(
        dense,
        example,
        budgets=options.budgets,
        data=Batches(digits, 64, options.seed),
        table=table,
        out=options.out,
        batch=BATCH,
        threads=THREADS,
        epochs=options.epochs,
        rehearsal=options.rehearsal,
        evaluate=lambda model: accuracy(model, digits.test_x, digits.test_y),
    ):
        reports.append(done.report)
    for budget, report in zip(options.budgets, reports, strict=True):
        console.rule(f"at most {budget} of the dense latency")
        console.print(report_text(report))
    if options.least:
        profile = sluice.profile(dense, example, table, batch=BATCH, threads=THREADS)
        for methods in (("filter",), METHODS):
            say_least(console, profile, methods)
    console.print(f"total {time.perf_counter() - started:.0f} s; artefacts in {options.out}")
    return 0 if all(report.met() for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
