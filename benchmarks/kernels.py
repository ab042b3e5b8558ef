"""Kernels of engines against kernels of their pieces, and promises on a device made of them, by TensorRT-RTX on a CPU.

    python -m benchmarks.kernels [--networks resnet20 ...] [--precisions fp16 fp32] [--plans 40]
    python -m benchmarks.kernels --show

A sum over pieces speaks of an engine only if both run the same kernels.

1. Every distinct piece is built as `sluice.runtime.trt.runner.TensorRtRunner.build_part` builds it, and once with the
   borders of a plain engine, for comparison.
2. *Promises*: a profile is made on the device of `benchmarks.roofline_device`, random plans of widths are drawn, what
   they use is measured, and their engines are built. The error of a promise is ``promised / engine - 1``. The profile
   is calibrated on the dense engine and `KNOWN` other random plans, as one that has verified some plans is.

Rows are kept as they come, and a second call goes on where the first one stopped. RTX compiles for the GPUs of desktops
and tells no times; what is said here of kernels is of the compiler that it shares with TensorRT.

Last line: JSON with ``worst_ratio, median_ratio, median_abs_err, p95_abs_err``; the errors are those of all plans.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch

from benchmarks.committed import demand_rows, read_rows, write_rows
from benchmarks.kernels_networks import CASES
from benchmarks.roofline_device import Kernel, RooflineRunner
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import to_onnx
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.pieces.partition import Partition, build_piece, partition_graph
from sluice.profiler.profile import Profile, profile_onnx
from sluice.profiler.sweep.fusion import kernels_of, regrouped
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.solver.random_configurations import random_configuration

RESULT = Path("benchmarks/results/kernels-rtx-cpu.json")
BATCH = 8
CHOSEN = (
    "resnet20", "mobilenet_v2", "crepe_tiny", "se_resnet", "bert_two_layers", "vit_tiny", "convnext_atto", "resnet50",
)  # fmt: skip
PRECISIONS = ("fp16", "fp32")
PLANS, KNOWN = 40, 8


def moves(kernels: Sequence[Kernel]) -> int:
    """How many of them only lay a tensor out anew."""
    return sum(bool(re.match(r"__myl_Tran_|Reformat", kernel.name)) for kernel in kernels)


def exported(name: str) -> onnx.ModelProto:
    torch.manual_seed(0)
    case = CASES[name]
    return to_onnx(case.make().eval(), (case.example(BATCH),))


def counts(model: onnx.ModelProto, precision: str, runner: RooflineRunner) -> dict[str, Any]:
    """The kernels of one network (rule 1)."""
    cut = partition_graph(model, BATCH)
    cut = regrouped(cut, kernels_of(cut, runner, _form(precision, runner)))
    whole = runner.build(to_precision(cut.model, precision, target="tensorrt")).list
    found = {part: _of_pieces(cut, precision, runner, part) for part in (True, False)}
    count = sum(map(len, found[True]))
    return {
        "engine": len(whole),
        "engine_moves": moves(whole),
        "pieces": len(cut.pieces),
        "kernels": count,
        "moves": sum(map(moves, found[True])),
        "plain_borders": sum(map(len, found[False])),
        "ratio": count / len(whole),
        "several": sorted({p.description for p, k in zip(cut.pieces, found[True], strict=True) if len(k) > 1}),
    }


def _form(precision: str, runner: RooflineRunner) -> Fingerprint:
    return Fingerprint(runner.device, "tensorrt", runner.version, 1, precision, BATCH, runner.clock)


def _of_pieces(cut: Partition, precision: str, runner: RooflineRunner, part: bool) -> list[Sequence[Kernel]]:
    """Kernels by piece."""
    found = []
    for piece in cut.pieces:
        model = to_precision(build_piece(cut, piece, cut.dense), precision, part=True, target="tensorrt")
        found.append((runner.build_part(model) if part else runner.build(model)).list)
    return found


def promises(model: onnx.ModelProto, precision: str, runner: RooflineRunner, plans: int) -> dict[str, Any]:
    """The errors of promises for random plans (rule 2)."""
    started, before = time.process_time(), runner.builds
    with (
        patch("sluice.profiler.profile.make_runner", lambda target, threads=1: runner),
        patch("sluice.profiler.view.make_runner", lambda target, threads=1: runner),
    ):
        profile = profile_onnx(
            model, deployment=Deployment("tensorrt", BATCH, 1, precision), methods=("filter",), progress=False
        )
        rng = np.random.default_rng(0)
        profile.time_engines([random_configuration(profile.latency, rng) for _ in range(KNOWN)])
        drawn = [random_configuration(profile.latency, rng) for _ in range(plans)]
        profile.ask(drawn)
    latency = profile.latency
    errors = [latency.ms(plan) / _engine_ms(profile, plan, runner) - 1.0 for plan in drawn]
    sizes = [abs(error) for error in errors]
    return {
        "median_abs_err": statistics.median(sizes),
        "p95_abs_err": float(np.quantile(sizes, 0.95)),
        "errors": [round(error, 6) for error in errors],
        "points": profile.coverage.points,
        "builds": runner.builds - before,
        "cpu_s": round(time.process_time() - started, 1),
    }


def _engine_ms(profile: Profile, plan: Mapping[str, int], runner: RooflineRunner) -> float:
    engine = build_engine(profile.partition, plan, profile.options)
    return runner.build(profile.engine(engine), batch=BATCH).ms


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    print("network, precision        engine  pieces  plain borders  ratio  (kernels)   error of promises: median, p95")
    for label, found in rows.items():
        numbers = f"{found['engine']:6}  {found['kernels']:6}  {found['plain_borders']:13}  {found['ratio']:5.2f}"
        told = "" if "errors" not in found else f"  {found['median_abs_err']:.2%}, {found['p95_abs_err']:.2%}"
        print(f"{label:24}  {numbers}            {told}")
    ratios = [found["ratio"] for found in rows.values()]
    errors = [abs(error) for found in rows.values() for error in found.get("errors", ())]
    last = {"worst_ratio": max(ratios), "median_ratio": statistics.median(ratios)}
    last |= {
        "median_abs_err": statistics.median(errors) if errors else None,
        "p95_abs_err": float(np.quantile(errors, 0.95)) if errors else None,
    }
    print(json.dumps(last))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=CHOSEN, choices=sorted(CASES))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--plans", type=int, default=PLANS, help=f"random plans of each (default {PLANS}); 0 for none")
    parser.add_argument("--show", action="store_true", help="print the committed result")
    asked = parser.parse_args(arguments)
    rows = read_rows(RESULT)
    if not asked.show:
        try:
            runner = RooflineRunner()
        except SluiceError as error:
            sys.exit(str(error))
        for name in asked.networks:
            for precision in asked.precisions:
                row = rows.setdefault(f"{name} {precision}", {})
                model = exported(name) if "errors" not in row else None
                if model is not None and "ratio" not in row:
                    row |= counts(model, precision, runner)
                    _keep(rows, runner)
                if model is not None and asked.plans:
                    row |= promises(model, precision, runner, asked.plans)
                    _keep(rows, runner)
    demand_rows(RESULT, rows)
    show(rows)
    return 0


def _keep(rows: Mapping[str, Any], runner: RooflineRunner) -> None:
    write_rows(RESULT, {"by": f"{runner.version} on a CPU, without a GPU", "batch": BATCH, "plans": PLANS}, rows)


if __name__ == "__main__":
    raise SystemExit(main())
