"""Kernels of the pieces of a network against kernels of its whole engine, as TensorRT-RTX builds them without a GPU.

    python -m benchmarks.kernels [--networks resnet20 ...] [--precisions fp16 fp32]
    python -m benchmarks.kernels --show

A sum over pieces speaks of an engine only if both run the same kernels. Every distinct piece is built as
`sluice.runtime.trt.runner.TensorRtRunner.build_part` builds it, and once with the borders of a plain engine, for
comparison. Rows are kept as they come, and a second call goes on where the first one stopped. RTX compiles for the GPUs
of desktops and tells no times; what is said here of kernels is of the compiler that it shares with TensorRT.

Last line: JSON with ``worst_ratio, median_ratio, median_abs_err, p95_abs_err``; the errors are those of promises, null
as long as none were made.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from benchmarks.fidelity_runs import NETWORKS
from sluice.passes.cut.export import to_onnx
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.pieces.partition import Partition, build_piece, partition_graph
from sluice.runtime.trt import build
from sluice.runtime.trt.build import build_engine, find_tensorrt, is_rtx, make_builder

RESULT = Path("benchmarks/results/kernels-rtx-cpu.json")
BATCH = 8
CHOSEN = ("resnet20", "mobilenet_v2", "resnet50", "se_resnet", "crepe_tiny", "densenet", "vgg16_bn")
PRECISIONS = ("fp16", "fp32")
# The builder's own list of an engine's layers; an engine can only be inspected where a GPU is.
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+),", re.MULTILINE)


class Counter:
    """Builds engines and counts the kernels that the builder lists."""

    def __init__(self) -> None:
        self.trt = find_tensorrt()
        if not is_rtx(self.trt):
            sys.exit("this needs TensorRT-RTX, which lists kernels without a GPU; install tensorrt-rtx-cu13-libs")
        self.said: list[str] = []
        said = self.said

        class Listener(self.trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if message.startswith("Layers:"):
                    said.append(message)

            def reason(self) -> str:
                return ""

        listener = Listener()
        build.listener = lambda trt: listener  # type: ignore[assignment]
        self.builder = make_builder(self.trt)

    def kernels(self, model: onnx.ModelProto, *, part: bool) -> list[str]:
        """Names of the kernels, in execution order."""
        self.said.clear()
        build_engine(self.trt, model, builder=self.builder, part=part)
        return [match["name"] for match in LAYER.finditer(self.said[-1])]


def moves(kernels: Sequence[str]) -> int:
    """How many of them only lay a tensor out anew."""
    return sum(bool(re.match(r"__myl_Tran_|Reformat", name)) for name in kernels)


def row(name: str, precision: str, counter: Counter) -> dict[str, Any]:
    """The counts of one network."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = to_onnx(network.make().eval(), (torch.randn(BATCH, *network.shape),))
    cut = partition_graph(model, BATCH)
    whole = counter.kernels(to_precision(cut.model, precision, target="tensorrt"), part=False)
    found = {part: _of_pieces(cut, precision, counter, part) for part in (True, False)}
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


def _of_pieces(cut: Partition, precision: str, counter: Counter, part: bool) -> list[list[str]]:
    """Kernels by piece; equal pieces are built once."""
    known: dict[str, list[str]] = {}
    for piece in cut.pieces:
        if piece.key not in known:
            model = to_precision(build_piece(cut, piece, cut.dense), precision, part=True, target="tensorrt")
            known[piece.key] = counter.kernels(model, part=part)
    return [known[piece.key] for piece in cut.pieces]


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    print("network, precision        engine  pieces  with plain borders  ratio  (kernels, of TensorRT-RTX on a CPU)")
    for label, found in rows.items():
        numbers = f"{found['engine']:6}  {found['kernels']:6}  {found['plain_borders']:18}  {found['ratio']:5.2f}"
        print(f"{label:24}  {numbers}")
    ratios = [found["ratio"] for found in rows.values()]
    last = {"worst_ratio": max(ratios), "median_ratio": statistics.median(ratios)}
    print(json.dumps(last | {"median_abs_err": None, "p95_abs_err": None}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=CHOSEN, choices=sorted(NETWORKS))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--show", action="store_true", help="print the committed result")
    asked = parser.parse_args(arguments)
    rows: dict[str, Any] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if not asked.show:
        counter = Counter()
        for name in asked.networks:
            for precision in asked.precisions:
                if f"{name} {precision}" not in rows:
                    rows[f"{name} {precision}"] = row(name, precision, counter)
                    head = {"by": f"TensorRT-RTX {counter.trt.__version__} on a CPU, without a GPU", "batch": BATCH}
                    RESULT.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
