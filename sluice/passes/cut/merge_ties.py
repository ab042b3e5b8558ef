"""The axis groups that a merge ties together: those on both sides of a convolution that it removes.

A removed convolution passes its input on, so the axes on both its sides must keep the same channels. The group that the
rest of the network sees decides which; groups inside the merge follow (`tie_removed`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.graph.groups import Analysis

__all__ = ["Inside", "groups_on", "inside", "tie_removed"]


def groups_on(analysis: Analysis) -> dict[tuple[str, int], str]:
    """The group of every (tensor, axis)."""
    return {(ref.param, ref.axis): group.name for group in analysis.groups for ref in group.refs}


@dataclass(frozen=True, slots=True)
class Inside:
    """The groups on the axes of a merge's layers.

    Attributes:
        inner: groups inside the merge alone: not at a border, and on no weight of another layer (a group in front of a
            depthwise convolution lies on one).
        tied: groups that removed layers make one width; None stands for an axis that keeps its size.
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
    """Masks in which both sides of every removed convolution keep the same channels.

    Other groups inside a merged run stay whole: no layer outside the run reads them.
    """
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
