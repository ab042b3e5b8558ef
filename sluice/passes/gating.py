"""Put gates into a captured graph, and bake a choice into the weights.

1. `insert_gates`: every tensor named by `sluice.passes.placement` is multiplied by the masks of its groups inside the
   graph; layer and group norms over gated axes get masked statistics. Parameter names do not change; the gates live
   under ``gates``.
2. `close_gates`: the same multiplications by 0/1 masks are carried out on the weights, the gates go, and what is left
   is the user's own architecture computing what the gated model computes under those hard masks. Only a layer or
   group norm keeps its (constant) mask, because no weight can make it leave a channel out of its statistics.
3. `strip_gates`: the dense network with the trained weights, nothing baked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sluice.errors import SluiceError
from sluice.gates import Gates
from sluice.passes.aten import analyze
from sluice.passes.capture import MARK, Inputs, capture, clone
from sluice.passes.placement import Placement, place_gates
from sluice.passes.resolve import tensor_masks
from sluice.passes.sites import Analysis, keep_masks
from sluice.passes.walk import arguments, operator_name

__all__ = ["Gated", "bake", "close_gates", "insert_gates", "masked_norm", "strip_gates"]

TAG = "sluice_gate"


class Gated(fx.GraphModule):
    """A captured network with gates; ``step()`` once per optimizer step."""

    gates: Gates

    def step(self) -> None:
        """Advance the schedules of the gates."""
        self.gates.step()


def masked_norm(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, dims: list[int], groups: int, eps: float
) -> Tensor:
    """Layer norm (``groups == 0``) or group norm with statistics weighted by ``mask``, which broadcasts against x.

    ``mean = sum(m x) / sum(m)``, ``var = sum(m (x - mean)^2) / sum(m)`` over ``dims``; with a 0/1 mask these are the
    statistics of the kept channels.
    """
    shape, dtype = x.shape, x.dtype
    mask = mask.to(torch.promote_types(dtype, torch.float32))  # half precision would lose the statistics
    if groups:
        x = x.reshape(shape[0], groups, -1, *shape[2:])
        mask = mask.reshape(1, groups, -1, *[1] * (len(shape) - 2))
    m = mask.expand(x.shape)
    total = m.sum(dims, keepdim=True).clamp(min=1e-6)
    mean = (m * x).sum(dims, keepdim=True) / total
    var = (m * (x - mean) ** 2).sum(dims, keepdim=True) / total
    x = ((x - mean) * torch.rsqrt(var + eps)).reshape(shape)
    tail = [1] * (len(shape) - 2) if groups else []
    x = x if weight is None else x * weight.reshape(*weight.shape, *tail)
    x = x if bias is None else x + bias.reshape(*bias.shape, *tail)
    return x.to(dtype)


def insert_gates(model: nn.Module, example_inputs: Inputs, *, steps: int = 1000, exclude: Sequence[str] = ()) -> Gated:
    """Insert a filter gate at every axis group.

    Args:
        model: any module `sluice.capture` takes; it is not changed.
        example_inputs: tensor, tuple or mapping; axis 0 is the batch.
        steps: optimizer steps over which the gates harden.
        exclude: module names or shell patterns whose widths must not change.
    Raises:
        SluiceError: the model cannot be captured or has nothing to cut.
    """
    gm = capture(model, example_inputs)
    analysis = analyze(gm, exclude)
    placement = place_gates(gm, analysis)
    gates = Gates({g.name: g.size for g in analysis.groups}, steps)
    if hasattr(gm, "gates"):
        raise SluiceError("the model already has a submodule or tensor named 'gates'; rename it")
    gm.add_module("gates", gates.to(next(gm.parameters()).device))
    _Inserter(gm, analysis, gates).run(placement)
    gm.graph.lint()
    gated = Gated(gm, gm.graph)
    _adopt(gated, gm)
    gated.meta.update({"analysis": analysis, "placement": placement, **gm.meta})
    return gated.train(model.training)


def strip_gates(gated: Gated) -> fx.GraphModule:
    """The captured network without gates, with the weights as they are."""
    gm = fx.GraphModule(gated, gated.graph)
    _adopt(gm, gated)
    gm.meta.update(gated.meta)
    gm = clone(gm)
    for node in reversed(list(gm.graph.nodes)):
        tag = node.meta.get(TAG)
        if tag == "norm":
            x, _, weight, bias = node.args[:4]
            a = {**node.meta["original"], "input": x, "weight": weight, "bias": bias}
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(node.meta["operator"], tuple(a.values()))
            new.meta = {"val": node.meta["val"]}
            new._rename(node.meta["name"])
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if node.meta.get(TAG) == "scale":
            node.replace_all_uses_with(node.args[0])
    for node in reversed(list(gm.graph.nodes)):
        if node.meta.get(TAG):
            gm.graph.erase_node(node)
    del gm._modules["gates"]
    gm.graph.lint()
    gm.recompile()
    return gm


def close_gates(gated: Gated, kept: Mapping[str, Sequence[int]]) -> fx.GraphModule:
    """Bake the choice ``kept`` (group -> indices of the channels that stay) into the weights."""
    gm = strip_gates(gated)
    analysis: Analysis = gated.meta["analysis"]
    return bake(gm, analysis, gated.meta["placement"], keep_masks(analysis, kept))


def bake(gm: fx.GraphModule, analysis: Analysis, placement: Placement, keeps: list[np.ndarray]) -> fx.GraphModule:
    """A copy of a captured graph whose removed channels carry nothing."""
    gm = clone(gm)
    state = gm.state_dict(keep_vars=True)
    masks = tensor_masks(analysis, keeps)
    with torch.no_grad():
        for param, axis in placement.refs & masks.keys():  # the others lose nothing
            vector = torch.tensor(masks[(param, axis)], dtype=state[param].dtype)
            state[param].mul_(_along(vector, state[param].ndim, axis).to(state[param].device))
    nodes = {node.name: node for node in gm.graph.nodes}
    for name in placement.norms:
        axis_mask = analysis.values[name].mask(keeps)
        if not axis_mask.all():
            kept = torch.tensor(axis_mask, dtype=torch.float32, device=next(gm.parameters()).device)
            gm.register_buffer(f"kept_{name}", kept, persistent=False)
            with gm.graph.inserting_before(nodes[name]):
                mask = gm.graph.get_attr(f"kept_{name}")
            _mask_norm(gm, nodes[name], mask, analysis)
    gm.meta.pop(MARK, None)
    gm.recompile()
    return gm


def _along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _adopt(target: fx.GraphModule, source: fx.GraphModule) -> None:
    """Share every tensor and mode of ``source``, also those that no node reads."""
    target._modules.update(source._modules)
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    target.training = source.training


def _mask_norm(gm: fx.GraphModule, node: fx.Node, mask: fx.Node, analysis: Analysis) -> fx.Node:
    """Replace a layer or group norm node by `masked_norm`."""
    a, rank = arguments(node), len(analysis.shapes[node.name])
    dim = analysis.values[node.name].dim
    grouped = operator_name(node) == "group_norm"
    dims = list(range(2, rank + 1)) if grouped else list(range(rank - len(a["normalized_shape"]), rank))
    with gm.graph.inserting_before(node):
        shaped = gm.graph.call_function(
            torch.ops.aten.view.default, (mask, [-1 if i == dim else 1 for i in range(rank)])
        )
        args = (a["input"], shaped, a["weight"], a["bias"], dims, a["num_groups"] if grouped else 0, a["eps"])
        new = gm.graph.call_function(masked_norm, args)
    shaped.meta = {TAG: "mask"}
    new.meta = {"val": node.meta["val"], TAG: "norm", "original": a, "operator": node.target, "name": node.name}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


class _Inserter:
    def __init__(self, gm: fx.GraphModule, analysis: Analysis, gates: Gates):
        self.gm, self.analysis, self.gates = gm, analysis, gates
        self.anchor = next(node for node in gm.graph.nodes if node.op != "placeholder")
        self.masks: dict[int, fx.Node] = {}
        self.vectors: dict[bytes, fx.Node] = {}

    def run(self, placement: Placement) -> None:
        reads = {n: n.target for n in self.gm.graph.nodes if n.op == "get_attr"}
        for param, axis in sorted(placement.refs):
            groups, channels = self._lies_on(param, axis)
            vector = self._expanded(groups, channels)
            for node in [n for n, target in reads.items() if target == param]:
                self._scale(node, vector, axis)
        for name in placement.norms:
            value = self.analysis.values[name]
            node = next(n for n in self.gm.graph.nodes if n.name == name)
            _mask_norm(self.gm, node, self._expanded(value.groups, value.channels), self.analysis)

    def _lies_on(self, param: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.analysis.tensors[param][axis]
        groups, channels = np.full(length, -1), np.zeros(length, dtype=np.int64)
        for index, group in enumerate(self.analysis.groups):
            for ref in group.refs:
                if (ref.param, ref.axis) == (param, axis):
                    mine = ref.channels >= 0
                    groups[mine], channels[mine] = index, ref.channels[mine]
        return groups, channels

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
