"""What gates cost in training: gated step / plain step, interleaved.

    python -m benchmarks.overhead [--rounds 20] [--batch 64]

One step is forward, backward and an AdamW step of ResNet-20 on random digits; the gated step adds the gates, the
budget's penalty and both schedules. Steps alternate in one process; the figure is the ratio of the median steps.
One thread and its CPU time: on a shared host two threads wait for each other more than the gates cost (wall-clock
ratios of one and the same step scattered by 6%). Last line: JSON ``{"filter": ratio, ...}``; ``same`` is the captured
network without gates over the source module, which shows the noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import sluice
from sluice import models
from sluice.budget import Budget
from sluice.gates import gate_parameters, other_parameters
from sluice.latency import Extent, LatencyModel, Term


def flat_model(groups: dict[str, int]) -> LatencyModel:
    """A latency model of the size of a real one: terms for neighbouring pairs of groups and for single groups."""
    levels = {g: tuple(sorted({max(1, n * k // 8) for k in range(1, 9)})) for g, n in groups.items()}
    names = list(groups)
    terms = []
    for a, b in itertools.pairwise(names):
        knots = tuple(np.array(levels[g], dtype=float) for g in (a, b))
        ms = np.outer(knots[0], knots[1]) / (groups[a] * groups[b])
        terms += [Term(f"{a}-{b}", (Extent(((a, 1),)), Extent(((b, 1),))), knots, ms)] * 2
        terms.append(Term(a, (Extent(((a, 1),)),), knots[:1], knots[0] / groups[a]))
    return LatencyModel(tuple(terms), groups, levels)


def stepper(
    model: torch.nn.Module, groups: Any, x: torch.Tensor, y: torch.Tensor, penalty: Callable[[], torch.Tensor] | None
) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(groups)

    def step() -> float:
        started = time.process_time()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if penalty is not None:
            model.step()  # type: ignore[operator]
        return time.process_time() - started

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.randn(options.batch, 1, 28, 28), torch.randint(10, (options.batch,))
    source = models.resnet20()
    plain = sluice.capture(source, x[:2]).train()
    gated = sluice.insert_gates(source, x[:2], steps=1000).train()
    budget = Budget(gated, flat_model({site: gate.size for site, gate in gated.gates.items()}), "50%")
    steps = [
        stepper(source.train(), source.parameters(), x, y, None),
        stepper(gated, [{"params": other_parameters(gated)}, {"params": gate_parameters(gated)}], x, y, budget.penalty),
        stepper(plain, plain.parameters(), x, y, None),
    ]
    times: list[list[float]] = []
    for turn in range(options.rounds + 2):
        order = range(len(steps)) if turn % 2 == 0 else range(len(steps) - 1, -1, -1)
        row = {k: steps[k]() for k in order}
        if turn >= 2:  # the first two warm up
            times.append([row[k] for k in range(len(steps))])
    base, gate, capture = (statistics.median(row[k] for row in times) for k in range(len(steps)))
    print(json.dumps({"filter": round(gate / base, 4), "same": round(capture / base, 4), "batch": options.batch}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
