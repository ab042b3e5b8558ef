"""Promised against measured milliseconds, on random plans that no fit has seen.

    python -m benchmarks.fidelity [--plans 20] [--networks resnet20 vgg16_bn mobilenet_v2] [--batch 8] [--threads 1]
                                  [--methods filter rank block merge]

Every network is profiled (pieces, joints, alternatives, calibration on its own engines), then fresh random plans are
drawn from what the solver may choose, widths, ranks, dropped blocks and merged runs, their engines built and measured.
Last line: JSON with fractions; the totals pool all plans, ``spearman`` is the worst network's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sluice import models
from sluice.passes.export import to_onnx
from sluice.passes.options import METHODS
from sluice.passes.sampling import random_configuration
from sluice.profiler.anchor import make_anchor
from sluice.profiler.calibrate import errors, measure_engines
from sluice.profiler.engine import with_ranks_in_reach
from sluice.profiler.profile import profile_onnx
from sluice.profiler.sweep import Bench
from sluice.profiler.table import LatencyTable


def run(
    name: str, table: Path, batch: int, threads: int, methods: Sequence[str], plans: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Promised and measured ms of fresh plans, and the seconds that profiling took."""
    dense = to_onnx(getattr(models, name)().eval(), models.example_inputs(name))
    started = time.perf_counter()
    profile = profile_onnx(dense, table, batch=batch, threads=threads, methods=methods)
    seconds = time.perf_counter() - started
    rng = np.random.default_rng(seed)
    latency, options = profile.latency, profile.options
    drawn = [
        with_ranks_in_reach(profile.dissection, latency, random_configuration(latency, rng), options)
        for _ in range(plans)
    ]
    runner = profile.runner()
    with LatencyTable.open(table) as opened:
        bench = Bench(opened, runner, make_anchor(opened, runner, rng), rng)
        measured = np.array(measure_engines(profile.dissection, bench, drawn, options))
    return np.array([latency.ms(configuration) for configuration in drawn]), measured, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg16_bn", "mobilenet_v2"])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tables", type=Path, default=Path("build/fidelity"))
    options = parser.parse_args()
    options.tables.mkdir(parents=True, exist_ok=True)
    per_network: dict[str, dict[str, float]] = {}
    all_promised, all_measured = [], []
    for name in options.networks:
        table = options.tables / f"{name}-b{options.batch}-t{options.threads}.db"
        promised, measured, seconds = run(
            name, table, options.batch, options.threads, options.methods, options.plans, options.seed
        )
        per_network[name] = {**errors(promised, measured), "profile_seconds": round(seconds, 1)}
        print(f"{name}: {per_network[name]}", file=sys.stderr)
        print(f"  promised/measured {np.round(promised / measured, 3).tolist()}", file=sys.stderr)
        all_promised.append(promised)
        all_measured.append(measured)
    total = errors(np.concatenate(all_promised), np.concatenate(all_measured))
    total["spearman"] = min(found["spearman"] for found in per_network.values())
    print(json.dumps({**total, "per_network": per_network}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
