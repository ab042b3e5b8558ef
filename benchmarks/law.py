"""What the cost law is worth: its estimates and bounds against a real table that was filled beforehand.

    python -m benchmarks.law

``benchmarks/results/table-resnet20.db.xz`` is the table of ResNet-20 for digits, batch 8, one core of an AMD EPYC, all
methods, as profiling filled it before it measured by need. The dense points are given to the law, and of the others a
share that is drawn at random, three times. Told are, of all points that were not given, the median error of the
estimates, and how many take less than their bound, by more than 5%.

Last line: JSON by share, the mean of the draws.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from sluice.models import resnet20_mnist
from sluice.models.mnist import load_digits
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.capture import capture
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.assemble import known_of
from sluice.profiler.fit.cost_law import Known, fit_law
from sluice.profiler.pieces.net_time import known_call
from sluice.profiler.pieces.partition import Piece, partition_static, static_at, with_small
from sluice.profiler.survey import closed_bench, survey
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import METHODS

TABLE = Path("benchmarks/results/table-resnet20.db.xz")
SHARES, DRAWS, BATCH = (0.0, 0.03, 0.1, 0.2), 3, 8
LEAST_MS = 1e-4  # a smaller time is noise


def known_points() -> tuple[dict[str, Known], dict[str, np.ndarray]]:
    """All points of the table by piece, and which of them are dense."""
    images = load_digits().test_x[:BATCH]
    # The table was filled before pools to one position were written as such.
    with mock.patch("sluice.passes.cut.export.with_global_pools", lambda model: model):
        model = to_onnx(capture(resnet20_mnist(), images), images)
    static = static_at(model, BATCH)
    space = find_search_space(read_onnx(static), ())
    partition = with_small(partition_static(static, space.analysis, BATCH), model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.db"
        path.write_bytes(lzma.decompress(TABLE.read_bytes()))
        with LatencyTable.open(path) as table:
            layout = survey(partition, closed_bench(table), methods=METHODS, space=space)
            known = known_call(table)
            assert known is not None
            call_ms = known.ms
            pieces = [slot for slot in layout.slots if isinstance(slot.part, Piece)]
            found = {slot.part.key: known_of(slot, table, call_ms) for slot in pieces}
    sizes = {p.key: np.array([float(e.at(partition.dense)) for e in p.extents]) for p in partition.pieces}
    found = {key: known for key, known in found.items() if len(known.ms)}
    none = {key: np.zeros(len(known.ms), bool) for key, known in found.items()}
    dense = {key: (found[key].points == size).all(axis=1) for key, size in sizes.items()}
    return found, {**none, **dense}


def figures(found: dict[str, Known], dense: dict[str, np.ndarray], share: float, seed: int) -> dict[str, float]:
    """The figures of one draw, fractions."""
    rng = np.random.default_rng(seed)
    given = {}
    for key, one in found.items():
        chosen = dense[key] | (rng.random(len(one.ms)) < share)
        given[key] = Known(key, one.work, one.points[chosen], one.ms[chosen])
    law = fit_law(list(given.values()))
    errors, below = [], []
    for key, one in found.items():
        told = law.estimate(given[key], one.points)
        real = np.maximum(one.ms, LEAST_MS)
        errors += list((np.abs(np.log(told.ms / real)))[~told.measured])
        below += list((told.bound > 1.05 * real)[~told.measured])
    points = sum(len(one.ms) for one in given.values())
    return {"points": points, "median_abs_err": float(np.median(errors)), "below_bound": float(np.mean(below))}


def main() -> int:
    found, dense = known_points()
    print(f"{sum(len(one.ms) for one in found.values())} points of {len(found)} pieces")
    result = {}
    for share in SHARES:
        draws = [figures(found, dense, share, seed) for seed in range(DRAWS)]
        print(share, json.dumps(draws))
        result[str(share)] = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
