"""The segments of convolutions that can be merged, and why other convolutions are in none.

1. A segment is a site if the merged convolution takes at most `MORE` times the multiplications of the layers that it
   replaces, and its kernel has at most `LARGEST` entries along an axis.
2. Where layers are removed from a segment, the remaining ones may also stay several convolutions, linear between them.
   This is a second way to carry out the same segment; the solver is offered the faster one.
3. A removed layer makes the widths on its two sides one. Where these are two groups, the segment is a site only if
   widths are not chosen (`MergeSite.ties`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.core.plan import Merge
from sluice.passes.cut.merge_ties import groups_on, inside
from sluice.passes.graph.chains import Chain
from sluice.passes.graph.exclusion import excluded_by
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.segments import Segment, find_segments, folded_norms, swallowed

__all__ = ["MergeSite", "find_merge_sites"]

MORE = 1.5
LARGEST = 9  # kernels beyond this have no fast algorithm anywhere


@dataclass(frozen=True, slots=True, eq=False)
class MergeSite:
    """A segment that may be merged, and every weight that goes (projections of swallowed blocks included).

    ``apart``: the kept layers stay several convolutions (rule 2). ``ties``: rule 3.
    """

    segment: Segment
    gone: tuple[str, ...]
    apart: bool = False
    ties: bool = False

    @property
    def merge(self) -> Merge:
        return self.segment.merge(tuple((name,) for name in self.segment.kept) if self.apart else None)

    @property
    def switch(self) -> str:
        """The same for both ways to carry out the segment, as only the faster one is offered."""
        return f"{self.merge.name}|merge {'x'.join(map(str, self.segment.kernel))}"


def find_merge_sites(
    chains: Sequence[Chain], tensors: Mapping[str, np.ndarray], analysis: Analysis, exclude: Sequence[str] = ()
) -> tuple[tuple[MergeSite, ...], dict[str, str]]:
    """The sites of all chains, and by weight why other convolutions are in none.

    Args:
        tensors: by name, at least the weights and the norms of the chains.
        analysis: of the same graph; ``shapes`` of the values that the layers make.
    """
    found: list[MergeSite] = []
    left: dict[str, str] = {}
    on = groups_on(analysis)
    for chain in chains:
        patterns = {layer.weight: excluded_by(layer.weight, exclude) for layer in chain.layers}
        banned = {weight for weight, pattern in patterns.items() if pattern is not None}
        segments = [s for s in find_segments(chain, folded_norms(chain, tensors), banned) if len(s.layers) > 1]
        sites = [
            site
            for segment in segments
            for site in _sites(chain, segment, analysis, on)
            if not any(excluded_by(weight, exclude) for weight in site.gone)
        ]
        found += sites
        possible = {name for segment in segments for name in segment.layers}
        merged = {name for site in sites for name in site.segment.layers}
        for layer in chain.layers:
            if patterns[layer.weight] is not None:
                left[layer.weight] = f"excluded by {patterns[layer.weight]!r}"
            elif len(chain.layers) == 1:
                left[layer.weight] = f"between {chain.before} and {chain.after}"
            elif layer.weight not in possible:
                left[layer.weight] = "no run crosses a stride or part of a residual block"
            elif layer.weight not in merged:
                left[layer.weight] = f"would multiply more than {MORE} times as much, or be larger than {LARGEST}"
        left |= {f"{chain.layers[s.start].weight}..": s.barrier for s in chain.spans if s.barrier is not None}
    return tuple(found), left


def _sites(
    chain: Chain, segment: Segment, analysis: Analysis, on: Mapping[tuple[str, int], str]
) -> Iterator[MergeSite]:
    """Rules 1 and 2."""
    within = inside(analysis, segment.layers, segment.kept, on)
    ties = any(len(within.outer(together)) > 1 for together in within.tied)
    spans = swallowed(chain, segment.start, segment.end)
    gone = (*segment.layers, *(s.shortcut.weight for s in spans if s.shortcut is not None))
    first, last = (analysis.tensors[segment.layers[k]] for k in (0, -1))
    out = analysis.shapes[chain.layers[segment.end - 1].value]
    channels = last[0] * (1 if segment.depthwise else first[1])
    macs = math.prod(out[2:]) * channels * math.prod(segment.kernel)
    replaced = sum(
        math.prod(analysis.shapes[layer.value][2:]) * math.prod(analysis.tensors[layer.weight])
        for layer in chain.layers[segment.start : segment.end]
    )
    if macs <= MORE * replaced and max(segment.kernel) <= LARGEST:
        yield MergeSite(segment, gone, ties=ties)
    if 1 < len(segment.kept) < len(segment.layers) and len(gone) == len(segment.layers):
        yield MergeSite(segment, gone, apart=True, ties=ties)
