"""The labels of a graph with merged runs follow from those of the dense graph; the graph is not analysed again.

In a merge, a region between the values ``source`` and ``value`` is replaced; everything else stays.

1. Within a region only residual additions and depthwise convolutions tie their inputs to their outputs. Values outside
   keep their labels unless the merge changes whether ``source`` is tied to ``value``. If both are whole groups, a lost
   tie does no harm, as two groups of one name are cut alike; and a new tie is none where both are one group already.
2. Inside, axes and values that operators tie have one label: that of ``source`` or ``value`` if it is one of them, else
   a new group, unless it is a single channel.

Where these rules do not suffice, `relabel` returns None, and the graph must be analysed: labels at the ends that are no
whole groups, as splits and concatenations make; a tie of a value whose size is fixed; a group that was excluded before;
a tensor of the region with another reader, since that is a tie as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from sluice.passes.cut.merge_region import MergeRegion, bias_name
from sluice.passes.graph.groups import Analysis, AxisGroup, AxisRef, ValueAxis, module_of
from sluice.passes.graph.onnx_graph import attributes

__all__ = ["Change", "relabel"]

FIXED, MIXED = -1, -2  # stand for a group's index
Key = tuple[str, int]  # (tensor, axis)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A region that begins at position ``start`` of its chain, and the nodes in its place.

    ``tensors`` and ``shapes`` are the shapes of the tensors that these nodes read, and of the values that they make.
    """

    region: MergeRegion
    start: int
    nodes: Sequence[onnx.NodeProto]
    tensors: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def ends(self) -> tuple[str, str]:
        return self.region.source, self.region.value


def relabel(
    dense: Analysis, changes: Sequence[Change], names: Mapping[Key, str], known: Collection[str], seen: Collection[str]
) -> Analysis | None:
    """The analysis of the changed graph, with labels for the values ``seen`` only.

    Args:
        dense: of the graph before, nothing excluded.
        names: of the groups afterwards, by a (tensor, axis) that they lie on.
        known: names of the groups before; one with another name was excluded.
    """
    lost = {name for change in changes for name in change.region.tensors}
    called = [group.name for group in dense.groups]
    sizes = [group.size for group in dense.groups]
    refs = [[ref for ref in group.refs if ref.param not in lost] for group in dense.groups]
    axes: dict[str, ValueAxis | None] = {}
    parted = False
    for change in changes:
        labels = {name: _label(dense, name, known) for name in change.ends}
        classes = _classes(change)
        before, after = _tied_before(change), any(set(change.ends) <= together for together in classes)
        if MIXED in labels.values() or not _holds(dense, change, labels, before, after):
            return None
        parted |= before and not after
        for together in classes:
            own = _lies_on(change, together)
            end = next((name for name in change.ends if name in together), None)
            if end is not None:
                group, channels = labels[end], np.arange(0)
                if group != FIXED:
                    channels = dense.values[end].channels
                    if any(names.get(key, called[group]) != called[group] for key in own):
                        return None
            else:
                channels = np.arange(change.shapes[next(iter(together))][1])
                group = len(refs) if len(channels) > 1 else FIXED
                if group != FIXED:
                    called.append(next((names[key] for key in own if key in names), module_of(own[0][0])))
                    sizes.append(len(channels))
                    refs.append([])
            axis = None
            if group != FIXED:
                refs[group] += [AxisRef(param, k, channels) for param, k in own]
                axis = ValueAxis(1, np.full(len(channels), group), channels)
            axes |= dict.fromkeys(together.difference(change.ends), axis)
    for name in set(seen).difference(axes):
        axes[name] = dense.values.get(name)
        if _label(dense, name, known, whole=parted) == MIXED:
            return None
    return _closed(dense, changes, lost, (called, sizes, refs), axes)


