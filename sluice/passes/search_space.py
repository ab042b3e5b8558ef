"""The search space of a network: the one value that `inspect` prints and that profiler, gates, closing and report take.

1. A `Reading` is what one front end says of a graph: axis groups, operators, chains of convolutions, tensors. The
   search space follows from a reading alone, so the torch graph and the ONNX graph of one network give the same.
2. It holds every site: the groups whose widths can be chosen, the weights that can be factorised and in which forms,
   the residual blocks that can be dropped, the segments of convolutions that can be merged. Later stages decide which
   sites are timed, and which are worth their loss.
3. Everything else is left alone, with a reason. Patterns of the user are applied here
   (`sluice.passes.graph.exclusion`).
4. Where two readings of one network differ, a site is one that both have, and the difference is the reason (`agreed`).
   A site of one reading alone would be promised in one graph and not be cut in the other.

Numpy and onnx; a torch graph is read only where one is given.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from sluice.core.errors import SluiceError
from sluice.passes.cut.factor import forms_of, max_rank
from sluice.passes.graph.blocks import Block, find_blocks
from sluice.passes.graph.chains import Chain
from sluice.passes.graph.exclusion import TYPE, excluded_by, leave_out
from sluice.passes.graph.groups import Analysis, agreeing, module_of, named_like
from sluice.passes.graph.view import GraphView
from sluice.passes.graph.width_limits import FREE, WidthLimit, WidthLimits
from sluice.passes.merge_sites import MergeSite, find_merge_sites

if TYPE_CHECKING:
    import onnx
    from torch import fx

__all__ = [
    "RankSite",
    "Reading",
    "SearchSpace",
    "agreed",
    "called_like",
    "find_search_space",
    "read_onnx",
    "read_torch",
]

LEAST = 8  # a weight with fewer rows or columns has no rank to choose
CONTROL_FLOW = ("If", "Loop", "Scan")
READINGS = {"torch": "torch graph", "onnx": "ONNX graph"}


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one front end says of a network, before anything is left out.

    ``kind`` is ``"torch"`` or ``"onnx"``. ``tensors`` holds the named tensors, ``buffers`` the names of those that
    nothing trains, ``notes`` what a runtime makes of an operator of a file, where that is not what is written.
    """

    kind: str
    analysis: Analysis
    view: GraphView
    chains: tuple[Chain, ...]
    tensors: Mapping[str, np.ndarray]
    buffers: frozenset[str] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankSite:
    """A weight that can be factorised: its shape, and by form the rank at which nothing is lost."""

    shape: tuple[int, ...]
    forms: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class SearchSpace:
    """All sites of a network, and by name why everything else is left alone.

    Attributes:
        analysis: the axis groups, and the tensors on whose axes they lie.
        ranks: by weight.
        blocks: in execution order, inner before outer ones.
        merges: every segment with every kernel that it could have.
        left_alone: by module why its widths stay, by weight why it is no layer whose width can be chosen.
        unfactorised: by weight, of the weights of layers.
        undropped: additions of two activations that are no residual block, and excluded blocks.
        unmerged: by weight, of convolutions; ``<weight>..`` of a residual block that cannot be folded.
        kind: which graph was read, as in `Reading`.
        unmatched: names of groups that another reading of the network has and this one lacks (rule 4).
        limits: by group, what is asked of its widths.
    """

    analysis: Analysis
    ranks: Mapping[str, RankSite]
    blocks: tuple[Block, ...]
    merges: tuple[MergeSite, ...]
    left_alone: Mapping[str, str]
    unfactorised: Mapping[str, str]
    undropped: Mapping[str, str]
    unmerged: Mapping[str, str]
    kind: str
    unmatched: frozenset[str] = frozenset()
    limits: Mapping[str, WidthLimit] = field(default_factory=dict)

    @property
    def has_sites(self) -> bool:
        return bool(self.analysis.groups or self.ranks or self.blocks or self.merges)

    def without(self, weights: Collection[str]) -> SearchSpace:
        """The space without the ranks, blocks and merges of these weights; widths stay."""
        gone = frozenset(weights)
        return replace(
            self,
            ranks={name: site for name, site in self.ranks.items() if name not in gone},
            blocks=tuple(block for block in self.blocks if gone.isdisjoint(block.params)),
            merges=tuple(site for site in self.merges if gone.isdisjoint(site.segment.layers)),
        )


