"""How many engines TensorRT builds for a plan by need, counted with TensorRT-RTX on a CPU.

    python -m benchmarks.builds [--network resnet50] [--share 0.5] [--methods filter rank block merge]
    python -m benchmarks.builds --show

A profile is made on the device of `benchmarks.roofline_device`, and a plan of all methods for a share of the dense time
is found by need, under losses that are drawn (`benchmarks.need.drawn_losses`). Counted are all distinct engines: parts,
those for joints, whole networks, and those that tell kernels. An engine of equal parts is built once, as
`sluice.runtime.trt.runner` keeps it. RTX chooses kernels without timing them and has no timing cache, so the MB that
are written with each call of measurements are told on a GPU alone, by `sluice profile`.

Last line: JSON with ``network, share, builds, points, promised_share``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.committed import demand_rows, read_rows, write_rows
from benchmarks.kernels import BATCH, exported
from benchmarks.kernels_networks import CASES
from benchmarks.need import drawn_losses
from benchmarks.roofline_device import RooflineRunner
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.profiler.need import solve_by_need
from sluice.profiler.profile import profile_onnx
from sluice.solver.decide import Choice, decide, restricted
from sluice.solver.descent import steps_from
from sluice.solver.options import METHODS

RESULT = Path("benchmarks/results/builds-rtx-cpu.json")
SPREAD, GAP, SOLVER_S = 0.5, 1e-2, 30.0


def count(network: str, share: float, methods: Sequence[str], runner: RooflineRunner) -> dict[str, Any]:
    """What one plan cost."""
    started = time.process_time()
    with (
        patch("sluice.profiler.profile.make_runner", lambda target, threads=1: runner),
        patch("sluice.profiler.view.make_runner", lambda target, threads=1: runner),
    ):
        profile = profile_onnx(
            exported(network), deployment=Deployment("tensorrt", BATCH, 1, "fp16"), methods=methods, progress=False
        )
        dense, sites = runner.builds, profile.options.sites(profile.latency, methods)
        losses = drawn_losses(restricted(profile.latency, sites), 0, SPREAD)
        target = share * profile.latency.dense_ms()

        def solve(latency: LatencyModel, near: Mapping[str, int] | None = None) -> Choice:
            return decide(restricted(latency, sites), losses, target, gap=GAP, time_limit_s=SOLVER_S, near=near)

        chosen = solve_by_need(
            profile, solve, lambda latency, widths: steps_from(restricted(latency, sites), losses, widths)
        )
        profile.time_engines([chosen.widths])
    return {
        "network": network, "share": share, "methods": list(methods), "builds": runner.builds, "dense_builds": dense,
        "points": profile.coverage.points, "points_of_a_complete_table": profile.coverage.complete,
        "promised_share": round(profile.latency.ms(chosen.widths) / profile.latency.dense_ms(), 4),
        "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    for found in rows.values():
        print(
            f"{found['network']} at {found['share']:.0%}, {', '.join(found['methods'])}: {found['builds']} builds "
            f"({found['dense_builds']} of the dense network), {found['points']} points of "
            f"{found['points_of_a_complete_table']}"
        )
    last = list(rows.values())[-1]
    print(json.dumps({key: last[key] for key in ("network", "share", "builds", "points", "promised_share")}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.builds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet50", choices=sorted(CASES))
    parser.add_argument("--share", type=float, default=0.5, help="of the dense milliseconds (default 0.5)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--show", action="store_true", help="print the committed result")
    asked = parser.parse_args(arguments)
    rows = read_rows(RESULT)
    if not asked.show:
        try:
            runner = RooflineRunner()
        except SluiceError as error:
            sys.exit(str(error))
        found = count(asked.network, asked.share, asked.methods, runner)
        name = f"{asked.network} {asked.share} {' '.join(asked.methods)}"
        rows = {**{key: row for key, row in rows.items() if key != name}, name: found}
        write_rows(RESULT, {"by": f"{runner.version} on a CPU, without a GPU", "batch": BATCH}, rows)
    demand_rows(RESULT, rows)
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
