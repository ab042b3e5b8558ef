"""The summary of a run of the profiler, as data and as lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sluice.core.address import LOCAL
from sluice.core.deployment import ON_CPU
from sluice.profiler.profile import ShardDone
from sluice.profiler.view import Profile
from sluice.runtime.base import nvidia

__all__ = ["profile_summary", "shard_summary"]


def profile_summary(measured: Profile, methods: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Dense and least milliseconds, the error of the calibration, and the edits on offer.

    scipy's solver finds the least reachable time; without scipy that time is None and said to be unknown.
    """
    offered = measured.options
    ranks = {option.rank for option in offered.ranks}
    least, cover = _least(measured, methods), measured.coverage
    model, kept = measured.latency, measured.bench.kept
    data: dict[str, Any] = {
        "dense_ms": model.dense_ms(),
        "least_ms": None if least is None else least[0],
        "least_ms_alone": None if least is None else least[1],
        "error": dict(model.error),
        "points": cover.points,
        "complete": cover.complete,
        "disturbed": cover.disturbed,
        "engines_built": kept.engines,
        "cache_mb_per_build": kept.mb_per_build,
        "levels": {g: list(v) for g, v in model.levels.items() if g not in model.switches and g not in ranks},
        "ranks": {option.switch: list(model.levels[option.rank]) for option in offered.ranks},
        "blocks": [drop.name for drop in offered.drops.values()],
        "merges": list(offered.merges),
        "refused": measured.refused,
        "kernels_in_several": [sorted(kernel) for kernel in measured.partition.in_several],
    }
    dense = data["dense_ms"]
    reached = "least reachable not known without scipy"
    if least is not None:
        reached = f"least reachable {least[0]:.4g} ms ({least[0] / dense:.1%})"
    lines = [
        f"dense {dense:.4g} ms, {reached}",
        f"calibration on {model.error['n']:.0f} engines: median error {model.error['median_abs_err']:.1%}, 95th "
        f"percentile {model.error['p95_abs_err']:.1%}, rank correlation {model.error.get('spearman', 1.0):.3f}",
        f"{cover.points} points measured, a complete table has {cover.complete}; what else a plan needs is measured "
        "when it is asked for",
        *(f"  by {name} alone {ms:.4g} ms ({ms / dense:.1%})" for name, ms in (least[1] if least else {}).items()),
        "widths on offer",
        *(f"  {group}: {_words(widths)}" for group, widths in data["levels"].items()),
    ]
    if kept.bytes:
        lines.insert(3, f"{kept.engines} engines built, {kept.mb_per_build:.2g} MB of timing cache written for each")
    left_out = [f"left out: {part}, {why}" for part, why in measured.refused.items()]
    lines[2:2] = [
        *left_out,
        *_in_several(data["kernels_in_several"]),
        *_remarks(cover.disturbed),
        *_gpu(measured, data),
    ]
    if offered.ranks:
        lines += [f"ranks on offer: {len(ranks)}", *(f"  {s}: {_words(v)}" for s, v in data["ranks"].items())]
    if offered.drops:
        lines += [f"blocks that can be dropped: {len(offered.drops)}", *(f"  {name}" for name in data["blocks"])]
    if offered.merges:
        lines += [f"runs worth merging: {len(offered.merges)}", *(f"  {name}" for name in data["merges"])]
    return data, lines


def shard_summary(done: ShardDone) -> tuple[dict[str, Any], list[str]]:
    """The points that a shard measured, and what to do next."""
    lines = [f"shard {done.shard}: {done.points} points and {done.engines} engines measured, its share is done"]
    lines += _remarks(done.disturbed)
    if done.complete:
        lines.append("all points are there; engines of other shards, if any, come with `sluice table merge`")
    else:
        lines.append("merge the tables of all shards (`sluice table merge`), then profile on the result to finish")
    return {**asdict(done), "shard": str(done.shard)}, lines


def _gpu(measured: Profile, data: dict[str, Any]) -> list[str]:
    """The state of the GPU that was measured on, where it is here and its driver tells."""
    state = nvidia.gpu_state() if measured.target not in ON_CPU and measured.address in ("", LOCAL) else None
    if state is None:
        return []
    data["gpu"] = asdict(state)
    return state.lines()


def _in_several(kernels: Sequence[Sequence[str]]) -> list[str]:
    if not kernels:
        return []
    return [
        f"{len(kernels)} kernels of engines compute operators of several pieces that may change apart, such as "
        f"{' + '.join(kernels[0])}; the pieces count more kernels than the engine runs, which calibration makes up for"
    ]


def _remarks(disturbed: int) -> list[str]:
    if not disturbed:
        return []
    return [
        f"{disturbed} points are uncertain, the machine was busy; `sluice table forget` makes the next profile take "
        f"them anew (if the machine is slower for good by now, begin a new table)"
    ]


def _least(measured: Profile, methods: Sequence[str]) -> tuple[float, dict[str, float]] | None:
    """The least milliseconds with all methods together, and with each of several alone."""
    try:
        from sluice.profiler.need import Solve, by_need
        from sluice.solver.decide import Choice, least_ms, restricted
    except ImportError:
        return None

    def least_with(names: Sequence[str]) -> Solve:
        sites = measured.options.sites(measured.latency, names)
        return lambda latency, near: least_ms(restricted(latency, sites))

    each = [[name] for name in methods] if len(methods) > 1 else []
    found = [choice for choice in by_need(measured, [least_with(n) for n in (methods, *each)])]
    together, *alone = [choice.promised_ms for choice in found if isinstance(choice, Choice)]
    return together, dict(zip(methods, alone, strict=False))


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))
