"""Put gates into a captured graph, and bake a choice into the weights.

    effective weight = filter masks * block mask * D_tau(weight)

1. `insert_gates`: a weight with a rank gate is thresholded first. Then every tensor named by
   `sluice.passes.graph.placement_torch` is multiplied by the masks of its groups, and the closing tensors of a block by
   the mask of the block. Layer and group norms over gated axes get masked statistics. Parameter names do not change;
   the gates live under ``gates``.
2. `close_gates` does the same to the weights, with 0/1 masks and hard ranks, and removes the gates. The closed network
   has the user's own architecture and computes what the gated network computes under those decisions. Only a norm, or a
   mean over channels, keeps its (constant) mask, because no weight can make it leave a channel out of its statistics.
3. A rank is cut after masking, from the remaining rows and columns: the others take no rank.
4. `strip_gates`: the dense network with the trained weights, nothing baked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Factorize, Merge
from sluice.passes.cut.factor_torch import truncate_torch
from sluice.passes.cut.resolve import tensor_masks
from sluice.passes.gates.fading import fade, fading_values
from sluice.passes.gates.filter_gates import REFRESH, BlockGate, Gate, Gates
from sluice.passes.gates.insertion import TAG, Inserter, along
from sluice.passes.gates.masked_statistics import mask_norm, masked_norm, unmask_norm
from sluice.passes.gates.merge_gates import exclude_each_other
from sluice.passes.gates.rank_gates import RankGate
from sluice.passes.graph.capture import MARK, Inputs, capture, clone
from sluice.passes.graph.groups import Analysis, check_cuttable, keep_masks
from sluice.passes.graph.placement_torch import Placement, normed_axes, normed_groups, place_gates
from sluice.passes.search_space import SearchSpace, find_search_space, read_torch

__all__ = ["Gated", "absorb_masks", "bake", "close_gates", "insert_gates", "masked_norm", "strip_gates"]

KINDS = ("filter", "rank", "block", "merge")


class Gated(fx.GraphModule):
    """A captured network with gates; ``step()`` once per optimizer step."""

    gates: Gates

    def step(self) -> None:
        """Advance the schedules of the gates, and compute singular directions where they are due."""
        self.gates.step()
        self.gates.refresh(self.get_parameter)


def insert_gates(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    steps: int = 1000,
    exclude: Sequence[str] = (),
    kinds: Collection[str] = ("filter",),
    ranks: Mapping[str, str] | None = None,
    blocks: Mapping[str, Sequence[str]] | None = None,
    merges: Mapping[str, Merge] | None = None,
    refresh: int = REFRESH,
    space: SearchSpace | None = None,
) -> Gated:
    """Insert a filter gate at every axis group, and gates of ranks and of blocks where asked for.

    Args:
        model: any module `sluice.capture` takes; it is not changed.
        example_inputs: tensor, tuple or mapping; axis 0 is the batch.
        steps: optimizer steps over which the gates harden.
        exclude: module names or shell patterns whose widths must not change.
        kinds: without ``"filter"`` no filter gates; the others follow from the next three.
        ranks: by name of a weight the form of `sluice.core.plan.FORMS` whose matrix is thresholded.
        blocks: by name of a residual branch the tensors that make it zero: weight and bias of its last norm, or of its
            last convolution.
        merges: by its switch in the latency model a merge (`sluice.passes.gates.merge_gates`).
        refresh: steps between two computations of singular directions; 1 is exact.
        space: the network's search space where it is known already, exclusions applied.
    Raises:
        SluiceError: the model cannot be captured, has no width to cut where filters are to be gated, or ``ranks``,
            ``blocks`` and ``merges`` do not fit it.
    """
    ranks, blocks = dict(ranks or {}), {name: tuple(tensors) for name, tensors in (blocks or {}).items()}
    merges = dict(merges or {})
    wrong = [kind for kind in kinds if kind not in KINDS]
    empty = [
        kind for kind, places in zip(KINDS[1:], (ranks, blocks, merges), strict=True) if kind in kinds and not places
    ]
    if wrong or empty:
        told = f"{wrong[0]!r} is no kind of gate" if wrong else f"kind {empty[0]!r} has no place to go"
        raise SluiceError(
            f"{told}; kinds are {list(KINDS)}, and ranks=, blocks= and merges= say where the last three go"
        )
    gm = capture(model, example_inputs)
    if hasattr(gm, "gates"):
        raise SluiceError("the network has gates already; give the one that they were put into, or that of strip_gates")
    space = space if space is not None else find_search_space(read_torch(gm), exclude)
    analysis = space.analysis
    if "filter" in kinds:
        check_cuttable(analysis)
    placement = place_gates(gm, analysis)
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    state = gm.state_dict(keep_vars=True)
    for name in (*ranks, *[tensor for tensors in blocks.values() for tensor in tensors]):
        if name not in read or not isinstance(state.get(name), nn.Parameter):
            raise SluiceError(f"cannot gate {name!r}: the model computes with no parameter of this name")
    sizes = {g.name: g.size for g in analysis.groups} if "filter" in kinds else {}
    fading, merged = fading_values(gm, merges), exclude_each_other(merges)
    ranked = [RankGate(name, form, state[name]) for name, form in ranks.items()]
    gates = Gates(sizes, steps, ranked, blocks, merged, refresh)
    gm.add_module("gates", gates.to(next(gm.parameters()).device))
    inserter = Inserter(gm, analysis, gates)
    if sizes:
        inserter.run(placement)
    inserter.scale_blocks(blocks)
    inserter.threshold(ranks)
    if fading:
        fade(gm, gates, merged, fading)
    gm.graph.lint()
    gated = Gated(gm, gm.graph)
    _adopt(gated, gm)
    gated.meta.update({"space": space, "placement": placement, "blocks": blocks, **gm.meta})
    return gated.train(model.training)


def strip_gates(gated: Gated, *, thresholded: bool = False) -> fx.GraphModule:
    """The captured network without gates, with the weights as they are.

    ``thresholded``: weights with a rank gate are thresholded, which gives the network that was trained.
    """
    gm = fx.GraphModule(gated, gated.graph)
    _adopt(gm, gated)
    gm.meta.update(gated.meta)
    gm = clone(gm)
    for node in reversed(list(gm.graph.nodes)):
        if node.meta.get(TAG) == "norm":
            unmask_norm(gm, node)
    for node in list(gm.graph.nodes):
        if node.meta.get(TAG) in ("scale", "rank", "fade"):
            node.replace_all_uses_with(node.args[0])
    for node in reversed(list(gm.graph.nodes)):
        if node.meta.get(TAG):
            gm.graph.erase_node(node)
    del gm._modules["gates"]
    if thresholded:
        with torch.no_grad():
            for _, gate in gated.gates.items():
                if isinstance(gate, RankGate):
                    gm.get_parameter(gate.param).copy_(gate.thresholded(gated.get_parameter(gate.param)))
    gm.graph.lint()
    gm.recompile()
    return gm


def absorb_masks(gated: Gated) -> None:
    """Multiply the masks into the weights, in place, and open the gates: the same function with every mask 1.

    Groups whose channels a layer or group norm takes its statistics over keep their masks, which no weight can hold.
    """
    analysis, placement = gated.meta["space"].analysis, gated.meta["placement"]
    state = gated.state_dict(keep_vars=True)
    normed = normed_groups(analysis, placement)
    with torch.no_grad():
        for index, group in enumerate(analysis.groups):
            if index in normed or group.name not in set(gated.gates):
                continue
            gate = gated.gates[group.name]
            assert isinstance(gate, Gate)
            mask = gate()
            for ref in group.refs:
                if (ref.param, ref.axis) in placement.refs:
                    mine = torch.as_tensor(ref.channels, device=mask.device)
                    vector = torch.where(mine >= 0, mask[mine.clamp(min=0)], torch.ones_like(mask[:1]))
                    state[ref.param].mul_(along(vector.to(state[ref.param]), state[ref.param].ndim, ref.axis))
            gate.open_all()
        for name, tensors in gated.meta["blocks"].items():
            block = gated.gates[f"{name}|drop"]
            assert isinstance(block, BlockGate)
            for tensor in tensors:
                state[tensor].mul_(block.open().to(state[tensor]))
            block.open.open_all()


def close_gates(
    gated: Gated,
    kept: Mapping[str, Sequence[int]],
    *,
    ranks: Mapping[str, tuple[str, int]] | None = None,
    blocks: Collection[str] = (),
) -> fx.GraphModule:
    """Bake a choice into the weights.

    A weight with a rank gate is thresholded, whether or not ``ranks`` cuts it further.

    Args:
        kept: by axis group the indices of the channels that stay; groups not named stay whole.
        ranks: by name of a weight form and rank to cut it to.
        blocks: names of the residual branches that go.
    Raises:
        SluiceError: an unknown group, weight or block.
    """
    gm = strip_gates(gated, thresholded=True)
    known = gated.meta["blocks"]
    unknown = [name for name in blocks if name not in known]
    if unknown:
        raise SluiceError(f"block {unknown[0]!r} has no gate; gated blocks are {sorted(known)}")
    analysis: Analysis = gated.meta["space"].analysis
    zeroed = {tensor for name in blocks for tensor in known[name]}
    return bake(gm, analysis, gated.meta["placement"], keep_masks(analysis, kept), ranks=ranks, zeroed=zeroed)


def bake(
    gm: fx.GraphModule,
    analysis: Analysis,
    placement: Placement,
    keeps: list[np.ndarray],
    *,
    ranks: Mapping[str, tuple[str, int]] | None = None,
    zeroed: Collection[str] = (),
) -> fx.GraphModule:
    """A copy of a captured graph whose removed channels, ranks and blocks carry nothing.

    Args:
        keeps: one boolean mask per group of ``analysis``.
        ranks: by name of a weight form and rank to cut it to.
        zeroed: tensors that become zero.
    """
    gm = clone(gm)
    state = gm.state_dict(keep_vars=True)
    masks = tensor_masks(analysis, keeps)
    with torch.no_grad():
        for param, axis in masks:
            if (param, axis) in placement.refs or param in (ranks or {}):  # the others lose nothing
                vector = torch.tensor(masks[(param, axis)], dtype=state[param].dtype)
                state[param].mul_(along(vector, state[param].ndim, axis).to(state[param].device))
        truncate_torch(gm, [Factorize(param, form, rank) for param, (form, rank) in (ranks or {}).items()])
        for param in zeroed:
            state[param].zero_()
    nodes = {node.name: node for node in gm.graph.nodes}
    for norm in placement.norms:
        found = {axis.dim: axis.mask(keeps) for axis in normed_axes(analysis, norm)}
        vectors = {}
        for dim, mask in found.items():
            if not mask.all():
                name = f"kept_{norm.node}_{dim}"
                kept = torch.tensor(mask, dtype=torch.float32, device=next(gm.parameters()).device)
                gm.register_buffer(name, kept, persistent=False)
                with gm.graph.inserting_before(nodes[norm.node]):
                    vectors[dim] = gm.graph.get_attr(name)
        if vectors:
            mask_norm(gm, nodes[norm.node], vectors, len(analysis.shapes[norm.value]))
    gm.meta.pop(MARK, None)
    gm.recompile()
    return gm


def _adopt(target: fx.GraphModule, source: fx.GraphModule) -> None:
    """Share every tensor and mode of ``source``, also those that no node reads."""
    target._modules.update(source._modules)
    target._parameters.update(source._parameters)
    lifted = target._buffers.keys() - source._buffers.keys()  # constants, which the network does not save
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set | lifted
    target.training = source.training
