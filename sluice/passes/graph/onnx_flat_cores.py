"""Attention cores that one operator computes from flat queries, keys and values: softmax(scale q k^T + mask) v.

1. A core is a product, a softmax over the positions of the keys, and a product, with numbers to multiply by and one
   constant mask before the softmax. Scores and weights have no other reader.
2. The core is flat if what it multiplies is (`sluice.passes.graph.onnx_flat_operands`), and its context becomes so, at
   two batch sizes. Heads of k and v may serve several heads of q.
3. Positions of the context may come before the batch, and both may be one axis.
4. q, k and v lie in values of their own, or side by side in one value that holds nothing else.
5. A mask is a constant of all scores of a head, and every row of it shows a position. For a row that shows none the
   operator of ONNX Runtime gives zeros, and a softmax does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_flat_operands import (
    BATCH_FIRST,
    BATCH_SECOND,
    FlatOperand,
    find_operand,
    laid_out,
    scaled,
)
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.static_shapes import static_sizes

__all__ = ["FlatCore", "find_flat_cores"]

BATCHES = (2, 3)
SHOWN = 1e30  # a mask hides a position by a number below the negative of this


@dataclass(frozen=True, slots=True)
class FlatCore:
    """A core by its ``weights``, behind the softmax, and by ``out``, in which its heads lie side by side.

    ``rows`` says that positions and batch are one axis of ``out``. The softmax is along ``axis``, as it is written, of
    ``rank`` axes. ``scores`` of one input are so many numbers.
    """

    q: FlatOperand
    k: FlatOperand
    v: FlatOperand
    scale: float
    mask: str
    weights: str
    out: str
    order: tuple[int, int]
    rows: bool
    axis: int
    rank: int
    scores: int


@dataclass(frozen=True, slots=True)
class _Bare:
    """A core as its operators show it: operands of the products, the weights, the value of the context."""

    q: str
    k: str
    v: str
    factor: float
    mask: str
    weights: str
    context: str


def find_flat_cores(model: onnx.ModelProto) -> list[FlatCore]:
    """All of them, in order; a core of which anything is not known is left out."""
    if not any(node.op_type == "Softmax" for node in model.graph.node):
        return []
    given = OnnxGraph(model)
    try:
        first, second = (_cores(OnnxGraph(static_sizes(model, batch)), given) for batch in BATCHES)
    except SluiceError:
        return []
    return [core for out, core in first.items() if second.get(out) == core]


def _cores(read: OnnxGraph, given: OnnxGraph) -> dict[str, FlatCore]:
    """The flat cores of a graph at one batch, by their result; ``given`` has its numbers."""
    bare = [_bare(read, node) for node in read.graph.node if node.op_type == "Softmax"]
    cores = [_flat(read, core, given) for core in bare if core is not None]
    return {core.out: core for core in cores if core is not None}


def _bare(read: OnnxGraph, softmax: onnx.NodeProto) -> _Bare | None:
    """Rule 1, around a softmax; its axis is looked at where the shapes are known."""
    weights = _reader(read, softmax.output[0], "MatMul")
    if weights is None or weights.input[0] != softmax.output[0] or weights.input[1] == softmax.output[0]:
        return None
    value, mask, factor = softmax.input[0], "", 1.0
    while (node := read.producers.get(value)) is not None and read.uses(value) == 1:
        if node.op_type == "MatMul":
            q, k = node.input
            return _Bare(q, k, weights.input[1], factor, mask, weights.input[0], weights.output[0])
        if node.op_type == "Add" and not mask and factor == 1.0:
            constant = [name for name in node.input if name in read.initializers]
            if len(constant) != 1:
                return None
            (mask,) = constant
            value = next(name for name in node.input if name != mask)
        elif (number := scaled(read, node)) is not None:
            value, factor = number[0], factor * number[1]
        else:
            return None
    return None


def _reader(read: OnnxGraph, value: str, kind: str) -> onnx.NodeProto | None:
    """The one reader of a value, if it is of that kind."""
    readers = read.readers.get(value, [])
    return readers[0] if read.uses(value) == 1 and readers and readers[0].op_type == kind else None


def _flat(read: OnnxGraph, core: _Bare, given: OnnxGraph) -> FlatCore | None:
    """Rules 2 to 5."""
    shapes = read.shapes
    sizes = [shapes.get(name, ()) for name in (core.q, core.k, core.v, core.context)]
    kinds = {read.infos[name].type.tensor_type.elem_type for name in (core.q, core.k, core.v) if name in read.infos}
    if kinds != {onnx.TensorProto.FLOAT} or {len(size) for size in sizes} not in ({3}, {4}):
        return None
    ahead = sizes[0][:-2]
    if any(size[:-2] != ahead for size in sizes):
        return None
    axis, rank = attributes(read.producers[core.weights]).get("axis", -1), len(ahead) + 2
    if axis not in (-1, rank - 1):
        return None
    q = find_operand(read, shapes, core.q)
    k = find_operand(read, shapes, core.k, transposed=True)
    v = find_operand(read, shapes, core.v)
    if q is None or k is None or v is None:
        return None
    scale = core.factor * q[1] * k[1]
    batch = ahead[0] if len(ahead) == 2 else ahead[0] // q[0].heads
    heads, positions, seen = q[0].heads, sizes[0][-2], sizes[1][-1]
    alike = q[0].dims == k[0].dims and k[0].heads == v[0].heads and heads * batch == int(np.prod(ahead))
    if scale <= 0 or v[1] != 1.0 or not alike or not _side_by_side([q[0], k[0], v[0]]):
        return None
    if core.mask and not _shows(given.array(core.mask), len(ahead) == 2, heads, (positions, seen)):
        return None
    out = _context(read, shapes, core.context, (batch, heads, positions, v[0].dims))
    return out and FlatCore(
        q[0], k[0], v[0], scale, core.mask, core.weights, *out, axis, rank, heads * positions * seen
    )


def _side_by_side(operands: Sequence[FlatOperand]) -> bool:
    """Rule 4."""
    for value in {operand.value for operand in operands}:
        end = 0
        for one in sorted((one for one in operands if one.value == value), key=lambda one: one.first):
            if one.first != end:
                return False
            end += one.heads * one.dims
        if end != next(one.width for one in operands if one.value == value):
            return False
    return True


def _shows(mask: np.ndarray | None, apart: bool, heads: int, sizes: tuple[int, int]) -> bool:
    """Rule 5; ``apart`` says that batch and heads are two axes of the scores."""
    if mask is None or not 2 <= mask.ndim <= 4 or mask.shape[-2:] != sizes:
        return False
    ahead = (1,) * (4 - mask.ndim) + mask.shape[:-2]
    if ahead[0] != 1 or ahead[1] not in ((1, heads) if apart else (1,)):
        return False
    return not np.isnan(mask).any() and bool((np.abs(mask.max(axis=-1)) < SHOWN).all())


def _context(
    read: OnnxGraph, shapes: Mapping[str, Sequence[int]], value: str, sizes: tuple[int, int, int, int]
) -> tuple[str, tuple[int, int], bool] | None:
    """The value in which the heads of a context lie side by side, and how (rules 2 and 3)."""
    batch, heads, positions, dims = sizes
    entries = np.arange(np.prod(sizes)).reshape(shapes[value])
    wanted = np.arange(np.prod(sizes)).reshape(sizes).transpose(0, 2, 1, 3).reshape(batch, positions, heads * dims)
    while read.uses(value) == 1 and read.readers.get(value):
        (node,) = read.readers[value]
        if node.op_type not in ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze") or node.input[0] != value:
            return None
        value = node.output[0]
        found = laid_out(read, shapes, [(node, value)], entries)
        if found is None:
            return None
        entries = found
        for order in (BATCH_FIRST, BATCH_SECOND):
            form = wanted.transpose(*order, 2)
            for rows in (False, True):
                if np.array_equal(entries, form.reshape(-1, heads * dims) if rows else form):
                    return value, order, rows
    return None
