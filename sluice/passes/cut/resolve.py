"""From a choice of channels to the slices that carry it out, and back.

1. ``choice -> plan``: an index of an axis stays unless its channel goes; every axis a group lies on is sliced.
2. ``plan -> choice``: a channel goes if all its indices go. A plan that cuts tied axes differently, leaves one of them
   whole, or cuts a frozen axis, is refused: it would change the function or break the shapes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.plan import Edits, InputSpec, Plan, Slice
from sluice.passes.cut.merge_ties import tie_removed
from sluice.passes.graph.groups import Analysis, keep_masks

__all__ = ["make_plan", "masks_of_slices", "tensor_masks"]


def tensor_masks(analysis: Analysis, keeps: Sequence[np.ndarray]) -> dict[tuple[str, int], np.ndarray]:
    """(tensor, axis) -> which indices stay, for every axis that loses something."""
    masks: dict[tuple[str, int], np.ndarray] = {}
    for group, keep in zip(analysis.groups, keeps, strict=True):
        if keep.all():
            continue
        kept = np.append(keep, True)  # the last entry is that of no channel, -1
        alike = {id(ref.channels): ref.channels for ref in group.refs}
        stays = {which: kept[channels] for which, channels in alike.items()}
        for ref in group.refs:
            key, own = (ref.param, ref.axis), stays[id(ref.channels)]
            masks[key] = masks[key] & own if key in masks else own
    return masks


def make_plan(
    analysis: Analysis,
    kept: Mapping[str, Sequence[int]],
    inputs: Iterable[InputSpec] = (),
    edits: Edits | None = None,
) -> Plan:
    """The plan that keeps the channels ``kept[group]`` (groups not named stay whole) and makes the edits."""
    edits = edits or Edits()
    keeps = tie_removed(analysis, edits.merges, keep_masks(analysis, kept))
    masks = tensor_masks(analysis, keeps)
    different = {id(mask): mask for mask in masks.values()}  # axes of one group share it
    indices = {which: tuple(np.flatnonzero(mask).tolist()) for which, mask in different.items()}
    slices = [Slice(param, axis, len(mask), indices[id(mask)]) for (param, axis), mask in masks.items()]
    widths = {group.name: int(keep.sum()) for group, keep in zip(analysis.groups, keeps, strict=True)}
    return Plan(
        dict(analysis.tensors), tuple(slices), tuple(inputs), widths,
        factorizations=edits.factorizations, drops=edits.drops, merges=edits.merges,
    )  # fmt: skip


def masks_of_slices(
    analysis: Analysis, slices: Sequence[Slice], named: Container[str] | None = None
) -> list[np.ndarray]:
    """One boolean mask per group.

    Args:
        named: the tensors that the plan's model had, if the graph may hold others (constants an exporter made); those
            follow the axes they are tied to.
    Raises:
        SluiceError: the slices contradict each other or this graph.
    """
    wanted: dict[tuple[str, int], np.ndarray] = {}
    different: dict[tuple[int, int], np.ndarray] = {}  # the slices hold what they keep
    for cut in slices:
        if (sizes := (cut.size, id(cut.keep))) not in different:
            different[sizes] = np.zeros(cut.size, dtype=bool)
            different[sizes][list(cut.keep)] = True
        wanted[(cut.param, cut.axis)] = different[sizes]
    keeps = []
    for group in analysis.groups:
        keep = np.ones(group.size, dtype=bool)
        met = set[tuple[int, int]]()
        for ref in group.refs:
            asked = wanted.get((ref.param, ref.axis))
            if asked is not None and (both := (id(ref.channels), id(asked))) not in met:
                met.add(both)
                stays = np.zeros(group.size + 1, dtype=bool)  # the last entry is that of no channel, -1
                stays[ref.channels[asked]] = True
                keep &= stays[:-1]
        keeps.append(keep)
    implied = tensor_masks(analysis, keeps)
    same = set[tuple[int, int]]()
    for key in {**wanted, **implied}:
        ours = implied.get(key)
        theirs = wanted.get(key)
        if (theirs is None and named is not None and key[0] not in named) or (id(ours), id(theirs)) in same:
            continue
        length = analysis.tensors[key[0]][key[1]]
        whole = np.ones(length, dtype=bool)
        if np.array_equal(whole if ours is None else ours, whole if theirs is None else theirs):
            same.add((id(ours), id(theirs)))
        else:
            raise SluiceError(
                f"the plan does not fit this graph at {key[0]!r} axis {key[1]}: it keeps "
                f"{'all' if theirs is None else int(theirs.sum())} of {length}, the axes tied to it ask for "
                f"{'all' if ours is None else int(ours.sum())} or for others; make the plan again with `sluice plan`"
            )
    for group, keep in zip(analysis.groups, keeps, strict=True):
        if not keep.any():
            raise SluiceError(f"the plan leaves nothing of group {group.name!r}; keep at least one channel")
    return keeps