def read_onnx(model: onnx.ModelProto, full: onnx.ModelProto | None = None, *, dims: bool = False) -> Reading:
    """The reading of an ONNX graph whose initialisers carry parameter names.

    Args:
        full: the model that has the numbers of hollow tensors.
        dims: the dimensions of attention heads are groups as well.
    """
    from sluice.passes.cut.pools_onnx import padded_pools
    from sluice.passes.graph.chains_onnx import chains_onnx
    from sluice.passes.graph.onnx_axes import analyze_onnx
    from sluice.passes.graph.onnx_file import buffers_of
    from sluice.passes.graph.onnx_numbers import Numbers
    from sluice.passes.graph.view_onnx import view_onnx

    buffers = frozenset(buffers_of(model))
    return Reading(
        "onnx",
        analyze_onnx(model, dims=dims),
        view_onnx(model),
        chains_onnx(model),
        Numbers(model, full),
        buffers,
        padded_pools(model),
    )


def read_torch(gm: fx.GraphModule, *, dims: bool = False) -> Reading:
    """The reading of a captured torch graph; groups that no masks can close are left alone.

    ``dims``: the dimensions of attention heads are groups as well.
    """
    from sluice.passes.graph.aten import analyze
    from sluice.passes.graph.chains_torch import chains_torch
    from sluice.passes.graph.placement_torch import closable
    from sluice.passes.graph.view_torch import view_torch

    state = {name: tensor.detach().cpu() for name, tensor in gm.state_dict().items()}
    # numpy has no bfloat16, and the norms of weights are added up in float anyway
    tensors = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in state.items()}
    buffers = frozenset(name for name, _ in gm.named_buffers())
    analysis = closable(gm, analyze(gm, needed=False, dims=dims))
    return Reading("torch", analysis, view_torch(gm), chains_torch(gm), tensors, buffers)


def find_search_space(reading: Reading, exclude: Sequence[str] = (), limits: WidthLimits = FREE) -> SearchSpace:
    """All sites of a network (rules 2 and 3).

    Args:
        exclude: names or shell patterns of tensors, modules, or modules around them; ``type:Conv`` for the tensors of
            an operator of a file.
        limits: of widths.
    Raises:
        SluiceError: a pattern means no layer.
    """
    exclude = _named(reading, exclude)
    analysis = leave_out(reading.analysis, exclude)
    ranks, unfactorised = _ranks(reading, exclude)
    blocks, undropped = _blocks(reading, exclude)
    merges, unmerged = find_merge_sites(reading.chains, reading.tensors, analysis, exclude)
    untrained = {name: why for name, why in unfactorised.items() if name in reading.buffers}
    left_alone = {**analysis.frozen, **_silent(reading, analysis), **untrained, **reading.notes}
    return SearchSpace(analysis, ranks, blocks, merges, left_alone, unfactorised, undropped, unmerged, reading.kind,
                       limits=limits.of(analysis))  # fmt: skip


def _named(reading: Reading, exclude: Sequence[str]) -> Sequence[str]:
    """The patterns, operators replaced by the tensors that they read."""
    found: list[str] = []
    layers = {param for param, _ in reading.analysis.producers}
    for each in exclude:
        kind = each.removeprefix(TYPE)
        own = [n for node in reading.view.nodes if node.op == kind for n in node.tensors if n in layers]
        if kind != each and not own:
            raise SluiceError(f"exclude={each!r} means no operator with a weight; see `sluice inspect` for the layers")
        found += [each] if kind == each else own
    return found


def called_like(space: SearchSpace, other: SearchSpace) -> SearchSpace:
    """The same sites, groups and blocks called as in ``other``, another reading of the same network."""
    named = {_layers(block): block.name for block in other.blocks}
    blocks = tuple(replace(block, name=named.get(_layers(block), block.name)) for block in space.blocks)
    return replace(space, analysis=named_like(space.analysis, other.analysis), blocks=blocks)


