"""Promised against measured milliseconds of the plans that users get (`python -m benchmarks.fidelity --chosen`).

For every network and budget, from 90% down to 20% of the dense latency, a plan is chosen as `sluice compress` chooses
it: what the solver asks for is measured, the engine is built and measured, and where it misses the budget the plan is
chosen again. Losses are the neutral ones of `sluice.profiler.need`, since only times matter here. Then the engine of
the plan and the dense one are built anew and measured once more. Told are

    error = promised / measured - 1,    promised before the engine of the plan was measured,

and whether that last measurement is within the budget. Budgets that no plan reaches are left out and counted.

A finished network is kept in ``build/fidelity/chosen`` and not done again; its rows take the place of older ones in
``benchmarks/results/chosen.json``. ``--chosen --show`` prints that file. Last line: JSON with fractions.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity_results import BATCHES
from benchmarks.fidelity_runs import NETWORKS
from sluice.core.budget_spec import BudgetSpec
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.pairs import Pairs
from sluice.pipeline.problem import Problem
from sluice.pipeline.verify import solve_verified
from sluice.profiler.need import neutral_losses
from sluice.profiler.profile import profile_onnx
from sluice.solver.options import METHODS

__all__ = ["choose_all", "chosen_summary", "published", "show"]

BUDGETS = (90, 75, 60, 50, 40, 30, 25, 20)  # percent
FOLDER = Path("build/fidelity/chosen")
RESULT = Path("benchmarks/results/chosen.json")


def choose_all(networks: Sequence[str], target: str, threads: int = 1) -> list[dict[str, Any]]:
    """One row per network and budget."""
    rows: list[dict[str, Any]] = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for network in networks:
        kept = FOLDER / f"{target}-{threads}-{network}.json"
        if not kept.exists():
            found = _chosen(network, Deployment(target, BATCHES.get(network, 8), threads))
            kept.write_text(json.dumps(found))
        rows += json.loads(kept.read_text())
        _publish(rows)
        print(f"{network}: {chosen_summary(rows)}", file=sys.stderr, flush=True)
    return rows


def _chosen(network: str, deployment: Deployment) -> list[dict[str, Any]]:
    dense = NETWORKS[network].export()
    table = FOLDER / f"{deployment.target}-{deployment.threads}-{network}.db"
    profile = profile_onnx(dense, table, deployment=deployment, methods=METHODS)
    sites = profile.options.sites(profile.latency, METHODS)
    analysis = profile.partition.analysis
    scores = {group.name: np.arange(group.size, 0, -1, dtype=np.float64) for group in analysis.groups}
    rows: list[dict[str, Any]] = []
    for percent in BUDGETS:
        started, budget = time.perf_counter(), BudgetSpec.parse(f"{percent}%")
        problem = Problem(profile, analysis, sites, neutral_losses(profile.latency), scores)
        row: dict[str, Any] = {"network": network, "target": deployment.target, "budget": percent / 100}
        try:
            verified = solve_verified(problem, budget, dense)
        except SluiceError as error:
            rows.append({**row, "refused": str(error)})
            continue
        again = Pairs(profile, profile.engine(finalize(dense)), budget)
        times = again.settle(profile.engine(finalize(rewrite_onnx(dense, verified.plan))), 1.0)
        dense_ms = profile.latency.dense_ms()
        measured = times.slim_ms / times.dense_ms
        row |= {"promised": verified.choice.promised_ms / dense_ms, "measured": measured, "rounds": verified.rounds}
        row |= {"quiet": times.quiet, "points": profile.coverage.points, "seconds": time.perf_counter() - started}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def published() -> list[dict[str, Any]]:
    """The rows of the committed result."""
    return list(json.loads(RESULT.read_text())["rows"]) if RESULT.exists() else []


def _publish(rows: Sequence[Mapping[str, Any]]) -> None:
    new = {(row["target"], row["network"]) for row in rows}
    kept = [row for row in published() if (row["target"], row["network"]) not in new]
    together = [*kept, *rows]
    RESULT.write_text(json.dumps({"rows": together, **chosen_summary(together)}, indent=1) + "\n")


def chosen_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and 95th percentile of the error, share of budgets met, and counts."""
    done = [row for row in rows if "refused" not in row]
    errors = [abs(row["promised"] / row["measured"] - 1.0) for row in done]
    return {
        "plans": len(done),
        "refused": len(rows) - len(done),
        "median_abs_err": float(np.median(errors)) if done else float("nan"),
        "p95_abs_err": float(np.quantile(errors, 0.95)) if done else float("nan"),
        "met": float(np.mean([row["measured"] <= row["budget"] for row in done])) if done else float("nan"),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per network and target, and the JSON of all."""
    for key in dict.fromkeys((row["target"], row["network"]) for row in rows):
        own = [row for row in rows if (row["target"], row["network"]) == key]
        print(" ".join(key), json.dumps(chosen_summary(own)))
    print(json.dumps(chosen_summary(rows)))
