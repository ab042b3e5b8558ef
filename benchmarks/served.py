"""A device over the network against the same device at hand: tables, promises and plans of both.

    python -m benchmarks.served [--networks resnet1d ...] [--targets ort-cpu openvino]
    python -m benchmarks.served --show

Every network is planned to half of its latency in one shot, all methods, three times, each with a table of its own:
here, here again, and through ``sluice serve`` on a loopback port. The second says what is noise. Told are

    points    median and 95th percentile of |log(a / b)| over the points that two tables have in common, after each
              was divided by its dense latency, and where both are above a thousandth of it
    promise   |a - b| / b of the promises, by both tables, of the plan that b chose, as shares of the dense latency
    loss      the price of the plan that a chose, less that of b's, as a share of b's, both by the losses of b

of *here again* against *here*, and of *served* against *here*. Losses do not depend on the table. Last line: JSON with
the largest ``points_again``, ``points_served``, ``promise_again``, ``promise_served``, ``loss_again``, ``loss_served``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.committed import demand_rows, read_rows, write_rows
from benchmarks.fidelity_results import BATCHES
from benchmarks.fidelity_runs import NETWORKS
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.pipeline.prepare import prepare
from sluice.pipeline.problem import Problem, Solution
from sluice.pipeline.recipe import Recipe
from sluice.solver.options import METHODS

RESULT = Path("benchmarks/results/served.json")
SHARE, SAMPLES = 0.5, 64
LEAST = 0.001  # of the dense latency: joints save less, or nothing
FIGURES = ("points", "points_p95", "promise", "loss")


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A problem with its table, and the plan of half of the latency."""

    problem: Problem
    solution: Solution

    @classmethod
    def on(cls, target: str, network: str, table: Path) -> Planned:
        torch.manual_seed(0)
        one = NETWORKS[network]
        model, batch = one.make().eval(), BATCHES[network]
        x = torch.randn(SAMPLES, *one.shape)
        with torch.no_grad():
            labels = model(x).argmax(-1)
        data = [(x[k : k + 16], labels[k : k + 16]) for k in range(0, SAMPLES, 16)]
        half, recipe = BudgetSpec.parse(f"{SHARE:.0%}"), Recipe(data, progress=False)
        ready = prepare(
            model, (x[:batch],), [half], Deployment(target, batch), recipe, table=table, exclude=(), methods=METHODS
        )
        problem = ready.problem
        return cls(problem, problem.solve(SHARE * problem.profile.latency.dense_ms()))

    def points(self) -> dict[tuple[str, tuple[int, ...]], float]:
        """Shares of the dense latency."""
        table, dense = self.problem.profile.bench.table, self.problem.profile.latency.dense_ms()
        return {(key, at): m.ms / dense for key in table.keys() for at, m in table.points(key).items()}  # noqa: SIM118

    def promise(self, widths: dict[str, int]) -> float:
        """The share of the dense latency that this table promises; what it lacks is measured first."""
        profile = self.problem.profile
        profile.ask([widths])
        latency = profile.latency
        return latency.ms(widths) / latency.dense_ms()

    def loss(self, widths: dict[str, int]) -> float:
        levels, losses = self.problem.model.levels, self.problem.losses
        return sum(float(v[levels[s].index(widths[s])]) for s, v in losses.items() if widths[s] in levels[s])


@contextmanager
def serving(target: str) -> Iterator[str]:
    """``sluice serve`` in a process of its own; the target that stands for it."""
    program = [sys.executable, "-m", "sluice", "serve", "--target", target, "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"{target}@{json.loads(process.stdout.readline())['address']}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def compared(one: Planned, other: Planned) -> dict[str, float]:
    """The figures of ``one`` against ``other``, fractions."""
    mine, theirs = one.points(), other.points()
    both = [point for point in mine.keys() & theirs.keys() if min(mine[point], theirs[point]) > LEAST]
    apart = np.abs(np.log([mine[point] / theirs[point] for point in both]))
    widths = dict(other.solution.choice.widths)
    there, here = other.promise(widths), one.promise(widths)
    price = other.loss(widths)
    return {
        "common": float(len(apart)), "points": float(np.median(apart)), "points_p95": float(np.quantile(apart, 0.95)),
        "promise": abs(here - there) / there,
        "loss": (other.loss(dict(one.solution.choice.widths)) - price) / max(price, 1e-12),
    }  # fmt: skip


def measured(network: str, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, serving(target) as served:
        here, again, there = (
            Planned.on(where, network, Path(folder) / f"{name}.db")
            for name, where in (("here", target), ("again", target), ("there", served))
        )
        return {"again": compared(again, here), "served": compared(there, here)}


def summary(rows: dict[str, Any]) -> dict[str, float]:
    return {
        f"{figure}_{arm}": round(max(row[arm][figure] for row in rows.values()), 4)
        for figure in ("points", "promise", "loss")
        for arm in ("again", "served")
    }


def show(rows: dict[str, Any]) -> None:
    print(f"{'':22}{'':>8}" + "".join(f"{name:>12}" for name in FIGURES))
    for name, row in rows.items():
        for arm in ("again", "served"):
            print(f"{name:22}{arm:>8}" + "".join(f"{row[arm][figure]:>12.2%}" for figure in FIGURES))
    print(json.dumps(summary(rows)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet1d"], choices=sorted(NETWORKS))
    parser.add_argument("--targets", nargs="+", default=["ort-cpu", "openvino"])
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args(arguments)
    rows = read_rows(RESULT)
    if asked.show:
        demand_rows(RESULT, rows)
        return show(rows)
    for target in asked.targets:
        for network in asked.networks:
            rows[f"{network} {target}"] = measured(network, target)
            write_rows(RESULT, {"share": SHARE}, rows)
    return show(rows)


if __name__ == "__main__":
    main()
