"""The figures of a finished compression that need no network: contributions of methods, times of pieces, the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from sluice.artifacts.engine_check import EngineCheck
from sluice.artifacts.report import Report
from sluice.artifacts.report_recovery import RecoveryRow
from sluice.artifacts.report_rows import JOINT, GroupRow, MethodRow, PieceRow, edit_rows
from sluice.core.latency import LatencyModel
from sluice.pipeline.pairs import PairTimes, is_faster
from sluice.pipeline.verify import VerifiedSolution
from sluice.profiler.view import Profile
from sluice.solver.options import METHODS, EditSpace

__all__ = ["contributions", "make_report", "piece_rows"]


def contributions(
    model: LatencyModel,
    options: EditSpace,
    configuration: Mapping[str, int],
    losses: Mapping[str, np.ndarray] | None = None,
    methods: Sequence[str] = METHODS,
) -> tuple[MethodRow, ...]:
    """The contribution of every method to a configuration.

    With ``w`` the configuration and ``w_m`` the same with the decisions of method m put back to dense (its widths at
    full size; for a rank, a dropped block or a merged run, every layer that it covers dense),

        saved_ms(m) = T(w_m) - T(w)                                                        [milliseconds]

    So ``saved_ms`` is the plan's saving less that of the plan without the method, not a share of the whole: where two
    methods shorten the same layers, their savings need not add up. A method that changes nothing has saved 0.

    Args:
        losses: of every level of every site (`sluice.pipeline.problem.Problem.losses`).
        methods: those that were asked for; others have no row.
    """
    ranks = {option.rank for option in options.ranks}
    chosen = {
        "filter": [g for g, n in model.dense.items() if g not in model.switches | ranks and configuration[g] < n],
        "rank": [option.switch for option in options.ranks if configuration.get(option.switch)],
        "block": [switch for switch in options.drops if configuration.get(switch)],
        "merge": [switch for switch in options.merges if configuration.get(switch)],
    }
    rank_of = {option.switch: option.rank for option in options.ranks}
    promised = model.ms(configuration)
    rows = []
    for method in methods:
        sites = chosen[method]
        priced = [s for site in sites for s in (site, rank_of.get(site)) if s is not None]
        # The rules of a switch name the layers that it covers, and the other states of these layers.
        covered = {n for rule in model.rules for n, _ in rule.coefs if any(s in dict(rule.coefs) for s in sites)}
        back = {**configuration, **{site: model.dense[site] for site in {*priced, *covered}}}
        known = losses is not None and set(priced) <= losses.keys()
        loss = (
            sum(float(losses[s][model.levels[s].index(configuration[s])]) for s in priced) if known and losses else None
        )
        rows.append(MethodRow(method, len(sites), model.ms(back) - promised if sites else 0.0, loss))
    return tuple(rows)


def piece_rows(
    latency: LatencyModel, widths: Mapping[str, int], descriptions: Mapping[str, str]
) -> tuple[PieceRow, ...]:
    """The pieces and joints of the dense network and of a configuration.

    Args:
        descriptions: of the dense network's pieces, by name, with the symbols of `sluice.profiler.pieces.identity` for
            sizes that vary; the rows have the dense sizes there.
    """
    places, rows = _places(latency, widths), []
    for term in latency.terms:
        if not (term.on(latency.dense) or term.on(widths)):
            continue
        before, after = (tuple(int(e.at(w)) for e in term.extents) for w in (latency.dense, widths))
        layer = next((places[s] for s in term.when if s in places), "")
        what = JOINT if term.weight < 0 else f"in place of {layer}" if layer else "in place of a layer"
        rows.append(PieceRow(
            term.name, _with_sizes(descriptions.get(term.name, what), before), 1,
            term.on(latency.dense) * term.weight * term.at(latency.dense),
            term.on(widths) * term.weight * term.at(widths), before, after, "" if term.weight < 0 else layer,
        ))  # fmt: skip
    again = latency.reload_ms(latency.dense), latency.reload_ms(widths)
    if any(again):
        rows.append(PieceRow("read again", "weights beyond what the caches hold", 1, *again, (), ()))
    return tuple(rows)


def _places(latency: LatencyModel, widths: Mapping[str, int]) -> dict[str, str]:
    """The layers that every switch stands for which the configuration turned, its own layer or a run of several."""
    places: dict[str, str] = {}
    for switch in sorted(s for s in latency.switches if widths[s] and not latency.dense[s]):
        rules = [dict(rule.coefs) for rule in latency.rules if switch in dict(rule.coefs)]
        covered = [name for coefs in rules for name in coefs if latency.dense[name] and not widths[name]]
        layers = [name.rpartition("|")[0].removesuffix(".weight") for name in covered]
        if layers:
            label = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
            places |= dict.fromkeys([*covered, switch], label)
    return places


def _with_sizes(description: str, sizes: Sequence[int]) -> str:
    """The description with numbers in place of ``2*e0+1*e1+3``."""

    def total(found: re.Match[str]) -> str:
        terms = [part.partition("*") for part in found[0].split("+")]
        return str(sum(int(count) * (sizes[int(symbol[1:])] if symbol else 1) for count, _, symbol in terms))

    return re.sub(r"\d+\*e\d+(\+\d+\*e\d+)*\+\d+", total, description)


def _finite(metric: float | None) -> float | None:
    """The figure of merit, None where it overflows: the report must be saved all the same."""
    return metric if metric is not None and math.isfinite(metric) else None


def make_report(
    measured: Profile, verified: VerifiedSolution, *, times: PairTimes, worst: float,
    params: tuple[int, int], macs: tuple[int, int], metrics: tuple[float | None, float | None, float | None],
    frozen: Mapping[str, str], seconds: float, losses: Mapping[str, np.ndarray] | None = None,
    readings: Sequence[tuple[str, float, tuple[float, ...]]] = (), recovery: RecoveryRow | None = None,
    plain: PairTimes | None = None, methods: Sequence[str] = METHODS, figure: str = "accuracy",
    outputs: EngineCheck | None = None,
) -> Report:  # fmt: skip
    """The report of a verified plan.

    Args:
        times: of the dense engine and of the file that is deployed.
        worst: largest relative difference between two forms of the slim network.
        params, macs: of the dense and of the slim network.
        metrics: of the dense and of the slim network, and of the file that is deployed.
        losses: of every level of every site.
        readings: of the rehearsed scenarios: name, promised milliseconds, held-out losses.
        recovery: how the slim network was trained, if it was.
        plain: plain export's file beside ours, if it was measured.
        methods: those that were asked for.
        figure: what the metrics are.
        outputs: the comparison of the deployed engine with fp32.
    """
    latency, widths, cover = measured.latency, dict(verified.choice.widths), measured.coverage
    descriptions = {p.name: p.description for p in measured.partition.pieces}
    return Report(
        budget_ms=times.budget_ms,
        dense_ms=times.dense_ms,
        promised_ms=verified.choice.promised_ms,
        measured_ms=times.slim_ms,
        parity_max_rel=worst,
        params_dense=params[0],
        params_slim=params[1],
        macs_dense=macs[0],
        macs_slim=macs[1],
        metric_dense=_finite(metrics[0]),
        metric_slim=_finite(metrics[1]),
        metric_deployed=_finite(metrics[2]),
        seconds=seconds,
        rounds=verified.rounds,
        fingerprint=asdict(measured.fingerprint),
        pieces=piece_rows(latency, widths, descriptions),
        groups=tuple(GroupRow(g, n, widths[g]) for g, n in measured.partition.dense.items()),
        skipped=tuple(frozen.items()),
        error=dict(latency.error),
        methods=contributions(latency, measured.options, widths, losses, methods),
        edits=edit_rows(verified.plan),
        readings=tuple(readings),
        points=cover.points,
        complete=cover.complete,
        disturbed=cover.disturbed,
        estimated=latency.share_estimated(widths),
        gap=verified.choice.gap,
        runs=times.runs,
        dense_runs=times.dense_runs,
        uncertainty=times.uncertainty,
        quiet=times.quiet,
        slower=times.slower,
        recovery=recovery,
        plain_ms=None if plain is None else plain.share * times.dense_ms,
        plain_uncertainty=None if plain is None else plain.uncertainty,
        from_plain=is_faster(plain),
        figure=figure,
        engine_error=None if outputs is None else _finite(outputs.error),
        engine_tolerance=None if outputs is None else outputs.tolerance,
    )
