"""Seconds that the solver takes on a made-up network of the size of MobileNetV2 with every kind of site.

    python -m benchmarks.solver [--shares 0.25 0.5 0.75] [--gap 0.01] [--seeds 3]

Inverted residuals with residual streams that blocks share, staircases in every width, factorizations of pointwise
layers, dropped blocks, merged segments, joints; nothing is measured. Last line: JSON, seconds and gaps by target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Rule, Term
from sluice.solver.decide import decide, least_ms

# Expansion, width, repeats and side of the feature map: deeper than the original, 33 groups.
STAGES = (
    *((6, 16, 2, 56), (6, 24, 3, 56), (6, 32, 4, 28), (6, 64, 5, 14)),
    *((6, 96, 4, 14), (6, 160, 4, 7), (6, 320, 2, 7)),
)
FACTORIZED = 35
MERGES = 170
LONGEST = 5


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    c_in: str
    c_out: str
    kernel: int
    depthwise: bool
    side: int


def network(droppable: int = 10) -> tuple[list[Layer], dict[str, int], list[list[Layer]]]:
    """Layers in order, dense widths, and the residual blocks that may go."""
    layers, dense, blocks, stream = [], {"stem": 32}, [], "stem"
    for stage, (expand, width, repeats, side) in enumerate(STAGES):
        for repeat in range(repeats):
            name = f"{stage}.{repeat}"
            out = f"stream{stage}"
            dense[f"hidden{name}"] = expand * dense[stream]
            dense[out] = width
            block = [
                Layer(f"{name}.expand", stream, f"hidden{name}", 1, False, side),
                Layer(f"{name}.depthwise", f"hidden{name}", f"hidden{name}", 3, True, side),
                Layer(f"{name}.project", f"hidden{name}", out, 1, False, side),
            ]
            layers += block
            if repeat:
                blocks.append(block)
            stream = out
    dense["head"] = 1280
    layers.append(Layer("head", stream, "head", 1, False, 7))
    return layers, dense, blocks[:: max(1, len(blocks) // droppable)][:droppable]


def levels_of(size: int, rng: np.random.Generator) -> tuple[int, ...]:
    count = min(int(rng.integers(7, 13)), size // 4)
    return tuple(sorted({max(1, int(size * (k + 1) / count) // 4 * 4) for k in range(count - 1)} | {size}))


def milliseconds(values: tuple[float, ...], per_unit: float, rng: np.random.Generator) -> float:
    """A staircase of eight channels a step, an overhead, and the noise of a measurement."""
    work = per_unit * float(np.prod([np.ceil(v / 8) * 8 for v in values]))
    return (0.01 + work) * float(rng.uniform(0.97, 1.03))


def table(
    name: str, groups: tuple[str, ...], levels: dict[str, tuple[int, ...]], per_unit: float, when: tuple[str, ...],
    rng: np.random.Generator, weight: float = 1.0,
) -> Term:  # fmt: skip
    """A term on at most seven knots an axis."""
    distinct = tuple(dict.fromkeys(groups))
    knots = [np.asarray(levels[g], float) for g in distinct]
    knots = [k[np.unique(np.linspace(0, len(k) - 1, 7).round().astype(int))] for k in knots]
    points = itertools.product(*knots)
    at = [milliseconds(tuple(dict(zip(distinct, p, strict=True))[g] for g in groups), per_unit, rng) for p in points]
    extents = tuple(Extent(((g, 1),)) for g in distinct)
    shape = tuple(len(k) for k in knots)
    return Term(name, extents, tuple(knots), np.asarray(at).reshape(shape), weight, when)


def synthetic(seed: int) -> tuple[LatencyModel, dict[str, np.ndarray]]:
    """The model and the losses of all sites."""
    rng = np.random.default_rng(seed)
    layers, dense, blocks = network()
    widths = dict(dense)
    levels = {g: levels_of(n, rng) for g, n in dense.items()}
    terms: list[Term] = []
    losses: dict[str, np.ndarray] = {}
    makers: dict[str, list[str]] = {}  # switches under which a layer's output exists
    covers: dict[str, list[str]] = {layer.name: [f"dense {layer.name}"] for layer in layers}
    for group in widths:
        scores = np.sort(rng.gamma(0.3, size=64))
        amplitude = np.concatenate([[0.0], np.cumsum(np.sqrt(scores))])
        kept = np.asarray(levels[group]) / widths[group]
        losses[group] = np.interp(1 - kept, np.linspace(0, 1, 65), amplitude) ** 2 * 0.2 / amplitude[-1]

    def switch(name: str, loss: float, on: int = 0) -> str:
        dense[name], levels[name] = on, (0, 1)
        losses[name] = np.asarray([0.0, loss])
        return name

    for layer in layers:
        name, area = f"dense {layer.name}", layer.side**2 * 2e-8
        switch(name, 0.0, 1)
        groups = (layer.c_out,) if layer.depthwise else (layer.c_in, layer.c_out)
        per_unit = area * layer.kernel**2 * (4 if layer.depthwise else 1)
        terms.append(table(layer.name, groups, levels, per_unit, (name,), rng))
        terms.append(table(f"rest {layer.name}", (layer.c_out,), levels, area, (), rng))
        makers[layer.name] = [name]
    for layer in [layer for layer in layers if not layer.depthwise][:FACTORIZED]:
        area, full = layer.side**2 * 2e-8, min(widths[layer.c_in], widths[layer.c_out])
        name, rank = f"factorized {layer.name}", f"rank {layer.name}"
        dense[rank], levels[rank] = full, tuple(sorted({max(1, full * k // 8) for k in (1, 2, 3, 4, 5)} | {full}))
        losses[rank] = (1 - np.asarray(levels[rank]) / full) ** 2 * rng.uniform(0.005, 0.1)
        covers[layer.name].append(switch(name, float(rng.uniform(0, 0.003))))
        makers[layer.name].append(name)
        terms.append(table(f"{layer.name} first", (layer.c_in, rank), levels, area, (name,), rng))
        terms.append(table(f"{layer.name} second", (rank, layer.c_out), levels, area, (name,), rng))
    for block in blocks:
        name = switch(f"drop {block[0].name}", float(rng.uniform(0.01, 0.2)))
        for layer in block:
            covers[layer.name].append(name)
    spans = [(i, i + n) for n in range(2, LONGEST + 1) for i in range(len(layers) - n)]
    for k in sorted(rng.choice(len(spans), size=min(MERGES, len(spans)), replace=False).tolist()):
        first, after = spans[k]
        run = layers[first:after]
        name = switch(f"merge {run[0].name}..{run[-1].name}", float(rng.uniform(0.005, 0.08) * len(run)))
        for layer in run:
            covers[layer.name].append(name)
        kernel = 1 + sum(layer.kernel - 1 for layer in run)
        per_unit = run[-1].side ** 2 * 2e-8 * kernel**2 * 0.6
        terms.append(table(name, (run[0].c_in, run[-1].c_out), levels, per_unit, (name,), rng))
        makers[run[-1].name].append(name)
    for layer in layers:
        area, when = layer.side**2 * 2e-8, tuple(makers[layer.name])
        terms.append(table(f"joint {layer.name}", (layer.c_out,), levels, area, when, rng, -0.4))
    rules = tuple(Rule(tuple((s, 1) for s in names)) for names in covers.values())
    switches = frozenset(s for s in dense if s.startswith(("dense ", "factorized ", "drop ", "merge ")))
    return LatencyModel(tuple(terms), dense, levels, 0.05, 1.02, rules=rules, switches=switches), losses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=60.0)
    options = parser.parse_args()
    found = []
    for seed in range(options.seeds):
        model, losses = synthetic(seed)
        started = time.perf_counter()
        least = least_ms(model, time_limit_s=options.time_limit)
        print(
            f"seed {seed}: {len(model.dense)} sites, {len(model.switches)} switches, {len(model.terms)} terms, "
            f"least {least.promised_ms / model.dense_ms():.1%} of dense in {time.perf_counter() - started:.1f} s",
            file=sys.stderr,
        )
        for share in options.shares:
            target = share * model.dense_ms()
            started = time.process_time()
            try:
                choice = decide(model, losses, target, gap=options.gap, time_limit_s=options.time_limit)
            except SluiceError as error:
                print(f"  {share:.0%}: {error}", file=sys.stderr)
                continue
            edits = [s for s in model.switches if choice.widths[s] and not model.dense[s]]
            kinds = {k: sum(s.startswith(k) for s in edits) for k in ("factorized", "drop", "merge")}
            row = {
                "seed": seed, "share": share, "seconds": choice.seconds, "cpu_seconds": time.process_time() - started,
                "gap": choice.gap, "loss": choice.loss,
            }  # fmt: skip
            print(f"  {share:.0%}: {row} {kinds}", file=sys.stderr)
            found.append(row)
    print(json.dumps({"solves": found, "worst_cpu_seconds": max((r["cpu_seconds"] for r in found), default=None)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
