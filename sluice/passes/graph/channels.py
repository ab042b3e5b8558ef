"""From tied atoms to axis groups.

1. A *channel* is one class of tied atoms that nothing froze. Its *slots* are the (tensor, axis, index) it owns.
2. Channels that lie on the same layers of the same axes form one `AxisGroup`; the group takes its name from the first
   weight, in graph order, that produces it. A class of atoms that no weight produces is no choice.
3. All axes are resolved at once. Layers that say the same are one array from then on, so what follows of a layer is
   computed once, however many tensors and values it lies on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from sluice.passes.graph.coupling import Coupling, Layers, Shape, Value
from sluice.passes.graph.groups import Analysis, AxisGroup, AxisRef, ValueAxis, module_of

__all__ = ["find_groups"]

Place = tuple[str, int, int]  # tensor, axis, layer
Lying = tuple[tuple[np.ndarray, np.ndarray], ...]  # by layer the group and the channel of every position


def find_groups(coupling: Coupling, values: Mapping[str, Value], shapes: Mapping[str, Shape]) -> Analysis:
    """The analysis of a coupling that has read the whole graph."""
    axes = coupling.resolved_axes()
    lies = {(*key, depth): layer for key, layers in axes.items() for depth, layer in enumerate(layers)}
    order = {key: rank for rank, key in enumerate(coupling.producers)}
    free = np.ones(coupling.count + 1, dtype=bool)
    free[[*coupling.frozen, -1]] = False
    members = {keys: roots for keys, roots in _alike(lies, free) if any(key[:2] in order for key in keys)}

    def lead(signature: tuple[Place, ...]) -> Place:
        return min((key for key in signature if key[:2] in order), key=lambda key: order[key[:2]])

    frozen: dict[str, str] = {}
    groups: list[AxisGroup] = []
    group_of = np.full(coupling.count + 1, -1)  # the last entry is that of no atom, -1
    channel_of = np.zeros(coupling.count + 1, dtype=group_of.dtype)
    names: dict[str, int] = {}
    leads = [(key := lead(signature), *_in_order(lies[key], roots), signature) for signature, roots in members.items()]
    for key, _, roots, signature in sorted(leads, key=lambda one: (order[one[0][:2]], one[0][2], one[1])):
        name = module_of(key[0])
        if len(roots) == 1:
            frozen.setdefault(name, "has a single channel")
            continue
        names[name] = names.get(name, 0) + 1
        name += f"#{names[name]}" if names[name] > 1 else ""
        group_of[roots], channel_of[roots] = len(groups), np.arange(len(roots))
        alike = {id(own): own for own in (lies[place] for place in signature)}
        lie = {k: np.where(group_of[own] == len(groups), channel_of[own], -1) for k, own in alike.items()}
        places = sorted(signature, key=lambda k: (order.get(k[:2], len(order)), k))
        refs = tuple(AxisRef(*place[:2], lie[id(lies[place])]) for place in places)
        groups.append(AxisGroup(name, len(roots), refs))
    made = {ref.param for group in groups for ref in group.refs if (ref.param, ref.axis) in order}
    for param, axis in coupling.producers:
        reason = None if param in made else coupling.reason((coupling.axes[param, axis],))
        if reason is not None:
            frozen[module_of(param)] = reason
    placed = _placed(coupling, axes, values, group_of, channel_of)
    return Analysis(tuple(groups), frozen, placed, dict(shapes), dict(coupling.tensors), tuple(coupling.producers))


def _in_order(layer: np.ndarray, roots: np.ndarray) -> tuple[int, np.ndarray]:
    """The first index at which any of the roots lies, and the roots by the first index of each; all lie on it."""
    first = np.empty(max(layer.max(), 0) + 2, dtype=np.int64)  # the last entry is that of no atom, -1
    first[layer[::-1]] = np.arange(len(layer) - 1, -1, -1)  # of equal entries the last that is written stays
    where = first[roots]
    order = np.argsort(where)
    return int(where[order[0]]), roots[order]


def _placed(
    coupling: Coupling,
    axes: Mapping[tuple[str, int], Layers],
    values: Mapping[str, Value],
    group_of: np.ndarray,
    channel_of: np.ndarray,
) -> dict[str, tuple[ValueAxis, ...]]:
    """Where the groups lie on the values of a graph; layers that are one array in ``axes`` are one here as well."""
    one: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    known: dict[tuple[int, ...], Lying] = {}
    made: dict[tuple[int, int], ValueAxis] = {}

    def lying(roots: Layers) -> Lying:
        found = []
        for layer in roots:
            if id(layer) not in one:
                one[id(layer)] = group_of[layer], channel_of[layer]
            if one[id(layer)][0].max() >= 0:
                found.append(one[id(layer)])
        return tuple(found)

    for key, roots in axes.items():
        known[(id(coupling.axes[key]),)] = lying(roots)
    kept = []  # what was resolved here, so that its id stays its own

    def layers(atoms: Layers) -> Lying:
        key = tuple(map(id, atoms))  # the values hold them
        if key not in known:
            kept.append(coupling.resolved(atoms))
            known[key] = lying(kept[-1])
        return known[key]

    def axis(dim: int, found: Lying) -> ValueAxis:
        if (key := (dim, id(found))) not in made:
            made[key] = ValueAxis(dim, found)
        return made[key]

    placed = {}
    for name, value in values.items():
        on = tuple(axis(dim, found) for dim, atoms in enumerate(value) if atoms and (found := layers(atoms)))
        if on:
            placed[name] = on
    return placed


def _alike(lies: Mapping[Place, np.ndarray], free: np.ndarray) -> Iterator[tuple[tuple[Place, ...], np.ndarray]]:
    """The roots that are ``free`` and lie on the same axes, with these axes.

    Layer by layer a class of roots is split into those on the layer and those off it.
    """
    places: dict[int, list[Place]] = {}  # by layer; axes with the same roots share it
    for key, layer in lies.items():
        places.setdefault(id(layer), []).append(key)
    layers = {id(layer): layer for layer in lies.values()}
    free_on = {which: roots for which, layer in layers.items() if len(roots := layer[free[layer]])}
    label, fresh = np.zeros(len(free), dtype=np.int64), 1
    for roots in free_on.values():
        labels = label[roots]
        if (labels == labels[0]).all():
            label[roots], fresh = fresh, fresh + 1
        else:
            known, inverse = np.unique(labels, return_inverse=True)
            label[roots], fresh = fresh + inverse, fresh + len(known)
    keys: dict[int, list[Place]] = {}
    for which, roots in free_on.items():
        labels = label[roots]
        for own in (labels[0],) if (labels == labels[0]).all() else np.unique(labels):
            keys.setdefault(int(own), []).extend(places[which])
    order = np.argsort(label, kind="stable")
    sets = np.array(list(keys), dtype=np.int64)
    first, behind = (np.searchsorted(label, sets, side, sorter=order) for side in ("left", "right"))
    for axes, i, j in zip(keys.values(), first.tolist(), behind.tolist(), strict=True):
        yield tuple(axes), order[i:j]
