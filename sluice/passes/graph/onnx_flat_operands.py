"""Operands of products that lie flat: an axis of positions, and one of heads side by side, in a value of three axes.

1. What lays an operand out is not told by the names of operators. A tensor of indices goes through the same operators.
   The operand is flat if its entry (b, h, n, d) is the entry (b, n, first + h * D + d) of some value.
2. Positions may come before the batch, as in `torch.nn.MultiheadAttention`.
3. Heads may serve several heads of the operand each, the first of them the first ones.
4. Numbers that the operand is multiplied by on the way are told apart from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.passes.graph.onnx_graph import OnnxGraph, attributes

__all__ = ["BATCH_FIRST", "BATCH_SECOND", "FlatOperand", "find_operand", "laid_out", "scaled"]

BATCH_FIRST, BATCH_SECOND = (0, 1), (1, 0)
LAYS_OUT = frozenset(["Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
                      "Unsqueeze"])  # fmt: skip


@dataclass(frozen=True, slots=True)
class FlatOperand:
    """Columns ``first`` to ``first + heads * dims`` of a value of three axes, the batch at ``order[0]``."""

    value: str
    order: tuple[int, int]
    width: int
    first: int
    heads: int
    dims: int


def find_operand(
    read: OnnxGraph, shapes: Mapping[str, Sequence[int]], name: str, *, transposed: bool = False
) -> tuple[FlatOperand, float] | None:
    """Where an operand of a product lies flat (rules 1 and 2), and the number that it was multiplied by on the way."""
    value, factor, steps = name, 1.0, list[tuple[onnx.NodeProto, str]]()
    passed = [(value, factor, 0)]
    while (node := read.producers.get(value)) is not None:
        number = scaled(read, node)
        if number is not None:
            value, factor = number[0], factor * number[1]
        elif node.op_type in LAYS_OUT and node.domain in ("", "ai.onnx"):
            steps.append((node, value))
            value = node.input[0]
        else:
            break
        passed.append((value, factor, len(steps)))
    for start, times, count in reversed(passed):
        shape = shapes.get(start, ())
        if len(shape) != 3 or 0 in shape:
            continue
        entries = laid_out(read, shapes, steps[:count][::-1], np.arange(np.prod(shape)).reshape(shape))
        if entries is not None and entries.shape == tuple(shapes[name]):
            entries = entries.swapaxes(-1, -2) if transposed else entries
            for order in (BATCH_FIRST, BATCH_SECOND):
                if (found := _columns(start, shape, order, entries)) is not None:
                    return found, times
    return None


def laid_out(
    read: OnnxGraph,
    shapes: Mapping[str, Sequence[int]],
    steps: Sequence[tuple[onnx.NodeProto, str]],
    entries: np.ndarray,
) -> np.ndarray | None:
    """The entries behind operators that lay them out; None where one of them is not known."""
    for node, out in steps:
        given, shape = attributes(node), shapes.get(out)
        if shape is None:
            return None
        if node.op_type == "Transpose":
            entries = entries.transpose(given.get("perm", range(entries.ndim)[::-1]))
        elif node.op_type == "Expand":
            entries = np.broadcast_to(entries, shape)
        elif node.op_type == "Gather":
            at = read.array(node.input[1])
            if at is None:
                return None
            entries = np.take(entries, at, axis=given.get("axis", 0))
        elif node.op_type == "Split":
            axis = given.get("axis", 0)
            if any(name not in shapes for name in node.output):
                return None
            ends = np.cumsum([shapes[name][axis] for name in node.output])
            end = int(ends[list(node.output).index(out)])
            entries = np.take(entries, range(end - shape[axis], end), axis=axis)
        elif node.op_type == "Slice":
            numbers = [read.array(name) for name in node.input[1:]]
            known = [number.tolist() for number in numbers if number is not None]
            if len(known) < len(numbers):
                return None
            axes, strides = list(range(entries.ndim)), [1] * entries.ndim
            starts, ends, axes, strides = known + [axes, strides][len(known) - 2 :]
            where = [slice(None)] * entries.ndim
            for start, end, axis, stride in zip(starts, ends, axes, strides, strict=False):
                where[axis] = slice(start, end, stride)
            entries = entries[tuple(where)]
        else:
            entries = entries.reshape(shape)
        if entries.shape != tuple(shape):
            return None
    return entries


def _columns(value: str, shape: Sequence[int], order: tuple[int, int], entries: np.ndarray) -> FlatOperand | None:
    """The columns that ``entries``, (batch, heads, positions, dims) or (batch * heads, ...), are of (rules 1 to 3)."""
    batch, positions, width = shape[order[0]], shape[order[1]], shape[2]
    if entries.ndim == 3 and entries.shape[0] % batch == 0:
        entries = entries.reshape(batch, -1, *entries.shape[1:])
    if entries.ndim != 4 or (entries.shape[0], entries.shape[2]) != (batch, positions):
        return None
    served, dims = entries.shape[1], entries.shape[3]
    heads = len(np.unique(entries[0, :, 0, 0]))
    if served % heads:
        return None
    row = np.arange(batch * positions).reshape([shape[0], shape[1]]).transpose(order)
    first = int(entries[0, 0, 0, 0]) % width
    column = first + (np.arange(served) // (served // heads) * dims)[:, None] + np.arange(dims)
    expected = row[:, None, :, None] * width + column[None, :, None, :]
    return FlatOperand(value, order, width, first, heads, dims) if np.array_equal(entries, expected) else None


def scaled(read: OnnxGraph, node: onnx.NodeProto) -> tuple[str, float] | None:
    """What a node multiplies by a number, and the number."""
    if node.op_type not in ("Mul", "Div"):
        return None
    numbers = [read.scalar(name) for name in node.input]
    for place in (0, 1) if node.op_type == "Mul" else (1,):
        number = numbers[place]
        if number and numbers[1 - place] is None and _no_axes(read, node.input[place]):
            return node.input[1 - place], number if node.op_type == "Mul" else 1.0 / number
    return None


def _no_axes(read: OnnxGraph, name: str) -> bool:
    """A number that adds no axis to what it is multiplied with."""
    array = read.array(name)
    return array is not None and array.ndim <= 1
