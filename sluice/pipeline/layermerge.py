"""LayerMerge on its own: the dynamic programme over the segments of every chain (Kim et al. 2024).

With dense widths the milliseconds of the latency model are a sum over the states of the layers, but for the cache
penalty. So every segment has milliseconds of its own, and `sluice.solver.dynamic_program` chooses the tiling: exact for
the sum, in one pass for all budgets. Where the cache penalty makes a plan miss its target, the programme runs again
with the missed milliseconds taken off the target. Without the penalty it chooses the segments that the joint solver
would choose. It can do one thing more: a *bonus* per segment, the explicit form of the authors' objective, favours
keeping activations. The rehearsal decides between several bonuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.latency import LatencyModel
from sluice.core.plan import Merge
from sluice.passes.cut.resolve import make_plan
from sluice.pipeline.problem import Problem, Solution
from sluice.solver.decide import Choice, least_ms, restricted, tightened, unreachable
from sluice.solver.dynamic_program import Entry, solve
from sluice.solver.options import chosen_edits, dense_switch

__all__ = ["BONUSES", "DepthProblem"]

BONUSES = (0.0, 0.5, 1.0)  # in units of the mean loss of a segment
LEVELS = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class DepthProblem(Problem):
    """A problem about merges alone, solved by the dynamic programme."""

    bonus: float = 0.0

    def choose(self, latency: LatencyModel, target_ms: float, near: Mapping[str, int] | None = None) -> Choice:
        model = restricted(latency, self.sites)
        return tightened(target_ms, lambda asked: self._tiled(model, asked))

    def solution(self, choice: Choice) -> Solution:
        edits = chosen_edits(self.profile.options, choice.widths)
        return Solution(choice, {}, make_plan(self.analysis, {}, self.inputs, edits))

    def _tiled(self, model: LatencyModel, target_ms: float) -> Choice:
        merges = self.profile.options.merges
        order = _order(merges, [rule.coefs[0][0].removesuffix("|dense") for rule in model.rules])
        alone = {layer: _alone_ms(model, layer) for layer in order}
        fixed = model.dense_ms() - sum(alone.values())
        entries = [Entry(k, k + 1, dense_switch(layer), 0.0, ms) for k, (layer, ms) in enumerate(alone.items())]
        prices = {switch: float(self.losses[switch][1]) for switch in merges if len(model.levels[switch]) > 1}
        for switch, loss in prices.items():
            layers = merges[switch].layers
            ms = model.ms(_merged(model, [switch])) - model.dense_ms() + sum(alone[layer] for layer in layers)
            start = order.index(layers[0])
            entries.append(Entry(start, start + len(layers), switch, -loss, ms))
        most = max(model.dense_ms(), target_ms) - fixed
        front = solve(entries, len(order), most, LEVELS, self._bonus(prices))
        # Milliseconds are rounded up to the grid's unit; the last unit per segment must not make a budget unreachable.
        room = max(target_ms - fixed, min(front.least_ms, target_ms - fixed + len(order) * most / LEVELS))
        if front.least_ms > room:
            raise unreachable(target_ms, least_ms(model).promised_ms, model.dense_ms(), methods=["merge"])
        chosen = [str(entry.key) for entry in front.at(room).entries if entry.key in merges]
        widths = _merged(model, chosen)
        return Choice(widths, model.ms(widths), sum(prices[c] for c in chosen), 1.0, 0.0, 0.0)

    def _bonus(self, prices: Mapping[str, float]) -> float:
        return self.bonus * float(np.mean(list(prices.values()))) if prices else 0.0


def _merged(model: LatencyModel, switches: Sequence[str]) -> dict[str, int]:
    """The dense configuration with these merges in place of their layers."""
    widths = dict(model.dense)
    for rule in model.rules:
        names = {name for name, _ in rule.coefs}
        for switch in names.intersection(switches):
            widths.update(dict.fromkeys((n for n in names if n.endswith("|dense")), 0) | {switch: 1})
    return widths


def _alone_ms(model: LatencyModel, layer: str) -> float:
    """Milliseconds of everything that exists because this layer is dense."""
    return model.dense_ms() - model.ms({**model.dense, dense_switch(layer): 0})


def _order(merges: Mapping[str, Merge], known: Sequence[str]) -> list[str]:
    """The layers that merges name, chain by chain, each in order."""
    chains: dict[str, set[str]] = {}
    for merge in merges.values():
        joined = set(merge.layers).union(*(chains.get(layer, set()) for layer in merge.layers))
        chains.update(dict.fromkeys(joined, joined))
    position = {layer: index for index, layer in enumerate(known)}
    found: list[str] = []
    for layer in sorted(chains, key=position.__getitem__):
        if layer not in found:
            found += sorted(chains[layer], key=position.__getitem__)
    return found
