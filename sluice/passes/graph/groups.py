"""Axis groups, the sites of widths, and what else is known of a graph; how they are named and left out.

1. An `AxisGroup` is channels that lie on the same axes of named tensors (`sluice.passes.graph.channels` finds them).
   Two groups may lie on one axis, heads and their dimensions: an index stays if both of them keep it.
2. Frozen modules are listed with the reason. Parameter names are the only identity that leaves this module.
3. Nothing in an analysis changes, so axes that are alike share their arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.errors import SluiceError
from sluice.passes.graph.atoms import Shape

__all__ = [
    "Analysis",
    "AxisGroup",
    "AxisRef",
    "ValueAxis",
    "agreeing",
    "check_cuttable",
    "keep_masks",
    "module_of",
    "named_like",
    "rename_groups",
    "without_groups",
]


@dataclass(frozen=True, slots=True, eq=False)
class AxisRef:
    """How a group lies on one axis: ``channels[i]`` is the channel of index i, or -1 if i is not the group's."""

    param: str
    axis: int
    channels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class AxisGroup:
    """Axes that must be cut together; ``size`` channels."""

    name: str
    size: int
    refs: tuple[AxisRef, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ValueAxis:
    """One labelled axis of a value: by layer the group index (-1: none) and the channel of every position."""

    dim: int
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def groups(self) -> frozenset[int]:
        """The indices of the groups that lie on the axis."""
        return frozenset(g for groups, _ in self.layers for g in np.unique(groups).tolist() if g >= 0)

    def mask(self, keeps: Sequence[np.ndarray]) -> np.ndarray:
        """Which positions stay, given one boolean mask per group."""
        mask = np.ones(len(self.layers[0][0]), dtype=bool)
        for groups, channels in self.layers:
            for index in np.unique(groups[groups >= 0]):
                mine = groups == index
                mask[mine] &= keeps[index][channels[mine]]
        return mask


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """All groups of a graph, the reason of everything frozen, the labelled axes and dense shape of every value.

    ``values`` has no entry for a value without a labelled axis. ``producers`` are the (weight, axis) pairs that make a
    labelled axis, in graph order, with a group or without. ``batch`` stands for the free batch in the ``shapes`` of an
    ONNX graph: it divides the sizes that hold the batch and no others. It is None where the batch is fixed. ``dims``:
    the dimensions of attention heads are groups as well.
    """

    groups: tuple[AxisGroup, ...]
    frozen: Mapping[str, str]
    values: Mapping[str, tuple[ValueAxis, ...]]
    shapes: Mapping[str, Shape]
    tensors: Mapping[str, Shape]
    producers: tuple[tuple[str, int], ...] = ()
    batch: int | None = None
    dims: bool = False

    def axis(self, value: str, dim: int) -> ValueAxis | None:
        """The axis of a value, None if nothing on it can be cut."""
        return next((axis for axis in self.values.get(value, ()) if axis.dim == dim), None)

    def groups_on(self, value: str) -> frozenset[int]:
        """The indices of the groups that lie on a value."""
        return frozenset(g for axis in self.values.get(value, ()) for g in axis.groups)

    def group(self, name: str) -> AxisGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise SluiceError(f"no group {name!r} in this model; its groups are {[g.name for g in self.groups]}")


def check_cuttable(analysis: Analysis) -> None:
    """Raises `SluiceError` where no width can be chosen, with the first reasons."""
    if not analysis.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(analysis.frozen.items())[:4])
        raise SluiceError(
            f"nothing in this model can be cut ({reasons or 'it has no layer with a weight'}); "
            "give a model with an inner width that nothing outside depends on"
        )


def module_of(param: str) -> str:
    """``layer1.0.conv1.weight -> layer1.0.conv1``."""
    return param.rpartition(".")[0] or param


def without_groups(analysis: Analysis, reasons: Mapping[str, str]) -> Analysis:
    """The same analysis without the groups that ``reasons`` names: they keep their size, for the reason given."""
    if not reasons:
        return analysis
    stay = [index for index, group in enumerate(analysis.groups) if group.name not in reasons]
    renumbered = np.full(len(analysis.groups) + 1, -1)  # the last entry is that of a fixed index, -1
    renumbered[stay] = np.arange(len(stay))
    values = {name: tuple(_renumbered(axis, renumbered) for axis in axes) for name, axes in analysis.values.items()}
    makers = {key: module_of(key[0]) for key in analysis.producers}
    frozen = {
        makers[ref.param, ref.axis]: reasons[group.name]
        for group in analysis.groups
        if group.name in reasons
        for ref in group.refs
        if (ref.param, ref.axis) in makers
    }
    groups = tuple(analysis.groups[index] for index in stay)
    return replace(analysis, groups=groups, values=values, frozen={**analysis.frozen, **frozen})


