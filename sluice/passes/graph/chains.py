"""The chains of a graph: convolutions that follow each other, so that they could be merged.

A front end translates its graph into `ChainOp`s, one per operator, over named values; the rules are the same for all.

1. A *chain* is a row of convolutions with nothing between them but batch norm, activations and residual additions.
   Position p of a chain is the value that layer p reads (layers count from 0), so a segment (i, j] is ``layers[i:j]``.
2. A *span* (i, j] is a residual block: the value at position i also reaches the addition behind layer j - 1, either as
   it is or through one 1x1 convolution. Spans nest. A span whose `Span.barrier` gives a reason can be part of a chain,
   but no segment may swallow it.
3. Every other operator ends a chain, and `Chain.before` and `Chain.after` name it: pooling, concatenation, a product
   (squeeze and excite, attention), a norm that does not follow a convolution, dilation, groups, a shared weight,
   several readers that are not a residual block. No network is known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

__all__ = ["NEUTRAL", "Chain", "ChainOp", "Layer", "Norm", "Span", "find_chains"]

NEUTRAL = "the shortcut is a convolution that changes neither channels nor size"


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm: names of its tensors, and of the value that it makes."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float
    value: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, the norm behind it and the activations behind that.

    ``shape`` is that of the weight; ``source`` and ``value`` are the values that the convolution reads and makes,
    ``acts`` those that the activations make.
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    groups: int
    source: str
    value: str
    norm: Norm | None = None
    acts: tuple[str, ...] = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def depthwise(self) -> bool:
        return self.groups > 1

    @property
    def out(self) -> str:
        """The value behind convolution and norm."""
        return self.norm.value if self.norm else self.value

    @property
    def reducible(self) -> bool:
        """Could the identity take its place: same channels, same size."""
        same = all(2 * p == k - 1 for p, k in zip(self.pad, self.kernel, strict=True))
        return same and prod(self.stride) == 1 and self.shape[1] * self.groups == self.shape[0]


@dataclass(frozen=True, slots=True)
class Span:
    """A residual block over ``layers[start:end]``.

    ``source`` is the value it reads, ``add`` the one it makes, ``shortcut`` its 1x1 convolution or None; ``shift`` the
    zeros put around the shortcut's input, ``acts`` the activations behind the addition.
    """

    start: int
    end: int
    source: str
    add: str
    shortcut: Layer | None
    shift: tuple[int, ...]
    barrier: str | None = None
    acts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers in order, the residual blocks over them (inner before outer), and the operators before and after."""

    layers: tuple[Layer, ...]
    spans: tuple[Span, ...]
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ChainOp:
    """One operator: ``kind`` is conv, norm, act, add, pad, output or other; reasons call it ``label``."""

    kind: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: Layer | None = None
    norm: Norm | None = None
    pad: tuple[int, ...] = ()


@dataclass(slots=True)
class _Path:
    """A way through the graph; ``end`` is the addition where it waits for another."""

    layers: list[Layer] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    shift: tuple[int, ...] = ()
    before: str = ""
    after: str = ""
    end: ChainOp | None = None

    def acts(self) -> tuple[str, ...]:
        """Activations at the end of the path."""
        if self.spans and self.spans[-1].end == len(self.layers):
            return self.spans[-1].acts
        return self.layers[-1].acts

    def activate(self, value: str) -> None:
        acts = (*self.acts(), value)
        if self.spans and self.spans[-1].end == len(self.layers):
            self.spans[-1] = replace(self.spans[-1], acts=acts)
        else:
            self.layers[-1] = replace(self.layers[-1], acts=acts)


def find_chains(ops: Sequence[ChainOp], inputs: Sequence[str]) -> tuple[Chain, ...]:
    """All chains of a graph, by first layer; every supported convolution is in one, or is a shortcut.

    Args:
        ops: in topological order.
        inputs: the values that enter the graph.
    """
    return _Walker(ops, inputs).chains()


