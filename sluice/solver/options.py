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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.plan import Drop, Factorize, Merge
from sluice.passes.graph.groups import Analysis

__all__ = [
    "BSR",
    "METHODS",
    "Edits",
    "Inside",
    "Options",
    "RankOption",
    "check_methods",
    "chosen_edits",
    "dense_switch",
    "groups_on",
    "inside",
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

    def at(self, rank: int) -> dict[str, int]:
        """The sites of the layer where it has this form and rank."""
        return {dense_switch(self.param): 0, self.switch: 1, self.rank: rank}


@dataclass(frozen=True, slots=True)
class Options:
    """All options of a network; drops and merges by the name of their switch.

    ``refused`` says of weights, by name, why they are offered no rank, where they are of a kind that could have one.
    """

    ranks: tuple[RankOption, ...] = ()
    drops: Mapping[str, Drop] = field(default_factory=dict)
    merges: Mapping[str, Merge] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

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


def groups_on(analysis: Analysis) -> dict[tuple[str, int], str]:
    """The group of every (tensor, axis)."""
    return {(ref.param, ref.axis): group.name for group in analysis.groups for ref in group.refs}


@dataclass(frozen=True, slots=True)
class Inside:
    """What a merge does to the groups on its layers' axes.

    Attributes:
        inner: those that nothing outside sees: not at a border, and on no weight of another layer (in front of a
            depthwise convolution there is one).
        tied: those that removed layers make one width (rule 2); None stands for an axis that keeps its size.
    """

    inner: frozenset[str]
    tied: tuple[frozenset[str | None], ...]

    def outer(self, together: frozenset[str | None]) -> list[str | None]:
        """The members of one of ``tied`` that decide its width, None last; the inner ones follow."""
        return sorted(together - self.inner, key=lambda name: (name is None, name or ""))


def inside(
    analysis: Analysis, layers: Sequence[str], kept: Collection[str], on: Mapping[tuple[str, int], str]
) -> Inside:
    """The groups inside a merge of ``layers`` that removes all but ``kept``; ``on`` is `groups_on` the analysis."""
    borders = {on.get((layers[0], 1)), on.get((layers[-1], 0))}
    names = {on[key] for layer in layers for key in ((layer, 0), (layer, 1)) if key in on} - borders
    inner = {
        group.name
        for group in analysis.groups
        if group.name in names
        and all(ref.param in layers for ref in group.refs if len(analysis.tensors[ref.param]) > 1)
    }
    tied: list[frozenset[str | None]] = []
    for layer in layers:
        if layer not in kept:
            out, depthwise = on.get((layer, 0)), analysis.tensors.get(layer, ())[1:2] == (1,)
            together = frozenset({out if depthwise else on.get((layer, 1)), out})
            touching = [other for other in tied if other & together - {None}]
            tied = [other for other in tied if other not in touching] + [together.union(*touching)]
    return Inside(frozenset(inner), tuple(tied))


def tie_removed(analysis: Analysis, merges: Sequence[Merge], keeps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Masks in which both sides of every removed convolution keep the same channels (rule 2); other groups inside a
    merged run, which nothing outside sees, stay whole."""
    masks = {group.name: keep.copy() for group, keep in zip(analysis.groups, keeps, strict=True)}
    on = groups_on(analysis) if merges else {}
    for merge in merges:
        found = inside(analysis, merge.layers, {name for run in merge.runs for name in run}, on)
        for name in found.inner:
            masks[name][:] = True
        for together in found.tied:
            first, *others = found.outer(together) or [None]
            if first is None:
                continue
            for other in others:
                mask = np.ones_like(masks[first]) if other is None else masks[other]
                if not np.array_equal(mask, masks[first]):
                    raise SluiceError(
                        f"merging {merge.name} removes a layer between the groups {[first, other]}, which keep "
                        f"{int(masks[first].sum())} and {int(mask.sum())} channels; keep the same in both"
                    )
            masks |= {name: masks[first].copy() for name in found.inner & together}
    return list(masks.values())
