"""Candidates of a portfolio beside the scenarios: what a price of single changes before training cannot see.

Plans of equal milliseconds differ in what training makes of them, and the price does not foresee it: over 24 plans of
one keyword spotter it ordered the final accuracy by a rank correlation of -0.5. So plans are spread, and the short
training of `sluice.training.rehearse` chooses.

1. *Perturbed prices*. The losses of a kind of change (widths, ranks, drops, merges) are multiplied by
   ``exp(N(0, KIND))``, those of every site by ``exp(N(0, SITE))`` on top. The solver then prefers other kinds.
2. *Uniform widths*. Every group keeps the same share of its channels, on the levels of the table: what a user without a
   solver would cut. The largest share within the target counts, and groups go one step beyond while that fits.
3. *Strata*. Two plans are of one stratum if they have as many layers merged, factorised and dropped, each in three
   classes: none, up to half of the layers with a weight, more.

Spread prices are those of SPDY (Frantar and Alistarh 2022), which searches over coefficients of layers; there the loss
of compensated networks judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.latency import LatencyModel
from sluice.core.plan import Plan
from sluice.pipeline.problem import Problem
from sluice.solver.decide import Choice, least_ms, restricted, unreachable
from sluice.solver.descent import loss_of
from sluice.solver.options import EditSpace

__all__ = ["UniformProblem", "perturbed", "stratum"]

KIND, SITE = 1.5, 1.0
Losses = Mapping[str, np.ndarray]


def perturbed(problem: Problem, seed: int = 0) -> Iterator[Problem]:
    """The problem under prices of rule 1, one draw after the other, for ever."""
    rng = np.random.default_rng(seed)
    kinds = {site: kind for kind, sites in _kinds(problem.profile.options, problem.losses).items() for site in sites}
    while True:
        shared = {kind: float(np.exp(KIND * rng.standard_normal())) for kind in sorted(set(kinds.values()))}
        factors = {site: shared[kinds[site]] * float(np.exp(SITE * rng.standard_normal())) for site in problem.losses}
        yield replace(problem, losses={site: factors[site] * values for site, values in problem.losses.items()})


@dataclass(frozen=True, slots=True, eq=False)
class UniformProblem(Problem):
    """A problem about widths alone, solved by rule 2."""

    def choose(self, latency: LatencyModel, target_ms: float, near: Mapping[str, int] | None = None) -> Choice:
        model = restricted(latency, self.sites)
        groups = {site: levels for site, levels in model.levels.items() if len(levels) > 1}

        def at(share: float) -> dict[str, int]:
            kept = {
                g: max((n for n in levels if n <= share * levels[-1]), default=levels[0])
                for g, levels in groups.items()
            }
            return {**model.dense, **kept}

        shares = sorted({level / levels[-1] for levels in groups.values() for level in levels})
        within = [share for share in shares if model.ms(at(share)) <= target_ms]
        if not within:
            raise unreachable(target_ms, least_ms(model).promised_ms, model.dense_ms(), methods=["filter"])
        widths = at(within[-1])
        beyond = at(next((share for share in shares if share > within[-1]), 1.0))
        for group in groups:
            wider = {**widths, group: beyond[group]}
            widths = wider if model.ms(wider) <= target_ms else widths
        losses = {site: values for site, values in self.losses.items() if site in groups}
        return Choice(widths, model.ms(widths), loss_of(model, losses, widths), within[-1], 0.0, 0.0)


def stratum(plan: Plan) -> tuple[int, int, int]:
    """Rule 3: the classes of merged, factorised and dropped layers."""
    layers = max(1, sum(name.endswith("weight") and len(shape) > 1 for name, shape in plan.fingerprint.items()))
    merged = sum(len(merge.layers) for merge in plan.merges)
    dropped = sum(param.endswith("weight") for drop in plan.drops for param in drop.params)
    first, second, third = (
        0 if not n else 1 if n <= layers / 2 else 2 for n in (merged, len(plan.factorizations), dropped)
    )
    return first, second, third


def _kinds(options: EditSpace, losses: Losses) -> dict[str, set[str]]:
    """The sites with losses, by kind of change."""
    ranks = {name for option in options.ranks for name in (option.switch, option.rank)} & losses.keys()
    drops, merges = options.drops.keys() & losses.keys(), options.merges.keys() & losses.keys()
    rest = losses.keys() - ranks - drops - merges
    return {"filter": set(rest), "rank": set(ranks), "block": set(drops), "merge": set(merges)}