class _Walker:
    def __init__(self, ops: Sequence[ChainOp], inputs: Sequence[str]):
        self.readers: dict[str, list[ChainOp]] = {}
        for op in ops:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
        self.order = {op.layer.weight: index for index, op in enumerate(ops) if op.layer}
        self.pending = [(name, f"input {name!r}") for name in inputs]
        self.pending += [(o, op.label) for op in ops if not op.inputs for o in op.outputs]
        self.found: list[Chain] = []

    def chains(self) -> tuple[Chain, ...]:
        seen: set[str] = set()
        while self.pending:
            value, before = self.pending.pop()
            if value not in seen:
                seen.add(value)
                self.emit(self.walk(value, before))
        return tuple(sorted(self.found, key=lambda chain: self.order[chain.layers[0].weight]))

    def emit(self, path: _Path) -> None:
        if path.layers:
            self.found.append(Chain(tuple(path.layers), tuple(path.spans), path.before, path.after))
        if path.end is not None:
            self.pending += [(name, path.end.label) for name in path.end.outputs]

    def walk(self, value: str, before: str, op: ChainOp | None = None, branch: bool = False) -> _Path:
        """Follow ``value`` (into ``op``, if it has several readers) as far as a chain goes."""
        path = _Path(before=before)
        while True:
            readers = [op] if op else self.readers.get(value, [])
            op = None
            if len(readers) != 1:
                block = self.block(value, readers) if len(readers) == 2 else None
                if block is None:
                    path.after = f"{len(readers)} readers that are no residual block" if readers else "no reader"
                    if len(readers) != 2:
                        for reader in readers:
                            self.emit(self.walk(value, path.after, reader))
                    return path
                inner, span = block
                done = len(path.layers)
                path.layers += inner.layers
                path.spans += [replace(s, start=s.start + done, end=s.end + done) for s in (*inner.spans, span)]
                value = span.add
                continue
            reader = readers[0]
            if reader.kind == "conv" and not (path.shift and path.layers):
                value = self.convolution(path, reader)
            elif reader.kind == "act" and path.layers:
                value = reader.outputs[0]
                path.activate(value)
            elif reader.kind == "act" and not branch:
                value = reader.outputs[0]
            elif reader.kind == "pad" and branch and not path.layers and not path.shift:
                value, path.shift = reader.outputs[0], reader.pad
            else:
                path.after = reader.label
                if reader.kind == "add":
                    path.end = reader
                else:
                    self.pending += [(name, reader.label) for name in reader.outputs]
                return path

    def convolution(self, path: _Path, op: ChainOp) -> str:
        """Append the layer with its norm; returns the value behind them."""
        assert op.layer is not None
        behind = self.readers.get(op.layer.value, [])
        norm = behind[0].norm if len(behind) == 1 else None
        path.layers.append(replace(op.layer, norm=norm))
        return path.layers[-1].out

    def block(self, value: str, readers: Sequence[ChainOp]) -> tuple[_Path, Span] | None:
        """The residual block that starts at ``value``: its branch, and the span over it."""
        reason = "2 readers that are no residual block"
        if readers[0] is readers[1]:
            self.pending += [(name, readers[0].label) for name in readers[0].outputs]
            return None
        ways = [self.walk(value, reason, reader, branch=True) for reader in readers]
        main, side = sorted(ways, key=lambda w: (len(w.layers), sum(map(prod, (v.kernel for v in w.layers)))))[::-1]
        projection = side.layers[0] if side.layers else None
        plain = projection is None or (
            len(side.layers) == 1
            and prod(projection.kernel) == 1
            and not any(projection.pad)
            and projection.groups == 1
        )
        fits = main.layers and not main.shift and not side.spans and plain and not (projection and projection.acts)
        if main.end is None or main.end is not side.end or not fits:
            for way in ways:
                self.emit(way)
            return None
        shift = side.shift or (0,) * len(main.layers[0].stride)
        add = main.end.outputs[0]
        return main, Span(0, len(main.layers), value, add, projection, shift, _barrier(main, projection, shift))


def _barrier(main: _Path, shortcut: Layer | None, shift: tuple[int, ...]) -> str | None:
    """Why the shortcut cannot be folded into the merged branch; None where it can."""
    inner = [span.barrier for span in main.spans if span.barrier]
    first, last = main.layers[0], main.layers[-1]
    stride, excess = [1] * len(first.stride), [0] * len(first.stride)
    for layer in main.layers:
        for axis, (k, s, p) in enumerate(zip(layer.kernel, layer.stride, layer.pad, strict=True)):
            excess[axis] += stride[axis] * (2 * p - k + 1)
            stride[axis] *= s
    if inner:
        return inner[0]
    if main.acts():
        return "an activation lies between the branch and its addition"
    if any(k % 2 == 0 for layer in main.layers for k in layer.kernel):
        return "the branch has an even kernel"
    if len(shift) != len(stride) or excess != [2 * s for s in shift]:
        return "the branch changes the size by its padding"
    if tuple(stride) != (shortcut.stride if shortcut else (1,) * len(stride)):
        return "branch and shortcut differ in stride"
    if shortcut is None and first.shape[1] * first.groups != last.shape[0]:
        return "branch and shortcut differ in channels"
    if shortcut is not None and all(layer.reducible for layer in main.layers) and not any(shift):
        return NEUTRAL
    return None
