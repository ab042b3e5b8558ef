"""Parts follow the kernels of engines: what one kernel computes belongs to one part.

A compiler fuses across the borders of parts (`sluice.profiler.pieces.split`): the projections of an attention become
one product, a residual addition goes into another convolution, a mean into a norm. A sum over parts then counts kernels
that no engine runs. The runtime tells which operators each kernel of an engine computes, so no list of patterns is
needed. For the kernels of the dense engine and of some random ones:

1. Where one part alone has an anchor among a kernel's operators, the other operators move to that part.
2. Where no part has an anchor there, or several have, the parts are joined.
3. A part without an anchor that no kernel computes, such as a change of shape that costs nothing, goes to its only
   reader.
4. None of this happens if a part would depend on what depends on it, or on more than `MOST` widths, since its points
   are a grid over them. Nor between parts that may leave the dense network apart: what ranks or merges replace stays as
   it is, and parts that change hands belong to the same residual blocks. A kernel that is in several parts for that
   reason is told by `in_several`: the parts count more kernels than an engine runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import onnx

from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import reads
from sluice.passes.search_space import SearchSpace
from sluice.profiler.pieces.identity import free_extents
from sluice.profiler.pieces.split import ANCHORS, Part, part_of
from sluice.solver.options import BSR

__all__ = ["Kernel", "in_several", "name_of", "regroup", "states_of"]

MOST = 3
Kernel = frozenset[str]  # operators, by `name_of`


def name_of(node: onnx.NodeProto) -> str:
    """The first output of an operator, which no other one has."""
    return next(filter(None, node.output))


def states_of(parts: Sequence[Part], space: SearchSpace | None, methods: Collection[str]) -> list[Hashable]:
    """By part what rule 4 compares; None for a part that stays as it is."""
    if space is None:
        return [()] * len(parts)
    replaced: set[str] = set()
    if {"rank", BSR} & set(methods):
        replaced |= space.ranks.keys()
    if "merge" in methods:
        replaced |= {weight for site in space.merges for weight in (*site.gone, *site.merge.layers)}
    blocks = space.blocks if "block" in methods else ()
    found: list[Hashable] = []
    for part in parts:
        used = {name for node in part.nodes for name in reads(node)}
        within = [b.name for b in blocks if used.intersection(b.params) or set(b.own).issuperset(part.outputs)]
        found.append(None if replaced & used else tuple(within))
    return found


def regroup(
    parts: Sequence[Part],
    order: Sequence[onnx.NodeProto],
    leaving: Collection[str],
    analysis: Analysis,
    kernels: Iterable[Kernel],
    states: Sequence[Hashable],
) -> list[Part]:
    """The parts in execution order, after rules 1 to 4.

    Args:
        order: all nodes of the graph.
        leaving: the outputs of the graph.
        kernels: of all engines; operators that the graph does not have are left out.
        states: by part, see `states_of`.
    """
    grouping = _Grouping(parts, order, analysis, states)
    told = [kernel & grouping.owner.keys() for kernel in kernels]
    for _ in range(2):  # what is refused at first may do once others are joined
        for kernel in told:
            grouping.follow(kernel)
    computed = frozenset[str]().union(*told)
    if computed:
        grouping.give_away(computed)
    return grouping.parts(leaving)


def in_several(parts: Iterable[Part], kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels that compute operators of several parts (rule 4)."""
    owner = {name: index for index, part in enumerate(parts) for name in map(name_of, part.nodes) if name in part.made}
    return [kernel for kernel in kernels if len({owner[name] for name in kernel & owner.keys()}) > 1]


