"""What gates cost in training: gated step / plain step, interleaved.

    python -m benchmarks.overhead [--rounds 38] [--batch 64]

One step is forward, backward and an AdamW step of ResNet-20 on random digits; the gated step adds the gates, the
budget's penalty and both schedules. Steps alternate in one process; the figure is the ratio of the median steps.
One thread and its CPU time: on a shared host two threads wait for each other more than the gates cost (wall-clock
ratios of one and the same step scattered by 6%). Last line: JSON ``{"filter": ratio, ...}``; ``filter_rank`` has rank
gates on every convolution behind the stem too; ``same`` is the captured network without gates over the source module,
which shows the noise.

Singular directions are computed anew in every few steps only, which a median would not show. So the seconds that these
steps take beyond the median of the others are spread over the period and added to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import sluice
from sluice import models
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.core.plan import FORMS
from sluice.passes.gates.filter_gates import REFRESH, Gate, Gates, RankGate, gate_parameters, other_parameters
from sluice.training.budget import Budget

WARM = 2  # steps that warm up


def flat_model(gates: Gates) -> LatencyModel:
    """A latency model of the size of a real one: terms for neighbouring pairs of groups and for single groups, and a
    dense and a factorised term for every weight with a rank gate.
    """
    groups = {site: gate.size for site, gate in gates.items() if isinstance(gate, Gate)}
    levels = {g: tuple(sorted({max(1, n * k // 8) for k in range(1, 9)})) for g, n in groups.items()}
    names = list(groups)
    terms, rules = [], []
    switches: dict[str, int] = {}
    for a, b in itertools.pairwise(names):
        knots = tuple(np.array(levels[g], dtype=float) for g in (a, b))
        ms = np.outer(knots[0], knots[1]) / (groups[a] * groups[b])
        terms += [Term(f"{a}-{b}", (Extent(((a, 1),)), Extent(((b, 1),))), knots, ms)] * 2
        terms.append(Term(a, (Extent(((a, 1),)),), knots[:1], knots[0] / groups[a]))
    ranks = {site: gate for site, gate in gates.items() if isinstance(gate, RankGate)}
    for k, (site, gate) in enumerate(ranks.items()):
        low, dense, group = site.removesuffix("|rank"), f"{gate.param}|dense", names[k % len(names)]
        levels[site] = tuple(sorted({max(1, gate.size * k // 8) for k in range(1, 9)}))
        knots = tuple(np.array(levels[s], dtype=float) for s in (site, group))
        ms = np.outer(knots[0], knots[1]) / (gate.size * groups[group])
        terms.append(Term(site, (Extent(((site, 1),)), Extent(((group, 1),))), knots, 1.2 * ms, 1.0, (low,)))
        terms.append(Term(dense, (Extent(((group, 1),)),), knots[1:], knots[1] / groups[group], 1.0, (dense,)))
        rules.append(Rule(((dense, 1), (low, 1))))
        switches |= {dense: 1, low: 0}
    sizes = groups | {site: gate.size for site, gate in ranks.items()}
    levels |= dict.fromkeys(switches, (0, 1))
    return LatencyModel(tuple(terms), sizes | switches, levels, rules=tuple(rules), switches=frozenset(switches))


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


def amortised(seconds: Sequence[float], period: int) -> float:
    """The median step, plus the excess of every ``period``-th one, spread over the period; seconds."""
    due = [s for turn, s in enumerate(seconds) if turn >= WARM and (turn + 1) % period == 0]
    others = [s for turn, s in enumerate(seconds) if turn >= WARM and (turn + 1) % period]
    usual = statistics.median(others)
    return usual + max(0.0, statistics.median(due) - usual) / period if due else usual


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=38)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.randn(options.batch, 1, 28, 28), torch.randint(10, (options.batch,))
    source = models.resnet20()
    plain = sluice.capture(source, x[:2]).train()
    weights = {n: FORMS[0] for n, p in source.named_parameters() if p.ndim == 4 and p.shape[1] > 1}
    steps = [stepper(source.train(), source.parameters(), x, y, None)]
    for ranks in ({}, weights):
        gated = sluice.insert_gates(source, x[:2], steps=1000, ranks=ranks).train()
        budget = Budget(gated, flat_model(gated.gates), "50%")
        groups = [{"params": other_parameters(gated)}, {"params": gate_parameters(gated)}]
        steps.append(stepper(gated, groups, x, y, budget.penalty))
    steps.append(stepper(plain, plain.parameters(), x, y, None))
    times: list[list[float]] = []
    for turn in range(WARM + options.rounds):
        order = range(len(steps)) if turn % 2 == 0 else range(len(steps) - 1, -1, -1)
        row = {k: steps[k]() for k in order}
        times.append([row[k] for k in range(len(steps))])
    columns = list(zip(*times, strict=True))
    base, gate, both, capture = (amortised(column, REFRESH) for column in columns)
    ratios = {"filter": gate / base, "filter_rank": both / base, "same": capture / base}
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()} | {"batch": options.batch}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
