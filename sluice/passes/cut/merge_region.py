"""The region of a `Merge` in a graph: which layers become one convolution, and which shortcuts fold into it.

1. The layers of the merge are a segment of a chain (`sluice.passes.graph.segments`); layers that no run names are
   removed. `linearize_torch` has removed them from its graph already.
2. A residual block all of whose remaining layers belong to one run is *folded* into it. One with layers of several runs
   is a `FoldedBlock` that keeps its addition; none of those runs may reach beyond it. One without remaining layers is
   its shortcut alone.
3. All padding of a run moves to its first layer. Where a folded block begins the run, its shortcut then needs the zeros
   of the later layers as well. Where it lies further inside, its branch has lost its own padding and the shortcut must
   lose that border: ``shift = padding applied within the block - half of its kernel``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.cut.compose import Conv, add_shortcut, compose, fold_norm
from sluice.passes.graph.chains import NEUTRAL, Chain, Layer, Span
from sluice.passes.graph.segments import swallowed

__all__ = [
    "Fold",
    "FoldedBlock",
    "MergeRegion",
    "Run",
    "bias_name",
    "compose_run",
    "find_region",
    "layers_of",
    "merged_shape",
    "paddings",
    "runs_of",
]


@dataclass(frozen=True, slots=True)
class Fold:
    """A residual block within a run."""

    parts: tuple[Layer | Fold, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Run:
    """Layers and blocks that become one convolution, named after the last layer."""

    parts: tuple[Layer | Fold, ...]


@dataclass(frozen=True, slots=True)
class FoldedBlock:
    """A residual block that keeps its addition."""

    units: tuple[Run | FoldedBlock, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class MergeRegion:
    """The part of a graph between the values ``source`` and ``value`` that a merge rewrites.

    ``layers`` are all of its layers, ``kept`` the weights that stay, ``acts`` the activations that go, ``spans`` the
    blocks inside and ``emptied`` those of which no layer stays, ``tensors`` all that layers, norms and shortcuts read.
    """

    units: tuple[Run | FoldedBlock, ...]
    layers: tuple[Layer, ...]
    kept: frozenset[str]
    spans: tuple[Span, ...]
    emptied: tuple[Span, ...]
    acts: tuple[str, ...]
    tensors: tuple[str, ...]
    source: str
    value: str


def bias_name(weight: str) -> str:
    """``layer1.0.conv2.weight -> layer1.0.conv2.bias``."""
    module = weight.rpartition(".")[0]
    return f"{module}.bias" if module else "bias"


def layers_of(parts: Sequence[Layer | Fold]) -> list[Layer]:
    """The layers of a run in order."""
    return [layer for part in parts for layer in (layers_of(part.parts) if isinstance(part, Fold) else [part])]


def find_region(chains: Sequence[Chain], merge: Merge) -> MergeRegion:
    """Where the merge applies.

    Raises:
        SluiceError: its layers are not a segment of one chain, or a run or a removed layer is not possible.
    """
    kept = {name: index for index, run in enumerate(merge.runs) for name in run}
    chain = next((c for c in chains if kept.keys() & {v.weight for v in c.layers}), None)
    chain = _as_planned(chain, kept) if chain else None
    names = [layer.weight for layer in chain.layers] if chain else []
    present = [name for name in merge.layers if name in names]
    missing = [name for name in kept if name not in names]
    if chain is None or missing:
        raise SluiceError(
            f"cannot merge {merge.name}: {(missing or list(merge.layers))[0]!r} is in no chain of convolutions with "
            f"the others; the chains end at {sorted({c.after for c in chains})}; make the plan again with `sluice plan`"
        )
    start, end = names.index(present[0]), names.index(present[-1]) + 1
    layers, spans = chain.layers[start:end], swallowed(chain, start, end)
    between = [name for name in names[start:end] if name not in merge.layers]
    apart = [s for s in chain.spans if s not in spans and _crosses(s, start, end)]
    fixed = [layer.weight for layer in layers if layer.weight not in kept and not layer.reducible]
    if between or apart or fixed:
        reason = f"{between[0]!r} lies between its layers" if between else ""
        if apart:
            why = apart[0].barrier or "its border lies inside the segment"
            reason = f"the residual block of {chain.layers[apart[0].start].weight!r} cannot be taken in: {why}"
        if fixed:
            reason = f"{fixed[0]!r} changes channels or size and cannot be removed"
        raise SluiceError(f"cannot merge {merge.name}: {reason}; make the plan again with `sluice plan`")
    units = _units(_tree(chain, spans, start, end), kept)
    if len(runs_of(units)) > len(merge.runs):
        raise SluiceError(
            f"cannot merge {merge.name}: one of its runs {[list(r) for r in merge.runs]} reaches across the border of "
            "a residual block that keeps its addition; end the run there"
        )
    acts = [act for layer in layers[:-1] for act in layer.acts]
    acts += [act for span in spans if span.end < end for act in span.acts]
    closing = [span.add for span in spans if span.end == end]
    emptied = [s for s in spans if not any(v.weight in kept for v in chain.layers[s.start : s.end])]
    read = [*layers, *(span.shortcut for span in spans if span.shortcut is not None)]
    return MergeRegion(
        tuple(units),
        layers,
        frozenset(kept),
        spans,
        tuple(emptied),
        tuple(acts),
        tuple(name for layer in read for name in _tensors(layer)),
        layers[0].source,
        closing[-1] if closing else layers[-1].out,
    )


def _as_planned(chain: Chain, kept: Collection[str]) -> Chain:
    """The chain without the barriers that only the widths of a sliced graph put there.

    A block whose shortcut is a convolution cannot be emptied. In the dense graph one of its layers changes channels and
    is kept. In a sliced graph its inputs and outputs may be equal in number, so that all layers look removable; the
    plan still keeps one.
    """

    def open_(span: Span) -> bool:
        return span.barrier == NEUTRAL and any(v.weight in kept for v in chain.layers[span.start : span.end])

    return replace(chain, spans=tuple(replace(s, barrier=None) if open_(s) else s for s in chain.spans))


def compose_run(run: Run, tensors: Mapping[str, np.ndarray]) -> Conv:
    """The one convolution of a run, in float64.

    Args:
        tensors: at least those of the layers, their norms and shortcuts, by name.
    """
    return _compose(run.parts, {name: np.asarray(t, np.float64) for name, t in tensors.items()})


def merged_shape(run: Run) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Weight shape, stride, padding and groups of the convolution of `compose_run`."""
    layers = layers_of(run.parts)
    wide, stride = _total(layers, "kernel"), [1] * len(layers[0].stride)
    for layer in layers:
        stride = [a * b for a, b in zip(stride, layer.stride, strict=True)]
    depthwise = all(layer.depthwise for layer in layers) and not _projects(run.parts)
    groups, columns = (layers[0].groups, 1) if depthwise else (1, layers[0].shape[1] * layers[0].groups)
    shape = (layers[-1].shape[0], columns, *(1 + size for size in wide))
    return shape, tuple(stride), _total(layers, "pad"), groups