@dataclass(slots=True, eq=False)
class _Grouping:
    """Which part owns which operator."""

    given: Sequence[Part]
    order: Sequence[onnx.NodeProto]
    analysis: Analysis
    states: Sequence[Hashable]
    owner: dict[str, int] = field(init=False)
    nodes: dict[str, onnx.NodeProto] = field(init=False)
    makers: dict[str, str] = field(init=False)  # by activation the operator that makes it

    def __post_init__(self) -> None:
        self.owner, self.nodes, self.makers = {}, {}, {}
        for index, part in enumerate(self.given):
            for node in part.nodes:
                if name_of(node) in part.made:
                    self.owner[name_of(node)] = index
                    self.nodes[name_of(node)] = node
                    self.makers.update(dict.fromkeys(filter(None, node.output), name_of(node)))

    def follow(self, kernel: Kernel) -> None:
        """Rules 1 and 2 for one kernel."""
        held = sorted({self.owner[name] for name in kernel})
        anchored = sorted({self.owner[name] for name in kernel if self.nodes[name].op_type in ANCHORS})
        if len(held) < 2:
            return
        if len(anchored) == 1:
            self._try({name: anchored[0] for name in kernel}, anchored[0])
        else:
            self._try({name: held[0] for name, index in self.owner.items() if index in held}, held[0])

    def give_away(self, computed: Kernel) -> None:
        """Rule 3."""
        for index in sorted(set(self.owner.values())):
            own = [name for name, holder in self.owner.items() if holder == index]
            readers = {reader for maker, reader in self._edges(self.owner) if maker == index}
            anchored = any(self.nodes[name].op_type in ANCHORS for name in own)
            if not anchored and not computed.intersection(own) and len(readers) == 1:
                self._try(dict.fromkeys(own, next(iter(readers))), next(iter(readers)))

    def _try(self, change: Mapping[str, int], to: int) -> None:
        """Change hands, unless rule 4 forbids it."""
        concerned = {self.owner[name] for name in change} | {to}
        if None in (states := {self.states[index] for index in concerned}) or len(states) > 1:
            return
        after = {**self.owner, **change}
        most = max(MOST, *(self._widths(self.owner, index) for index in concerned))
        if self._widths(after, to) <= most and not _has_circle(self._edges(after)):
            self.owner = after

    def _widths(self, owner: Mapping[str, int], index: int) -> int:
        own = [self.nodes[name] for name, holder in owner.items() if holder == index]
        return free_extents(self.analysis, {name for node in own for name in (*reads(node), *node.output)})

    def _edges(self, owner: Mapping[str, int]) -> set[tuple[int, int]]:
        """Pairs of parts of which the second reads the first."""
        found = set()
        for name, reader in owner.items():
            for value in reads(self.nodes[name]):
                if value in self.makers and owner[self.makers[value]] != reader:
                    found.add((owner[self.makers[value]], reader))
        return found

    def parts(self, leaving: Collection[str]) -> list[Part]:
        """The parts as they are owned now."""
        prepared = {name: node for part in self.given for node in part.nodes if name_of(node) not in self.owner
                    for name in node.output}  # fmt: skip
        members: dict[int, list[onnx.NodeProto]] = {}
        for node in self.order:
            if name_of(node) in self.owner:
                members.setdefault(self.owner[name_of(node)], []).append(self.nodes[name_of(node)])
        entering = {name for part in self.given for name in part.inputs}
        activations = entering | {name for part in self.given for name in part.made}
        read_by: dict[str, set[int]] = {}
        for index, own in members.items():
            for node in own:
                for name in reads(node):
                    read_by.setdefault(name, set()).add(index)
        order = _in_order(members.keys(), self._edges(self.owner))
        return [part_of(members[i], i, read_by, activations, prepared, leaving) for i in order]


def _sorter(nodes: Collection[int], edges: Collection[tuple[int, int]]) -> TopologicalSorter[int]:
    """Raises `CycleError` where the edges make a circle."""
    sorter = TopologicalSorter(dict.fromkeys(nodes, ()))
    for first, second in edges:
        sorter.add(second, first)
    sorter.prepare()
    return sorter


def _has_circle(edges: Collection[tuple[int, int]]) -> bool:
    try:
        _sorter((), edges)
    except CycleError:
        return True
    return False


def _in_order(nodes: Collection[int], edges: Collection[tuple[int, int]]) -> Iterator[int]:
    """The nodes behind those that they depend on, else by number."""
    sorter = _sorter(nodes, edges)
    ready: list[int] = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, index)
        yield (index := heapq.heappop(ready))
        sorter.done(index)
