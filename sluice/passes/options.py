"""What may be chosen besides widths: ranks of weights, dropped blocks, merged runs; and how a configuration says so.

Every option is a switch of the latency model; the names say what it is:

    <weight>|dense            the layer is as it was
    <weight>|<form>           its weight is two of inner size <weight>|<form>|rank
    <block>|drop              the residual branch is gone
    <first>..<last>|merge ..  the run of convolutions is merged

1. Exactly one of the switches that name a layer is set: dense, one form, a drop or a merge that it lies in.
2. A convolution that a merge removes passes its input on, so the axes on both its sides must keep the same channels;
   those of the axis that leaves the merged run decide (`tie_removed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sluice.errors import SluiceError
from sluice.latency import LatencyModel
from sluice.passes.sites import Analysis
from sluice.plan import Drop, Factorize, Merge

__all__ = [
    "BSR",
    "METHODS",
    "Edits",
    "Options",
    "RankOption",
    "check_methods",
    "chosen_edits",
    "dense_switch",
    "tie_removed",
]

METHODS = ("filter", "rank", "block", "merge")
BSR = "bsr"  # ranks by beam search, on its own


@dataclass(frozen=True, slots=True)
class RankOption:
    """One form in which a weight can be factorised; ``switch`` and ``rank`` are sites of the latency model."""

    param: str
    form: str

    @property
    def switch(self) -> str:
        return f"{self.param}|{self.form}"

    @property
    def rank(self) -> str:
        return f"{self.param}|{self.form}|rank"


@dataclass(frozen=True, slots=True)
class Options:
    """All options of a network; drops and merges by the name of their switch."""

    ranks: tuple[RankOption, ...] = ()
    drops: Mapping[str, Drop] = field(default_factory=dict)
    merges: Mapping[str, Merge] = field(default_factory=dict)

    def sites(self, model: LatencyModel, methods: Sequence[str]) -> frozenset[str]:
        """The sites of ``model`` that these methods may move."""
        found: set[str] = set()
        if "filter" in methods:
            ranks = {option.rank for option in self.ranks}
            found |= {g for g in model.dense if g not in model.switches and g not in ranks}
        if "rank" in methods or BSR in methods:
            found |= {name for option in self.ranks for name in (option.switch, option.rank)}
        if "block" in methods:
            found |= set(self.drops)
        if "merge" in methods:
            found |= set(self.merges)
        # A layer may leave its dense state only if another one is open to it.
        for rule in model.rules:
            names = {name for name, _ in rule.coefs}
            if names & found:
                found |= {name for name in names if name.endswith("|dense")}
        return frozenset(found & set(model.dense))


@dataclass(frozen=True, slots=True)
class Edits:
    """The structural edits of one configuration."""

    factorizations: tuple[Factorize, ...] = ()
    drops: tuple[Drop, ...] = ()
    merges: tuple[Merge, ...] = ()


def dense_switch(param: str) -> str:
    return f"{param}|dense"


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods in their usual order.

    Raises:
        SluiceError: an unknown one, or none.
    """
    if tuple(methods) == (BSR,):
        return (BSR,)
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or isinstance(methods, str):
        raise SluiceError(f"methods {methods!r} are not understood; give some of {list(METHODS)}, or {BSR!r} alone")
    return tuple(m for m in METHODS if m in methods)


def chosen_edits(options: Options, configuration: Mapping[str, int]) -> Edits:
    """What the switches of a configuration ask for."""
    return Edits(
        tuple(
            Factorize(o.param, o.form, int(configuration[o.rank])) for o in options.ranks if configuration.get(o.switch)
        ),
        tuple(drop for switch, drop in options.drops.items() if configuration.get(switch)),
        tuple(merge for switch, merge in options.merges.items() if configuration.get(switch)),
    )


def tie_removed(analysis: Analysis, merges: Sequence[Merge], keeps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Masks in which both sides of every removed convolution keep the same channels (rule 2); other groups inside a
    merged run, which nothing outside sees, stay whole."""
    tied = [keep.copy() for keep in keeps]
    on = {(ref.param, ref.axis): index for index, group in enumerate(analysis.groups) for ref in group.refs}
    for merge in merges:
        into, out = on.get((merge.layers[0], 1)), on.get((merge.layers[-1], 0))
        inside = {on[key] for layer in merge.layers for key in ((layer, 0), (layer, 1)) if key in on} - {into, out}
        inner = {group for group in inside if _only_in(analysis, group, merge)}
        for group in inner:
            tied[group][:] = True
        kept = {name for run in merge.runs for name in run}
        sides = [(on.get((n, 1)), on.get((n, 0))) for n in merge.layers if n not in kept]
        pairs = [(a, b) for a, b in sides if a is not None and b is not None and a != b]
        for _ in pairs:  # as often as a mask may have to travel
            for a, b in [*pairs, *((b, a) for a, b in pairs)]:
                if b in inner and not np.array_equal(tied[a], tied[b]) and not tied[a].all():
                    tied[b] = tied[a].copy()
        for a, b in pairs:
            if not np.array_equal(tied[a], tied[b]):
                names = [analysis.groups[a].name, analysis.groups[b].name]
                raise SluiceError(
                    f"merging {merge.name} removes a layer between the groups {names}, which keep "
                    f"{int(tied[a].sum())} and {int(tied[b].sum())} channels; keep the same in both"
                )
    return tied


def _only_in(analysis: Analysis, group: int, merge: Merge) -> bool:
    """Whether no weight outside the run has the group; in front of a depthwise convolution one has."""
    weights = {ref.param for ref in analysis.groups[group].refs if len(analysis.tensors[ref.param]) > 1}
    return weights <= set(merge.layers)