def paddings(run: Run) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Padding per weight and shift per addition (of the folded blocks) that make the unmerged run exact."""
    layers = layers_of(run.parts)
    total = _total(layers, "pad")
    pads = {layer.weight: (0,) * len(total) for layer in layers}
    pads[layers[0].weight] = total
    shifts: dict[str, tuple[int, ...]] = {}
    folds = [part for part in run.parts if isinstance(part, Fold)]
    while folds:
        fold = folds.pop()
        inner = layers_of(fold.parts)
        applied = total if inner[0] is layers[0] else (0,) * len(total)
        shifts[fold.span.add] = tuple(a - h for a, h in zip(applied, _total(inner, "half"), strict=True))
        folds += [part for part in fold.parts if isinstance(part, Fold)]
    return pads, shifts


def _total(layers: Sequence[Layer], what: str) -> tuple[int, ...]:
    """Padding, kernel - 1 or half of that, of the layers together, in positions of the first one's input."""
    total, stride = [0] * len(layers[0].pad), [1] * len(layers[0].pad)
    for layer in layers:
        for axis, (pad, kernel) in enumerate(zip(layer.pad, layer.kernel, strict=True)):
            size = {"pad": pad, "kernel": kernel - 1, "half": (kernel - 1) // 2}[what]
            total[axis] += stride[axis] * size
            stride[axis] *= layer.stride[axis]
    return tuple(total)


def _projects(parts: Sequence[Layer | Fold]) -> bool:
    return any(isinstance(p, Fold) and (p.span.shortcut is not None or _projects(p.parts)) for p in parts)


def _compose(parts: Sequence[Layer | Fold], tensors: Mapping[str, np.ndarray]) -> Conv:
    whole: Conv | None = None
    for part in parts:
        if isinstance(part, Fold):
            shortcut = None if part.span.shortcut is None else _conv(part.span.shortcut, tensors)
            conv = add_shortcut(_compose(part.parts, tensors), shortcut, part.span.shift)
        else:
            conv = _conv(part, tensors)
        whole = conv if whole is None else compose(whole, conv)
    assert whole is not None
    return whole


def _conv(layer: Layer, tensors: Mapping[str, np.ndarray]) -> Conv:
    weight = tensors[layer.weight]
    bias = np.zeros(len(weight)) if layer.bias is None else tensors[layer.bias]
    conv, norm = Conv(weight, bias, layer.stride, layer.pad, layer.groups), layer.norm
    if norm is None:
        return conv
    gamma = None if norm.weight is None else tensors[norm.weight]
    beta = None if norm.bias is None else tensors[norm.bias]
    return fold_norm(conv, gamma, beta, tensors[norm.mean], tensors[norm.var], norm.eps)


def _crosses(span: Span, start: int, end: int) -> bool:
    """Is the span neither disjoint from the segment nor around it?"""
    return not (end <= span.start or span.end <= start or (span.start <= start and end <= span.end))


_Tree = list["Layer | tuple[Span, _Tree]"]


def _tree(chain: Chain, spans: Sequence[Span], start: int, end: int) -> _Tree:
    """Layers in order, each block as one item; ``spans`` has inner ones before outer ones."""
    items: list[tuple[int, int, Layer | tuple[Span, _Tree]]] = [
        (index, index + 1, chain.layers[index]) for index in range(start, end)
    ]
    for span in spans:
        inside = [item for item in items if span.start <= item[0] and item[1] <= span.end]
        at = items.index(inside[0])
        items[at : at + len(inside)] = [(span.start, span.end, (span, [item[2] for item in inside]))]
    return [item[2] for item in items]


def _touched(tree: _Tree, kept: Mapping[str, int]) -> set[int]:
    found: set[int] = set()
    for item in tree:
        if isinstance(item, Layer):
            found |= {kept[item.weight]} if item.weight in kept else set()
        else:
            found |= _touched(item[1], kept)
    return found


def _units(tree: _Tree, kept: Mapping[str, int]) -> list[Run | FoldedBlock]:
    units: list[Run | FoldedBlock] = []
    last: int | None = None
    for item in tree:
        touched = _touched([item], kept)
        if len(touched) > 1:
            assert not isinstance(item, Layer)
            units.append(FoldedBlock(tuple(_units(item[1], kept)), item[0]))
            last = None
        elif touched:
            run = touched.pop()
            part = item if isinstance(item, Layer) else Fold(_parts(item[1], kept), item[0])
            if last == run:
                before = units.pop()
                assert isinstance(before, Run)
                units.append(Run((*before.parts, part)))
            else:
                units.append(Run((part,)))
            last = run
    return units


def _parts(tree: _Tree, kept: Mapping[str, int]) -> tuple[Layer | Fold, ...]:
    found: list[Layer | Fold] = []
    for item in tree:
        if _touched([item], kept):
            found.append(item if isinstance(item, Layer) else Fold(_parts(item[1], kept), item[0]))
    return tuple(found)


def runs_of(units: Sequence[Run | FoldedBlock]) -> list[Run]:
    """The runs in order, those inside of blocks included."""
    return [run for unit in units for run in (runs_of(unit.units) if isinstance(unit, FoldedBlock) else [unit])]


def _tensors(layer: Layer) -> list[str]:
    norm = layer.norm
    names = [layer.weight, layer.bias, *((norm.weight, norm.bias, norm.mean, norm.var) if norm else ())]
    return [name for name in names if name is not None]