def agreed(space: SearchSpace, other: SearchSpace) -> SearchSpace:
    """The sites of ``space`` that ``other``, another reading of the same network, has as well (rule 4).

    Groups and blocks are called as they are in ``other``. ``left_alone`` tells every site that one of them lacks.
    """
    space = called_like(space, other)
    mine, theirs = READINGS[space.kind], READINGS[other.kind]
    analysis = agreeing(space.analysis, other.analysis, f"its width is no group of the {theirs}, so it stays")
    missed = agreeing(other.analysis, space.analysis, f"its width is no group of the {mine}, so it stays")
    told = {name: why for name, why in missed.frozen.items() if other.analysis.frozen.get(name) != why}
    unmatched = {group.name for group in other.analysis.groups} - {group.name for group in analysis.groups}
    drops = {_layers(block) for block in other.blocks}
    merges = {site.switch for site in other.merges}
    lost = (
        *(("cannot be factorised", name) for name in space.ranks if name not in other.ranks),
        *(("is no residual block", block.name) for block in space.blocks if _layers(block) not in drops),
        *(("is no merge", site.switch) for site in space.merges if site.switch not in merges),
    )
    return replace(
        space,
        analysis=analysis,
        ranks={name: site for name, site in space.ranks.items() if name in other.ranks},
        blocks=tuple(block for block in space.blocks if _layers(block) in drops),
        merges=tuple(site for site in space.merges if site.switch in merges),
        left_alone={
            **told,
            **space.left_alone,
            **analysis.frozen,
            **{name: f"{what} in the {theirs}, so it stays" for what, name in lost},
        },
        unmatched=frozenset(unmatched),
    )


def _layers(block: Block) -> frozenset[str]:
    """The weights that tell a block from others; a view may lack names of other tensors of it."""
    return frozenset(block.layers) or frozenset(block.params)


def _ranks(reading: Reading, exclude: Sequence[str]) -> tuple[dict[str, RankSite], dict[str, str]]:
    """Weights with the forms that they can have, and why other weights of layers have none."""
    view, found, left = reading.view, dict[str, RankSite](), dict[str, str]()
    reads = [name for node in view.nodes if not view.derived.issuperset(node.outputs) for name in node.tensors]
    for node in view.nodes:
        weight = next((t for t in node.tensors if reading.tensors[t].ndim > 1), None)
        if node.kind != "weighted" or weight is None:
            continue
        shape = reading.tensors[weight].shape
        into = next((view.shapes[v] for v in node.inputs if v in view.shapes and v not in view.derived), None)
        forms = {form: max_rank(shape, form) for form in forms_of(shape)}
        rows, columns = shape[0], math.prod(shape[1:])
        if (pattern := excluded_by(weight, exclude)) is not None:
            left[weight] = f"excluded by {pattern!r}"
        elif weight in reading.buffers:
            left[weight] = "is a buffer, not a parameter: no rank"  # nothing would train its factors
        elif reads.count(weight) > 1:
            left[weight] = f"is read {reads.count(weight)} times"
        elif "transpose" in node.op.lower():
            left[weight] = f"is the weight of {node.op}"
        elif len(shape) > 2 and into is not None and into[1] != shape[1]:
            left[weight] = f"is the weight of {into[1] // shape[1]} groups"
        elif min(rows, columns) < LEAST:
            left[weight] = f"is a matrix of {rows} x {columns}, which has no rank to choose"
        else:
            found[weight] = RankSite(tuple(shape), forms)
    return found, left


def _blocks(reading: Reading, exclude: Sequence[str]) -> tuple[tuple[Block, ...], dict[str, str]]:
    """Residual blocks that can be dropped, and why other additions are none."""
    found, refused = find_blocks(reading.view)
    patterns = {block.name: [p for param in block.params if (p := excluded_by(param, exclude))] for block in found}
    excluded = {name: f"excluded by {hits[0]!r}" for name, hits in patterns.items() if hits}
    return tuple(block for block in found if block.name not in excluded), {**refused, **excluded}


def _silent(reading: Reading, analysis: Analysis) -> dict[str, str]:
    """Why a parameter with rows and columns lies on no group, where no reason names its module."""
    view = reading.view
    told = {ref.param for group in analysis.groups for ref in group.refs} | reading.buffers
    readers: dict[str, list[str]] = {}
    for node in view.nodes:
        computes = view.derived.issuperset(node.outputs)
        for name in node.tensors:
            if node.op in CONTROL_FLOW:
                why = f"is read inside {node.op}, which runs by what is computed"
            elif computes:
                why = f"{node.op} computes with it before a layer reads it"
            else:
                why = f"{node.op} has no widths to cut"
            readers.setdefault(name, []).append(why)
    return {
        name: readers[name][-1]
        for name in sorted(view.tensors() - told)
        if reading.tensors[name].ndim > 1 and module_of(name) not in analysis.frozen
    }
