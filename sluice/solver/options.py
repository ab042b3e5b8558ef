"""The edits on offer besides widths: ranks of weights, dropped blocks, merged runs; and their names in a configuration.

Every option is a switch of the latency model, with one of these names:

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

from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.plan import Drop, Edits, Factorize, Merge

__all__ = ["BSR", "METHODS", "EditSpace", "RankOption", "check_methods", "chosen_edits", "dense_switch"]

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
class EditSpace:
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


def dense_switch(param: str) -> str:
    return f"{param}|dense"


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods in their usual order.

    Raises:
        SluiceError: an unknown one, or none.
    """
    known = isinstance(methods, (tuple, list, set, frozenset)) and bool(methods)
    if known and tuple(methods) == (BSR,):
        return (BSR,)
    if not known or any(m not in METHODS for m in methods):
        raise SluiceError(f"methods {methods!r} are not understood; give some of {list(METHODS)}, or {BSR!r} alone")
    return tuple(m for m in METHODS if m in methods)


def chosen_edits(options: EditSpace, configuration: Mapping[str, int]) -> Edits:
    """The structural edits whose switches a configuration sets."""
    return Edits(
        tuple(
            Factorize(o.param, o.form, int(configuration[o.rank])) for o in options.ranks if configuration.get(o.switch)
        ),
        tuple(drop for switch, drop in options.drops.items() if configuration.get(switch)),
        tuple(merge for switch, merge in options.merges.items() if configuration.get(switch)),
    )
