"""The figures of a finished compression: parity of its forms, sizes, and the report that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import onnx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sluice.budget import Budget, parse_budget
from sluice.passes.capture import MARK, Inputs, normalize_inputs
from sluice.profiler.profile import Profile
from sluice.report import GroupRow, PieceRow, Report
from sluice.runtime.compare import relative_error
from sluice.verify import Settled

__all__ = ["captured_inputs", "count_parameters", "make_report", "parity"]


def captured_inputs(gm: fx.GraphModule) -> Inputs:
    """The example inputs a graph was captured with."""
    mark = gm.meta[MARK]
    return mark["kwargs"] if mark["kwargs"] else mark["args"]


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parity(
    closed: nn.Module, slim: nn.Module, engine: onnx.ModelProto, captured: fx.GraphModule, measured: Profile
) -> float:
    """Largest relative difference between closed, slim torch and slim ONNX on the example inputs."""
    args, kwargs = normalize_inputs(captured_inputs(captured))
    with torch.no_grad():
        want = [t.cpu().numpy() for t in pytree.tree_leaves(closed(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        have = [t.cpu().numpy() for t in pytree.tree_leaves(slim(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    feeds = {info.name: t.cpu().numpy() for info, t in zip(engine.graph.input, tensors, strict=True)}
    outputs = list(measured.runner().build(engine).run(feeds).values())
    return max(max(relative_error(h, w), relative_error(o, w)) for h, o, w in zip(have, outputs, want, strict=True))


def make_report(
    measured: Profile, settled: Settled, *, dense_ms: float, slim_ms: float, worst: float, budget: Budget,
    params: tuple[int, int], macs: tuple[int, int], metrics: tuple[float | None, float | None],
    frozen: Mapping[str, str], seconds: float,
) -> Report:  # fmt: skip
    latency, widths = measured.latency, dict(settled.choice.widths)
    descriptions = {p.name: p.description for p in measured.dissection.pieces}
    rows = [
        PieceRow(
            t.name, descriptions.get(t.name, "joint"), 1, t.weight * t.at(latency.dense), t.weight * t.at(widths),
            tuple(int(e.at(latency.dense)) for e in t.extents), tuple(int(e.at(widths)) for e in t.extents),
        )
        for t in latency.terms
    ]  # fmt: skip
    return Report(
        budget_ms=parse_budget(budget.target, dense_ms),
        dense_ms=dense_ms,
        promised_ms=settled.choice.promised_ms,
        measured_ms=slim_ms,
        parity_max_rel=worst,
        params_dense=params[0],
        params_slim=params[1],
        macs_dense=macs[0],
        macs_slim=macs[1],
        metric_dense=metrics[0],
        metric_slim=metrics[1],
        seconds=seconds,
        rounds=settled.rounds,
        fingerprint=asdict(measured.fingerprint),
        pieces=tuple(rows),
        groups=tuple(GroupRow(g, n, widths[g]) for g, n in latency.dense.items()),
        skipped=tuple(frozen.items()),
        error=dict(latency.error),
    )
