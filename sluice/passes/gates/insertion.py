"""The nodes that gates add to a graph: they multiply tensors by masks, threshold weights, and mask statistics.

1. A mask is computed once per group and reshaped to broadcast against each of its tensors; an axis on which several
   groups lie, or one out of order, gets its multipliers by one gather.
2. Every added node carries `TAG` in its ``meta``: ``mask`` (a mask, or computed from masks), ``scale`` (tensor times
   mask), ``rank`` (thresholded weight), ``norm`` (a norm with masked statistics). `strip_gates` goes by it.
3. A thresholded weight stands right behind the weight, before every mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sluice.passes.gates.filter_gates import Gates
from sluice.passes.gates.masked_statistics import TAG, mask_norm
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.placement_torch import Placement, normed_axes

__all__ = ["TAG", "Inserter", "along"]


def along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """A vector shaped to broadcast along one axis of a tensor with ``ndim`` axes."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


class Inserter:
    """Puts ``gates`` into ``gm``, which is changed: `run` for axis groups, then `scale_blocks`, then `threshold`."""

    def __init__(self, gm: fx.GraphModule, analysis: Analysis, gates: Gates):
        self.gm, self.analysis, self.gates = gm, analysis, gates
        self.anchor = next(node for node in gm.graph.nodes if node.op != "placeholder")
        self.masks: dict[int, fx.Node] = {}
        self.vectors: dict[bytes, fx.Node] = {}

    def run(self, placement: Placement) -> None:
        reads = {n: n.target for n in self.gm.graph.nodes if n.op == "get_attr"}
        for param, axis in sorted(placement.refs):
            vector = self._multiplier(self._lies_on(param, axis))
            for node in [n for n, target in reads.items() if target == param]:
                self._scale(node, vector, axis)
        nodes = {node.name: node for node in self.gm.graph.nodes}
        for norm in placement.norms:
            vectors = {axis.dim: self._multiplier(axis.layers) for axis in normed_axes(self.analysis, norm)}
            mask_norm(self.gm, nodes[norm.node], vectors, len(self.analysis.shapes[norm.value]))

    def scale_blocks(self, blocks: Mapping[str, Sequence[str]]) -> None:
        for name, tensors in blocks.items():
            with self.gm.graph.inserting_before(self.anchor):
                mask = self.gm.graph.call_module(f"gates.{self.gates.key(f'{name}|drop')}")
            mask.meta = {TAG: "mask"}
            for node in [n for n in self.gm.graph.nodes if n.op == "get_attr" and n.target in tensors]:
                self._scale(node, mask, 0)

    def threshold(self, ranks: Mapping[str, str]) -> None:
        """Rule 3: comes last."""
        for param, form in ranks.items():
            path = f"gates.{self.gates.key(f'{param}|{form}|rank')}"
            first, *others = [n for n in self.gm.graph.nodes if n.op == "get_attr" and n.target == param]
            with self.gm.graph.inserting_after(first):
                result = self.gm.graph.call_module(path, (first,))
            result.meta = {TAG: "rank"}
            for node in (first, *others):  # a shared weight is thresholded once
                node.replace_all_uses_with(result, delete_user_cb=lambda user, own=result: user is not own)

    def _lies_on(self, param: str, axis: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Groups and channels at every index; groups that share an index come one after the other."""
        layers: list[tuple[np.ndarray, np.ndarray]] = []
        for index, group in enumerate(self.analysis.groups):
            for ref in group.refs:
                if (ref.param, ref.axis) == (param, axis):
                    mine = ref.channels >= 0
                    groups, channels = next((own for own in layers if (own[0][mine] < 0).all()), (None, None))
                    if groups is None or channels is None:
                        groups, channels = np.full(len(mine), -1), np.zeros(len(mine), dtype=np.int64)
                        layers.append((groups, channels))
                    groups[mine], channels[mine] = index, ref.channels[mine]
        return layers

    def _multiplier(self, layers: Iterable[tuple[np.ndarray, np.ndarray]]) -> fx.Node:
        """The product of the masks of all groups at every index."""
        vectors = [self._expanded(groups, channels) for groups, channels in layers]
        found = vectors[0]
        for vector in vectors[1:]:
            with self.gm.graph.inserting_before(self.anchor):
                found = self.gm.graph.call_function(torch.ops.aten.mul.Tensor, (found, vector))
            found.meta = {TAG: "mask"}
        return found

    def _scale(self, node: fx.Node, vector: fx.Node, axis: int) -> None:
        ndim = len(self.analysis.tensors[str(node.target)])
        last = next((u for u in node.users if u.meta.get(TAG) == "scale"), node)
        while nested := next((u for u in last.users if u.meta.get(TAG) == "scale"), None):
            last = nested
        readers = [u for u in last.users if not u.meta.get(TAG)]
        with self.gm.graph.inserting_after(max(last, vector)):
            shape = [-1 if i == axis else 1 for i in range(ndim)]
            shaped = self.gm.graph.call_function(torch.ops.aten.view.default, (vector, shape))
        dtype = self.gm.state_dict()[str(node.target)].dtype
        if dtype in (torch.float16, torch.bfloat16):  # gates stay in single precision
            shaped.meta = {TAG: "mask"}
            with self.gm.graph.inserting_after(shaped):
                shaped = self.gm.graph.call_function(torch.ops.aten._to_copy.default, (shaped,), {"dtype": dtype})
        with self.gm.graph.inserting_after(shaped):
            scaled = self.gm.graph.call_function(torch.ops.aten.mul.Tensor, (last, shaped))
        shaped.meta, scaled.meta = {TAG: "mask"}, {TAG: "scale"}
        for reader in readers:
            reader.replace_input_with(last, scaled)

    def _mask(self, group: int) -> fx.Node:
        if group not in self.masks:
            path = f"gates.{self.gates.key(self.analysis.groups[group].name)}"
            with self.gm.graph.inserting_before(self.anchor):
                self.masks[group] = self.gm.graph.call_module(path)
            self.masks[group].meta = {TAG: "mask"}
        return self.masks[group]

    def _expanded(self, groups: np.ndarray, channels: np.ndarray) -> fx.Node:
        """The multiplier of every index: its channel's mask, 1 where no group lies."""
        present = [int(g) for g in np.unique(groups)]
        if len(present) == 1 and present[0] >= 0:
            size = self.analysis.groups[present[0]].size
            if len(channels) == size and (channels == np.arange(size)).all():
                return self._mask(present[0])
        key = groups.tobytes() + channels.tobytes()
        if key not in self.vectors:
            self.vectors[key] = self._gather(groups, channels, [g for g in present if g >= 0])
        return self.vectors[key]

    def _gather(self, groups: np.ndarray, channels: np.ndarray, present: list[int]) -> fx.Node:
        offset, offsets = 1, {}
        for group in present:
            offsets[group] = offset
            offset += self.analysis.groups[group].size
        index = np.array([offsets[g] + c if g >= 0 else 0 for g, c in zip(groups, channels, strict=True)])
        name = f"index_{len(self.vectors)}"
        device = next(self.gates.parameters()).device
        self.gates.register_buffer(name, torch.tensor(index, device=device), persistent=False)
        if "one" not in self.gates._buffers:
            self.gates.register_buffer("one", torch.ones(1, device=device), persistent=False)
        masks = [self._mask(group) for group in present]
        graph = self.gm.graph
        with graph.inserting_before(self.anchor):
            nodes: list[Any] = [graph.get_attr("gates.one"), graph.get_attr(f"gates.{name}")]
            joined = graph.call_function(torch.ops.aten.cat.default, ([nodes[0], *masks],))
            vector = graph.call_function(torch.ops.aten.index_select.default, (joined, 0, nodes[1]))
        for node in (*nodes, joined, vector):
            node.meta = {TAG: "mask"}
        return vector