def _label(dense: Analysis, value: str, known: Collection[str], whole: bool = True) -> int:
    """The group that is the value's channel axis, `FIXED`, or `MIXED`: also for a group that was excluded.

    Unless it must be a ``whole`` group, an axis that mixes known groups has the index of the first.
    """
    axis = dense.values.get(value)
    if axis is None or (axis.groups == FIXED).all():
        return FIXED
    there = np.unique(axis.groups[axis.groups >= 0])
    group = dense.groups[there[0]]
    one = (axis.groups == there[0]).all() and axis.dim == 1 and len(axis.groups) == group.size
    once = one and len(np.unique(axis.channels)) == group.size
    if any(dense.groups[k].name not in known for k in there) or (whole and not once):
        return MIXED
    return int(there[0])


def _holds(dense: Analysis, change: Change, labels: Mapping[str, int], before: bool, after: bool) -> bool:
    """Whether the values outside keep their labels (rule 1)."""
    first, last = (labels[name] for name in change.ends)
    if after:
        same = [dense.values[name].channels for name in change.ends if labels[name] != FIXED]
        return first == last and all(np.array_equal(same[0], channels) for channels in same)
    return not before or first != FIXED


def _tied_before(change: Change) -> bool:
    """Whether the region ties its ends to each other."""
    layers = change.region.layers
    pairs = [(k, k + 1) for k, layer in enumerate(layers, change.start) if layer.depthwise]
    pairs += [(span.start, span.end) for span in change.region.spans if span.shortcut is None]
    ends = {change.start, change.start + len(layers)}
    return any(ends <= together for together in _joined(pairs))


def _classes(change: Change) -> list[set[str]]:
    """Classes of tied values, of all that the new nodes read and make."""
    pairs = []
    for node in change.nodes:
        tied = node.op_type == "Add" or attributes(node)["group"] > 1
        made = node.output[0]
        pairs += [(name, made if tied else name) for name in node.input[: 2 if node.op_type == "Add" else 1]]
        pairs.append((made, made))
    return _joined(pairs)


def _joined(pairs: Sequence[tuple[Any, Any]]) -> list[set[Any]]:
    """Classes of the members that the pairs tie."""
    classes: list[set[Any]] = []
    for pair in pairs:
        touched = [members for members in classes if not members.isdisjoint(pair)]
        classes = [members for members in classes if members.isdisjoint(pair)] + [set(pair).union(*touched)]
    return classes


def _lies_on(change: Change, together: Collection[str]) -> list[Key]:
    """The axes along which these values run, as a group lists them: those of producers in order, then the others."""
    convs = [node for node in change.nodes if node.op_type == "Conv"]
    made = [node.input[1] for node in convs if node.output[0] in together]
    read = [n.input[1] for n in convs if n.input[0] in together and attributes(n)["group"] == 1]
    return [(name, 0) for name in made] + sorted([(bias_name(n), 0) for n in made] + [(n, 1) for n in read])


def _closed(
    dense: Analysis,
    changes: Sequence[Change],
    lost: Collection[str],
    groups: tuple[Sequence[str], Sequence[int], Sequence[Sequence[AxisRef]]],
    axes: Mapping[str, ValueAxis | None],
) -> Analysis:
    """The analysis with the groups that still lie somewhere."""
    alive = [k for k, refs in enumerate(groups[2]) if refs]
    index = np.full(len(groups[2]) + 1, FIXED)
    index[alive] = np.arange(len(alive))
    tensors = {name: shape for name, shape in dense.tensors.items() if name not in lost}
    shapes = {name: shape for name, shape in dense.shapes.items() if name not in lost}
    for change in changes:
        tensors |= change.tensors
        shapes |= {**change.tensors, **change.shapes}
    return Analysis(
        tuple(AxisGroup(groups[0][k], groups[1][k], tuple(groups[2][k])) for k in alive),
        {},
        {name: ValueAxis(a.dim, index[a.groups], a.channels) for name, a in axes.items() if a is not None},
        shapes,
        tensors,
    )
