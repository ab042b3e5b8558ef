"""Random configurations that obey the rules: what calibration builds engines of.

1. *Widths and ranks* share a tendency per plan, so that slim and wide networks occur, and each site draws around it.
2. *Switches* are the solution of a random linear objective over the rules. A tendency per plan says how many layers
   are to leave their dense state, so that nearly dense and heavily restructured plans both occur: a switch that is set
   in the dense network attracts with one point, or repels with one if its layer is to leave. Any other switch attracts
   with a uniform share of as many points as it has rules, or one that covers several layers would seldom outbid those
   that cover one. Under exactly-one rules every state is so the only optimum of some objectives: dense switches that
   stay and nearly full shares for the others that are set, next to nothing for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sluice.latency import LatencyModel

__all__ = ["random_configuration"]


def random_configuration(model: LatencyModel, rng: np.random.Generator) -> dict[str, int]:
    """One of its levels for every site, drawn such that all rules hold."""
    tendency = rng.uniform(0.25, 1.0)
    widths = {}
    for group, levels in model.levels.items():
        if group not in model.switches:
            position = np.clip(tendency + rng.uniform(-0.5, 0.5), 0.0, 1.0)
            widths[group] = int(levels[min(int(position * len(levels)), len(levels) - 1)])
    if model.switches:
        widths |= _random_switches(model, rng)
    return {group: widths[group] for group in model.levels}


def _random_switches(model: LatencyModel, rng: np.random.Generator) -> Mapping[str, int]:
    names = [s for s in model.levels if s in model.switches]
    column = {s: k for k, s in enumerate(names)}
    leaving = rng.uniform()
    # Rules of total 0 tie switches together and leave nothing to compete for.
    rules_of = Counter(s for rule in model.rules if rule.total for s in dict(rule.coefs))
    attraction = []
    for switch in names:
        toward = -1.0 if rng.uniform() < leaving else 1.0
        share = rng.uniform(0.0, rules_of[switch]) if rules_of[switch] else -toward
        attraction.append(toward if model.dense[switch] else share)
    entries = [(row, column[s], coef) for row, rule in enumerate(model.rules) for s, coef in rule.coefs]
    constraints = []
    if entries:
        at, of, coefs = (np.asarray(values) for values in zip(*entries, strict=True))
        matrix = csr_array((coefs.astype(float), (at, of)), shape=(len(model.rules), len(names)))
        totals = np.asarray([rule.total for rule in model.rules], float)
        constraints = [LinearConstraint(matrix, totals, totals)]
    bounds = Bounds([model.levels[s][0] for s in names], [model.levels[s][-1] for s in names])
    result = milp(-np.asarray(attraction), integrality=np.ones(len(names)), bounds=bounds, constraints=constraints)
    if result.x is None:
        raise RuntimeError(f"the model's {len(model.rules)} rules exclude every configuration ({result.message})")
    return {s: int(v) for s, v in zip(names, result.x.round(), strict=True)}
