"""Segments of a chain that could become one convolution, and the kernels that each of them could have.

LayerMerge (Kim et al. 2024): a segment (i, j] loses its inner activations; some of its convolutions are removed, the
others merge. Which (i, j) are valid:

1. A residual block is swallowed whole, or the segment lies inside of it, or they are disjoint. A block that cannot be
   folded (`Span.barrier`) is never swallowed; a segment as long as such a block leaves the addition as it is.
2. No segment crosses the cut behind a strided convolution, which lies after the 1x1 convolutions that follow it, but
   before the next residual block. This is a rule of cost, as strides compose exactly while kernels grow by the stride:
   ``across_strides`` lifts it.

A convolution is *irreducible* if it changes channels or size; those stay. A removable convolution adds to the kernel by
its own kernel and the stride before it, so these two are its kind. Retained L1 norms add up, so of every kind those
with the largest norm stay: sorting finds them, and no subset is enumerated (reconstruction; the authors try all
``2^n``). Norms are of the weights with batch norm folded in. 1x1 convolutions always stay, and at least one convolution
does. A segment of one layer leaves that layer as it is.

The activation behind the last layer of a segment stays, behind the addition if a block ends there. A segment without
one (linear bottlenecks) gets none. LayerMerge puts a ReLU6 there; here the merged network stays as close as possible to
the function of the dense one. A block none of whose convolutions stays is its shortcut alone, not twice its input.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.graph.chains import Chain, Layer, Span

__all__ = ["Segment", "find_segments", "folded_norms", "is_valid", "swallowed"]


@dataclass(frozen=True, slots=True)
class Segment:
    """``layers[start:end]`` of a chain with the inner activations gone and only ``kept`` left to merge.

    ``kernel``, ``stride`` and ``depthwise`` describe the merged convolution; ``spans`` are the (start, end) of the
    residual blocks whose shortcuts fold into it.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    depthwise: bool
    start: int
    end: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...], bool]:
        """With the sizes at its border, this decides the latency of the segment."""
        return self.start, self.end, self.kernel, self.stride, self.depthwise

    def merge(self, runs: tuple[tuple[str, ...], ...] | None = None) -> Merge:
        """The edit that carries it out: one convolution, or one per run of ``runs``, which split ``kept`` in order."""
        runs = (self.kept,) if runs is None else runs
        if tuple(name for run in runs for name in run) != self.kept:
            raise SluiceError(
                f"bad runs {[list(r) for r in runs]} of the segment {self.layers[0]}..{self.layers[-1]}: together they "
                f"must be its kept convolutions {list(self.kept)}, in order"
            )
        return Merge(self.layers, runs)


def swallowed(chain: Chain, start: int, end: int) -> tuple[Span, ...]:
    """The residual blocks that the segment contains and that fold into it, inner before outer."""
    return tuple(s for s in chain.spans if start <= s.start and s.end <= end and s.barrier is None)


def is_valid(chain: Chain, start: int, end: int, across_strides: bool = False) -> bool:
    """Rules 1 and 2."""
    if end - start == 1:
        return True
    for span in chain.spans:
        disjoint = end <= span.start or span.end <= start
        inside = span.start <= start and end <= span.end
        if not (disjoint or inside or (start <= span.start and span.end <= end and span.barrier is None)):
            return False
    return across_strides or not any(start < cut < end for cut in _cuts(chain))


def _cuts(chain: Chain) -> set[int]:
    """Positions that no segment crosses, by rule 2."""
    borders = {span.start for span in chain.spans}
    cuts = set()
    for index, layer in enumerate(chain.layers):
        if prod(layer.stride) > 1:
            cut = index + 1
            while cut < len(chain.layers) and prod(chain.layers[cut].kernel) == 1 and cut not in borders:
                cut += 1
            cuts.add(cut)
    return cuts


def folded_norms(chain: Chain, tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Sum of absolute values of every layer's weight after its batch norm is folded in."""
    found = {}
    for layer in chain.layers:
        rows = np.abs(tensors[layer.weight]).reshape(layer.shape[0], -1).sum(axis=1, dtype=np.float64)
        if layer.norm is not None:
            gamma = 1.0 if layer.norm.weight is None else np.abs(tensors[layer.norm.weight])
            rows = rows * gamma / np.sqrt(tensors[layer.norm.var] + layer.norm.eps)
        found[layer.weight] = float(rows.sum())
    return found


def find_segments(
    chain: Chain,
    norms: Mapping[str, float],
    exclude: Collection[str] = (),
    across_strides: bool = False,
) -> tuple[Segment, ...]:
    """Every valid segment with every kernel it could have, ordered by (start, end, kernel).

    Args:
        norms: of every weight, see `folded_norms`; any other score that adds up does as well.
        exclude: weights that stay out of every segment.
    """
    found = []
    for start in range(len(chain.layers)):
        for end in range(start + 1, len(chain.layers) + 1):
            if chain.layers[end - 1].weight in exclude:
                break
            if is_valid(chain, start, end, across_strides):
                found += _entries(chain, norms, start, end)
    return tuple(found)


def _entries(chain: Chain, norms: Mapping[str, float], start: int, end: int) -> list[Segment]:
    layers = chain.layers[start:end]
    spans = tuple((s.start, s.end) for s in swallowed(chain, start, end))
    best: dict[tuple[tuple[int, ...], bool], tuple[float, list[Layer]]] = {}
    for kept in _subsets(layers, norms) if len(layers) > 1 else iter([list(layers)]):
        kernel, _ = _shape(kept)
        key = (kernel, all(layer.depthwise for layer in kept))
        norm = sum(norms[layer.weight] for layer in kept)
        if key not in best or norm > best[key][0]:
            best[key] = (norm, kept)
    stride = _shape(layers)[1]
    return [
        Segment(
            tuple(layer.weight for layer in layers),
            tuple(layer.weight for layer in kept),
            kernel,
            stride,
            depthwise,
            start,
            end,
            spans,
        )
        for (kernel, depthwise), (_, kept) in sorted(best.items())
    ]


def _subsets(layers: tuple[Layer, ...], norms: Mapping[str, float]) -> Iterator[list[Layer]]:
    """Irreducible and 1x1 layers, with the largest n of every other kind, for all n."""
    before = {layer.weight: _shape(layers[: index + 1])[1] for index, layer in enumerate(layers)}
    kinds: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[str]] = {}
    for layer in sorted(layers, key=lambda v: -norms[v.weight]):
        if layer.reducible and prod(layer.kernel) > 1:
            kinds.setdefault((layer.kernel, before[layer.weight], layer.depthwise), []).append(layer.weight)
    optional = {name for members in kinds.values() for name in members}
    for counts in itertools.product(*(range(len(members) + 1) for members in kinds.values())):
        chosen = {name for members, count in zip(kinds.values(), counts, strict=True) for name in members[:count]}
        kept = [layer for layer in layers if layer.weight not in optional or layer.weight in chosen]
        if kept:
            yield kept


def _shape(layers: Collection[Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel and stride of the convolution that the layers compose to."""
    kernel: list[int] = []
    stride: list[int] = []
    for layer in layers:
        kernel = kernel or [1] * len(layer.kernel)
        stride = stride or [1] * len(layer.kernel)
        kernel = [k + s * (size - 1) for k, s, size in zip(kernel, stride, layer.kernel, strict=True)]
        stride = [a * b for a, b in zip(stride, layer.stride, strict=True)]
    return tuple(kernel), tuple(stride)