def _renumbered(axis: ValueAxis, numbers: np.ndarray) -> ValueAxis:
    return replace(
        axis, layers=tuple((numbers[g], np.where(numbers[g] < 0, 0, channels)) for g, channels in axis.layers)
    )


def agreeing(analysis: Analysis, like: Analysis, reason: str) -> Analysis:
    """The analysis with the groups that ``like`` has as well, called as they are there; the others keep their size.

    Args:
        reason: why a group that ``like`` lacks keeps its size.
    """
    names = _matched(analysis, like)
    renamed = [replace(group, name=names[group.name] or group.name) for group in analysis.groups]
    lacking = {name: reason for name, other in names.items() if other is None}
    left = without_groups(analysis, lacking)
    return replace(left, groups=tuple(group for group, old in zip(renamed, names, strict=True) if old not in lacking))


def named_like(analysis: Analysis, like: Analysis) -> Analysis:
    """The same groups, called as in ``like`` where it has them; no other group has a name that ``like`` uses."""
    names, theirs = _matched(analysis, like), {group.name for group in like.groups}
    own = {name: f"{name} (here alone)" if name in theirs else name for name in names}
    return replace(analysis, groups=tuple(replace(g, name=names[g.name] or own[g.name]) for g in analysis.groups))


def _matched(analysis: Analysis, like: Analysis) -> dict[str, str | None]:
    """By group the name of the same group in ``like``, None where it has none.

    Two groups are the same if they lie on the same channels of the same axes, of tensors that both graphs have. Equal
    names are no proof: where one reading lacks ``x``, its ``x`` may be the ``x#2`` of the other.
    """
    shared = analysis.tensors.keys() & like.tensors.keys()
    theirs = {lies: group.name for group in like.groups if (lies := _lies(group, shared))}
    return {group.name: theirs.get(_lies(group, shared)) for group in analysis.groups}


def _lies(group: AxisGroup, tensors: Collection[str]) -> frozenset[tuple[str, int, bytes]]:
    """Where a group lies: tensor, axis, and the channel at every index."""
    refs = (ref for ref in group.refs if ref.param in tensors)
    return frozenset((ref.param, ref.axis, ref.channels.astype(np.int64).tobytes()) for ref in refs)


def rename_groups(analysis: Analysis, names: Mapping[tuple[str, int], str], like: Analysis | None = None) -> Analysis:
    """The same analysis with other names of groups.

    A group that lies on the same channels as one of ``like`` has its name. Any other is called as ``names`` calls one
    of the (tensor, axis) pairs it lies on, one that it has for itself before one that it shares.
    """
    same = {} if like is None else _matched(analysis, like)
    on = Counter((ref.param, ref.axis) for group in analysis.groups for ref in group.refs)

    def name(group: AxisGroup) -> str:
        keys = [key for ref in group.refs if (key := (ref.param, ref.axis)) in names]
        return same.get(group.name) or next((names[key] for key in sorted(keys, key=on.__getitem__)), group.name)

    return replace(analysis, groups=tuple(replace(group, name=name(group)) for group in analysis.groups))


def keep_masks(analysis: Analysis, kept: Mapping[str, Sequence[int]]) -> list[np.ndarray]:
    """One boolean mask per group; groups not named stay whole."""
    unknown = [name for name in kept if name not in {g.name for g in analysis.groups}]
    if unknown:
        raise SluiceError(f"no group {unknown[0]!r} in this model; its groups are {[g.name for g in analysis.groups]}")
    masks = []
    for group in analysis.groups:
        mask = np.ones(group.size, dtype=bool)
        if group.name in kept:
            mask[:] = False
            mask[list(kept[group.name])] = True
            if not mask.any():
                raise SluiceError(f"group {group.name!r} would lose all {group.size} channels; keep at least one")
        masks.append(mask)
    return masks
