"""Random configurations that obey the rules; the engines of a complete table are in some of them.

1. *Widths and ranks* share a tendency per plan, so that slim and wide networks occur, and each site draws around it.
2. *Switches* are set one after another. A tendency per plan says how many layers are to leave their dense state, so
   that nearly dense and heavily restructured plans both occur. Rules take turns in random order: one that is not yet
   settled prefers the switch that is set in the dense network, or else, if its layer is to leave, the others in random
   order. A switch of k rules has so k chances to come first, and one that covers several layers is not outbid by those
   that cover one.
3. The values that a choice implies under the rules are settled at once (bounds propagation), and a choice that leaves
   some rule without a solution is taken back. So the search is complete: every state that obeys the rules is the first
   choice under some order and some tendency, and where none is found there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sluice.core.latency import LatencyModel, Rule

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
    found = _search(model, _preferences(model, rng))
    if found is None:
        raise RuntimeError(f"the model's {len(model.rules)} rules exclude every configuration")
    return found


def _preferences(model: LatencyModel, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Rule 2: switches and the values that they would have, those that come first first."""
    leaving = rng.uniform()
    wanted: list[tuple[str, int]] = []
    # Rules of total 0 tie switches together and leave nothing to compete for.
    competing = [rule for rule in model.rules if rule.total]
    for index in rng.permutation(len(competing)):
        names = [name for name, _ in competing[index].coefs]
        others = [names[k] for k in rng.permutation(len(names)) if not model.dense[names[k]]]
        dense = [name for name in names if model.dense[name]]
        order = [*others, *dense] if rng.uniform() < leaving else [*dense, *others]
        wanted += [(name, 1) for name in order]
    bound = {name for name, _ in wanted}
    for name in model.levels:
        if name in model.switches and name not in bound:
            usual = model.dense[name]
            wanted.append((name, 1 - usual if rng.uniform() < leaving else usual))
    return wanted


def _search(model: LatencyModel, wanted: Sequence[tuple[str, int]]) -> dict[str, int] | None:
    """The first solution of the rules in the order of ``wanted``, depth first; None where there is none."""
    rules_of: dict[str, list[Rule]] = {}
    for rule in model.rules:
        for name, _ in rule.coefs:
            rules_of.setdefault(name, []).append(rule)
    values = {name: model.levels[name][0] for name in model.switches if len(model.levels[name]) == 1}
    settled: list[str] = []  # in the order in which the search settled them

    def consistent(todo: Sequence[Rule]) -> bool:
        """Settle the values that follow from ``todo``; whether no rule is broken."""
        queue = list(todo)
        while queue:
            rule = queue.pop()
            free = [(name, coef) for name, coef in rule.coefs if name not in values]
            left = rule.total - sum(coef * values[name] for name, coef in rule.coefs if name in values)
            low = sum(min(coef, 0) for _, coef in free)
            high = sum(max(coef, 0) for _, coef in free)
            if not low <= left <= high:
                return False
            for name, coef in free:
                possible = [v for v in (0, 1) if low - min(coef, 0) <= left - coef * v <= high - max(coef, 0)]
                if not possible:
                    return False
                if len(possible) == 1:
                    values[name] = possible[0]
                    settled.append(name)
                    queue += rules_of[name]
                    queue.append(rule)
                    break  # the bounds of the others have changed
        return True

    if not consistent(model.rules):
        return None
    choices: list[tuple[int, int, bool]] = []  # (position in wanted, length of settled before, whether taken back)
    position = 0
    while position < len(wanted):
        name, value = wanted[position]
        if name in values:
            position += 1
            continue
        choices.append((position, len(settled), False))
        values[name] = value
        settled.append(name)
        while not consistent(rules_of.get(name, ())):
            while choices and choices[-1][2]:
                choices.pop()
            if not choices:
                return None
            position, length, _ = choices.pop()
            for gone in settled[length:]:
                del values[gone]
            del settled[length:]
            choices.append((position, length, True))
            name, value = wanted[position]
            values[name] = 1 - value
            settled.append(name)
        position += 1
    return values
