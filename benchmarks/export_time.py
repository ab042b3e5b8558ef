"""Our file of a dense network against the files of plain ``torch.onnx.export``, on ONNX Runtime CPU.

    python -m benchmarks.export_time [--networks resnet20 ...]
    python -m benchmarks.export_time --show

Three files of every reference network: ours as it is deployed, plain export (``dynamo=True``) and the older one
(``dynamo=False``). Their engines are timed in turns, one thread, three times, each time built anew. Told are our time
as a share of the faster of the other two, the median of the three, and the operators whose numbers differ between the
files. Constants and identities are not counted: engines have none.

Last line: JSON with ``worst, median`` of these shares.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch

from benchmarks.fidelity_results import BATCHES
from benchmarks.fidelity_runs import NETWORKS
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.onnx_file import finalize, quiet
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.timing.measure import measure
from sluice.runtime.ort.cpu import OrtRunner

RESULT = Path("benchmarks/results/export-time-ort-cpu.json")
REPEATS, BURSTS = 3, 120
FREE = ("Constant", "Identity")


def files(name: str, batch: int) -> dict[str, onnx.ModelProto]:
    """Ours and plain exports of one network; an exporter that refuses it is left out."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, inputs = network.make().eval(), (torch.randn(batch, *network.shape),)
    made = {"ours": to_precision(finalize(to_onnx(model, inputs)), "fp32")}
    for label, dynamo in (("plain", True), ("older", False)):
        with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "plain.onnx"
            try:
                torch.onnx.export(model, inputs, path, dynamo=dynamo, verbose=False)
            except Exception as error:  # whatever a plain export dies of, it is no reference then
                print(f"{name}: {label} export fails: {error}", file=sys.stderr)
                continue
            made[label] = onnx.load(path)
    return made


def row(name: str) -> dict[str, object]:
    """One network; ``share`` is our time by that of the faster other file."""
    batch = BATCHES.get(name, 8)
    made, runner = files(name, batch), OrtRunner()
    ratios: dict[str, list[float]] = {label: [] for label in made if label != "ours"}
    for repeat in range(REPEATS):
        sessions = [runner.build(model, batch=batch) for model in made.values()]
        found = measure(sessions, min_bursts=BURSTS, rng=np.random.default_rng(repeat))
        times = dict(zip(made, (one.ms for one in found), strict=True))
        for label, values in ratios.items():
            values.append(times["ours"] / times[label])
    kinds = {label: collections.Counter(node.op_type for node in model.graph.node) for label, model in made.items()}
    shares = {label: float(np.median(values)) for label, values in ratios.items()}
    return {"network": name, "share": max(shares.values()), "shares": shares, "operators": kinds}


def differing(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """The operators whose numbers differ between files, with the number in every file, in their order."""
    names = sorted({name for counts in kinds.values() for name in counts} - set(FREE))
    rows = {name: [counts.get(name, 0) for counts in kinds.values()] for name in names}
    told = [f"{name} {'/'.join(map(str, counts))}" for name, counts in rows.items() if len(set(counts)) > 1]
    return f"{'/'.join(kinds)}: {', '.join(told)}" if told else "the same operators"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--show", action="store_true", help="print the committed result")
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["networks"] if options.show else []
    for name in [] if options.show else options.networks:
        rows.append(row(name))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for one in rows:
        shares = "  ".join(f"{label} {share:.3f}" for label, share in one["shares"].items())
        print(f"{one['network']:<14} {one['share']:.3f}  {shares}")
        print(f"{'':<14} {differing(one['operators'])}")
    worst = [float(one["share"]) for one in rows]
    total = {"worst": max(worst), "median": float(np.median(worst))}
    if not options.show and options.networks == list(NETWORKS):
        RESULT.write_text(json.dumps({"networks": rows, **total}, indent=1) + "\n")
    print(json.dumps(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
