"""How few points a plan needs: measuring by need against the optimum of the complete table, on a simulated device.

    python -m benchmarks.need [--networks resnet20 ...] [--seeds 2]
    python -m benchmarks.need --show

For every network, losses and budget: solve by need (`sluice.profiler.need`), and solve with every point known. Each
case begins with the dense network alone. Told are the points asked for as a share of those of a complete table, the
loss of the plan beyond the optimum, whether the two are equal within the solver's gap, and solver CPU seconds. The
device is that of `benchmarks.simulated_device`; losses are drawn, spread over sites and kinds by a log-normal.

The cases of a network with all budgets and scenarios are written to ``benchmarks/results``. Last line: JSON with
fractions ``worst_share, median_share, worst_loss_excess, equal``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.fidelity_results import BATCHES
from benchmarks.fidelity_runs import NETWORKS
from benchmarks.simulated_device import SimulatedBench, complete_model, simulated_profile
from sluice.core.latency import LatencyModel
from sluice.profiler.need import solve_by_need
from sluice.solver.decide import Choice, decide, restricted
from sluice.solver.descent import steps_from
from sluice.solver.options import METHODS

RESULT = Path("benchmarks/results/need-simulated.json")
SHARES = (0.75, 0.5, 0.35, 0.25)
SPREADS = (0.5, 1.5)  # of the logarithm of the sites' losses, by scenario
EQUAL = 1e-6


def drawn_losses(model: LatencyModel, seed: int, spread: float) -> dict[str, np.ndarray]:
    """A loss for every level of every site that may move: convex in widths and ranks."""
    rng = np.random.default_rng([seed, 7])
    losses = {}
    for site, levels in model.levels.items():
        if len(levels) == 1 or site.endswith("|dense"):
            continue
        weight, size = float(np.exp(spread * rng.standard_normal())), model.dense[site]
        values = np.asarray(levels, dtype=np.float64)
        power = float(rng.uniform(1.0, 3.0))
        losses[site] = weight * (values if site in model.switches else (1.0 - values / size) ** power)
    return losses


def case(network: str, share: float, seed: int) -> dict[str, float | str]:
    """One case; every figure a fraction, a count or CPU seconds."""
    profile = simulated_profile(NETWORKS[network].export(), BATCHES.get(network, 8), METHODS)
    bench = profile.bench
    assert isinstance(bench, SimulatedBench)
    sites = profile.options.sites(profile.latency, METHODS)
    losses = drawn_losses(restricted(profile.latency, sites), seed, SPREADS[seed % len(SPREADS)])
    dense, target = bench.counts["asked"], share * profile.latency.dense_ms()
    solves = [0]

    def solve(latency: LatencyModel, near: Mapping[str, int] | None = None) -> Choice:
        solves[0] += 1
        return decide(restricted(latency, sites), losses, target, gap=1e-3, time_limit_s=60, near=near)

    started = time.process_time()
    chosen = solve_by_need(
        profile, solve, lambda latency, widths: steps_from(restricted(latency, sites), losses, widths)
    )
    seconds = time.process_time() - started
    truth = complete_model(profile.layout, profile.latency)
    started = time.process_time()
    best = solve(truth)
    complete = profile.coverage.complete
    asked = bench.counts["asked"]
    excess = chosen.loss / best.loss - 1.0 if best.loss else 0.0
    return {
        "network": network, "share_of_dense": share, "seed": seed, "points_dense": dense, "points": asked,
        "complete": complete, "share": asked / complete, "loss_excess": excess, "rounds": solves[0] - 1,
        "calls": bench.counts["calls"], "solver_s": seconds, "complete_solver_s": time.process_time() - started,
        "within": truth.ms(chosen.widths) / target,
    }  # fmt: skip


def published() -> list[dict[str, float | str]]:
    """The cases of the committed result."""
    return list(json.loads(RESULT.read_text())["cases"]) if RESULT.exists() else []


def _publish(network: str, cases: Sequence[dict[str, float | str]]) -> None:
    """Put the cases of a network in the place of older ones."""
    kept = [case for case in published() if case["network"] != network]
    kept += [case for case in cases if case["network"] == network]
    RESULT.write_text(json.dumps({"cases": kept, **summary(kept)}, indent=1) + "\n")


def summary(cases: Sequence[Mapping[str, float | str]]) -> dict[str, float]:
    shares = [float(one["share"]) for one in cases]
    excess = [float(one["loss_excess"]) for one in cases]
    return {
        "worst_share": max(shares),
        "median_share": float(np.median(shares)),
        "worst_loss_excess": max(excess),
        "equal": float(np.mean([value <= EQUAL for value in excess])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", type=int, default=2, help="scenarios of losses")
    parser.add_argument("--show", action="store_true", help="print the committed result")
    options = parser.parse_args()
    if options.show:
        cases = published()
        if not cases:
            print(f"there is no result yet in {RESULT}; run this without --show", file=sys.stderr)
            return 1
    else:
        cases = []
        for network in options.networks:
            for seed in range(options.seeds):
                for share in options.shares:
                    cases.append(case(network, share, seed))
                    print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
            if tuple(options.shares) == SHARES and options.seeds == len(SPREADS):
                _publish(network, cases)
    print(json.dumps(summary(cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
