"""The sites of a latency model as variables, its costs as tables over few of them, for `sluice.solver.elimination`.

1. A width is a variable over its levels.
2. An exactly-one rule is a variable over its switches, the *state* of a layer. A rank or width that only one state's
   terms know is part of that state: one value per level. In the other states it takes its level of least loss.
3. A switch of several rules, a merged run or a dropped block, sets the states of all of them or of none. Switches of
   the same rules are told apart in the first of these alone.
4. A sum of widths, where groups are concatenated, is a variable over all values that it can take. It is the sum of one
   variable more and of the largest sum that lies within it.
5. A term is a table over its extents' variables and its state. Rules of other kinds than "exactly one" are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sluice.core.latency import Extent, LatencyModel, Term
from sluice.solver.elimination import Elimination, Scope

__all__ = ["RELOAD", "TIME", "SiteTables"]

LOSS, TIME, RELOAD = range(3)  # kinds of costs; a loss is infinite where a combination is not allowed
OWN = -1  # in the place of a variable: the site that is part of the state
_Sum = frozenset[tuple[str, int]]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """A variable over switches: those of which one is set, for every value, and the level of its own site.

    A value without switches has all of them off; the level is -1 where there is no own site. ``home`` are the switches
    that are told apart here, ``own`` the sites that are part of them.
    """

    variable: int
    switches: tuple[frozenset[str], ...]
    levels: tuple[int, ...]
    home: tuple[str, ...]
    own: Mapping[str, str]

    def where(self, switch: str) -> np.ndarray:
        return np.asarray([switch in names for names in self.switches])


class SiteTables:
    """Variables and tables of a model under losses.

    Args:
        losses: by site, one per level, in any unit; zero where none are given.

    Attributes:
        complete: whether the tables know all rules, and none cannot be kept to.
    """

    def __init__(self, model: LatencyModel, losses: Mapping[str, np.ndarray]) -> None:
        self.model = model
        self._losses = {s: np.asarray(losses.get(s, np.zeros(len(v))), float) for s, v in model.levels.items()}
        self._sizes: list[int] = []
        self._tables: list[tuple[int, Scope, Callable[[], np.ndarray]]] = []  # kind, variables, costs
        self._live = {s for s in model.switches if model.levels[s][-1]}
        rules = [[s for s, _ in r.coefs if s in self._live] for r in model.rules if _exactly_one(r.coefs, r.total)]
        self.complete = len(rules) == len(model.rules) and all(rules)
        alone = sorted(self._live - {s for names in rules for s in names})
        rules = [names for names in rules if names] + [[s] for s in alone]
        self._rules_of: dict[str, list[int]] = {}
        for k, names in enumerate(rules):
            for switch in names:
                self._rules_of.setdefault(switch, []).append(k)
        own = self._own_sites()
        inside = set(own.values())
        self._states = [self._state(k, names, own, names[0] in alone) for k, names in enumerate(rules)]
        self._plain: dict[str, int] = {}
        for site, levels in model.levels.items():
            if site not in inside and site not in model.switches:
                self._plain[site] = self._variable(len(levels))
                self._add(LOSS, (self._plain[site],), self._losses[site])
        self._agree()
        self._values: dict[_Sum, np.ndarray] = {}
        self._sums: dict[_Sum, int] = {}
        for whole in sorted({frozenset(_coefs(e)) for t in model.terms for e in t.extents}, key=_by_size):
            if len(whole) > 1:
                self._add_sum(whole)
        for term in model.terms:
            self._add_term(term)

    def eliminate(self, limit: float) -> Elimination:
        """The tables in an order of elimination; OverflowError where there are more than ``limit`` combinations."""
        found = Elimination(self._sizes, [scope for _, scope, _ in self._tables], 3, limit)
        for kind, scope, costs in self._tables:
            found.add(kind, scope, costs())
        return found

    def configuration(self, values: np.ndarray) -> dict[str, int]:
        """The sites at the values of the variables."""
        found = {site: int(self.model.levels[site][values[v]]) for site, v in self._plain.items()}
        found |= {s: 0 for s in self.model.switches if s not in self._live}
        for state in self._states:
            value = int(values[state.variable])
            for switch in state.home:
                on = switch in state.switches[value]
                found[switch] = int(on)
                if switch in state.own:
                    site = state.own[switch]
                    found[site] = int(self.model.levels[site][state.levels[value] if on else self._idle(site)])
        return {site: found[site] for site in self.model.dense}

    def narrowed(self, allowed: Sequence[np.ndarray]) -> dict[str, list[int]]:
        """The places of the levels that sites may take where variables may take the values allowed, bool."""
        found = {site: np.flatnonzero(allowed[v]).tolist() for site, v in self._plain.items()}
        found |= {s: list(range(len(self.model.levels[s]))) for s in self.model.switches if s not in self._live}
        for state in self._states:
            open_ = allowed[state.variable]
            for switch in state.home:
                on = state.where(switch)
                values = self.model.levels[switch]
                may = [k for k, value in enumerate(values) if (open_[on] if value else open_[~on]).any()]
                found[switch] = may
                if switch in state.own:
                    site = state.own[switch]
                    levels = {state.levels[k] for k in np.flatnonzero(on & open_)}
                    found[site] = sorted(levels | ({self._idle(site)} if open_[~on].any() else set()))
        return {site: found[site] for site in self.model.dense}

    def _own_sites(self) -> dict[str, str]:
        """By switch of one rule, the first site that nothing but the switch's own terms knows (rule 2)."""
        known: dict[str, set[tuple[str, ...]]] = {}
        for term in self.model.terms:
            for extent in term.extents:
                for group, _ in extent.coefs:
                    once = len(extent.coefs) == 1 and sum(e.coefs == extent.coefs for e in term.extents) == 1
                    known.setdefault(group, set()).add(term.when if once else ())
        found: dict[str, str] = {}
        for site, whens in known.items():
            when = next(iter(whens))
            if len(whens) == 1 and len(when) == 1 and len(self._rules_of.get(when[0], ())) == 1:
                found.setdefault(when[0], site)
        return found

    def _idle(self, site: str) -> int:
        """The place of the level of least loss, of equal ones the largest."""
        losses = self._losses[site]
        return int(np.flatnonzero(losses == losses.min())[-1])

    def _state(self, rule: int, names: Sequence[str], own: Mapping[str, str], alone: bool) -> _State:
        home = tuple(s for s in names if self._rules_of[s][0] == rule)
        alike: dict[tuple[int, ...], set[str]] = {}
        for switch in names:
            if switch not in home:
                alike.setdefault(tuple(self._rules_of[switch]), set()).add(switch)
        counts = {s: range(len(self.model.levels[own[s]])) if s in own else (-1,) for s in home}
        pairs = [(frozenset((s,)), level) for s in home for level in counts[s]]
        pairs += [(frozenset(group), -1) for group in alike.values()] + [(frozenset[str](), -1)] * alone
        switches, levels = tuple(s for s, _ in pairs), tuple(k for _, k in pairs)
        variable = self._variable(len(pairs))
        state = _State(variable, switches, levels, home, {s: own[s] for s in home if s in own})
        costs = np.zeros(len(pairs))
        for switch in home:
            on = state.where(switch)
            costs[on] += self._losses[switch][-1]
            costs[~on] += self._losses[switch][0] if 0 in self.model.levels[switch] else np.inf
            if switch in own:
                losses = self._losses[own[switch]]
                costs[on] += losses
                costs[~on] += losses[self._idle(own[switch])]
        self._add(LOSS, (variable,), costs)
        return state

    def _agree(self) -> None:
        """Rule 3: a variable says which of the switches that a rule shares with the next is set, if any."""
        pairs: dict[tuple[int, int], list[str]] = {}
        alike = {tuple(rules): switch for switch, rules in self._rules_of.items()}
        for rules, switch in alike.items():
            for a, b in itertools.pairwise(rules):
                pairs.setdefault((a, b), []).append(switch)
        for (a, b), shared in pairs.items():
            link = self._variable(len(shared) + 1)
            for state in (self._states[a], self._states[b]):
                alike_to = [{tuple(self._rules_of[s]) for s in names} for names in state.switches]
                set_ = np.asarray([[tuple(self._rules_of[s]) in own for s in shared] for own in alike_to])
                agree = np.concatenate([~set_.any(axis=1, keepdims=True), set_], axis=1)
                self._add(LOSS, (state.variable, link), np.where(agree, 0.0, np.inf))

    def _add_sum(self, whole: _Sum) -> None:
        """Rule 4: the sum and, one group after the other, those between it and the largest known within it."""
        inner = max((s for s in self._sums if s < whole), key=len, default=frozenset[tuple[str, int]]())
        for group, coef in sorted(whole - inner):
            part = np.asarray(self.model.levels[group], float) * coef
            if not inner:
                inner = frozenset([(group, coef)])
                self._values[inner], last = part, self._plain[group]
                continue
            last = self._sums[inner] if len(inner) > 1 else self._plain[next(iter(inner))[0]]
            before, inner = self._values[inner], inner | {(group, coef)}
            if inner in self._sums:
                continue
            added = before[:, None] + part[None, :]
            self._values[inner] = np.unique(added)
            self._sums[inner] = self._variable(len(self._values[inner]))
            costs = np.where(added[:, :, None] == self._values[inner][None, None, :], 0.0, np.inf)
            self._add(LOSS, (last, self._plain[group], self._sums[inner]), costs)

    def _add_term(self, term: Term) -> None:
        for state, switches in self._existence(term):
            where = None if state is None else np.asarray([bool(names & switches) for names in state.switches])
            coefs = [_coefs(extent) for extent in term.extents]
            along = [self._sums[frozenset(c)] if len(c) > 1 else self._plain.get(c[0][0], OWN) for c in coefs if c]
            scope = (*(v for v in along if v != OWN), *(() if state is None else (state.variable,)))
            for kind, known in ((TIME, term.ms), (RELOAD, term.reload)):
                if known is not None:
                    self._tables.append((kind, scope, partial(self._costs, term, known, along, state, where)))

    def _existence(self, term: Term) -> list[tuple[_State | None, set[str]]]:
        """The states in which the term exists, with their switches; None where it always does."""
        live = {s for s in term.when if s in self._live}
        if not term.when or any(self.model.levels[s][0] for s in live):
            return [(None, set())]
        found: list[tuple[_State | None, set[str]]] = []
        while live:
            # The state that knows most of them: one by one, or all of which it does not tell apart.
            rules = sorted({k for s in live for k in self._rules_of[s]})
            known = {k: {s for names in self._states[k].switches if names <= live for s in names} for k in rules}
            best = max(rules, key=lambda k: len(known[k]))
            found.append((self._states[best], known[best]))
            live -= known[best]
        return found

    def _costs(
        self, term: Term, known: np.ndarray, along: Sequence[int], state: _State | None, on: np.ndarray | None
    ) -> np.ndarray:
        """A term's costs over the variables of its extents, but for that which is part of the state, and the state."""
        costs, axis = np.asarray(known, float) * term.weight, 0
        for extent, knots in zip(term.extents, term.knots, strict=True):
            hats = np.stack([np.interp(self._values_of(extent), knots, unit) for unit in np.eye(len(knots))])
            costs = np.moveaxis(np.tensordot(costs, hats, axes=(axis, 0)), -1, axis)
            if extent.coefs:
                axis += 1
            else:
                costs = costs.take([0], axis=axis).squeeze(axis)
        if state is None or on is None:
            return costs
        own = along.index(OWN) if OWN in along else -1
        costs = costs[..., None] if own < 0 else np.moveaxis(costs, own, -1)
        full = np.zeros((*costs.shape[:-1], len(state.switches)))
        full[..., on] = costs
        return full

    def _values_of(self, extent: Extent) -> np.ndarray:
        """The extent at every value of its variable."""
        coefs = _coefs(extent)
        if len(coefs) > 1:
            return self._values[frozenset(coefs)] + extent.const
        values = sum((np.asarray(self.model.levels[group], float) * coef for group, coef in coefs), np.zeros(1))
        return values + extent.const

    def _variable(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def _add(self, kind: int, scope: Scope, costs: np.ndarray) -> None:
        self._tables.append((kind, scope, lambda: costs))


def _coefs(extent: Extent) -> list[tuple[str, int]]:
    total: dict[str, int] = {}
    for group, coef in extent.coefs:
        total[group] = total.get(group, 0) + coef
    return sorted(total.items())


def _by_size(whole: _Sum) -> tuple[int, list[tuple[str, int]]]:
    return len(whole), sorted(whole)


def _exactly_one(coefs: Sequence[tuple[str, int]], total: int) -> bool:
    return total == 1 and all(coef == 1 for _, coef in coefs)
