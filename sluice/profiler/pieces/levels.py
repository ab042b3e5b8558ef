"""The widths that are offered to the solver, known before anything is measured.

1. Widths are multiples of what kernels load at once, `PACK` bytes (four floats, eight halves), less in narrow groups,
   and the full width. A layer of 19 channels takes another kernel, which wants the plain layout, while all activations
   around it are laid out in blocks: plans of MobileNetV2 with such widths took up to a quarter longer than their pieces
   and joints told.
2. Between the half and the full width lie at most `TOP` of them, in each octave below `BELOW`, all as round as their
   distance allows. The least is a sixteenth of the width, or the step if that is more. More of them make the solver
   slow and plans no better, since many groups share a budget.
3. The step counts positions. A head is as many positions of a matrix as it has dimensions, so heads of four dimensions
   or more have a step of one, and every number of them up to `COUNTED` is offered. Matrix products and recurrent layers
   gain nothing from steps of less than `MATRIX` positions: ONNX Runtime takes 0.40 of the time for an LSTM of 62, 63 or
   64 units, of 128.
4. Sums of groups (concatenations) are known at `SUMS` values, those of widths at equal shares, and at every value that
   was measured (`sluice.profiler.fit.assemble`).
5. What the user asks of widths (`sluice.passes.graph.width_limits`) makes the step a common multiple, or in
   narrow groups the user's own, and takes away what is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from sluice.passes.graph.groups import AxisRef
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.graph.width_limits import WidthLimit
from sluice.profiler.pieces.partition import CONVOLUTIONS, Partition, weights_of
from sluice.profiler.pieces.split import ANCHORS

__all__ = ["evenly", "group_levels", "step_of", "sum_levels", "width_levels"]

PACK = 16  # bytes that kernels load at once
ITEM = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # bytes of a value
TOP, BELOW, OCTAVES = 4, 2, 4
SUMS = 9
MATRIX, COUNTED = 8, 16
Value = TypeVar("Value")


def step_of(size: int, precision: str, *, positions: int = 1, least: int = 1) -> int:
    """The number that all widths of a group of this size are multiples of (rules 1 and 3).

    Args:
        positions: of a channel, side by side.
        least: positions of a step, if not fewer than kernels load at once.
    """
    step = max(least, PACK // ITEM[precision]) // positions
    while step > 1 and 2 * step > size:
        step //= 2
    return max(1, step)


def group_levels(
    partition: Partition, precision: str, limits: Mapping[str, WidthLimit] | None = None
) -> dict[str, tuple[int, ...]]:
    """The widths of every group of a graph, by name; those that the user wants no less, and multiples (rule 5)."""
    convolved, read = set[str](), set[str]()
    producers = OnnxGraph(partition.model).producers
    for node in partition.model.graph.node:
        if node.op_type in ANCHORS:
            own = weights_of(node, producers, partition.analysis.tensors)
            (convolved if node.op_type in CONVOLUTIONS else read).update(own)
    found = {}
    for group in partition.analysis.groups:
        refs = [ref for ref in group.refs if ref.param in convolved | read]
        matrix = bool(refs) and not any(ref.param in convolved for ref in refs)
        positions = min(map(_side_by_side, refs), default=1)
        least = MATRIX if matrix and positions == 1 else 1
        step = step_of(group.size, precision, positions=positions, least=least)
        limit = (limits or {}).get(group.name, WidthLimit())
        common = math.lcm(step, limit.multiple)
        step = common if 2 * common <= group.size else limit.multiple if limit.multiple > 1 else step
        counted = positions > 1 and group.size <= COUNTED * step
        every = (*range(step, group.size, step), group.size)
        found[group.name] = limit.allowed(every if counted else width_levels(group.size, precision, step=step))
    return found


def _side_by_side(ref: AxisRef) -> int:
    """Positions per channel that follow each other on the axis, on the average."""
    own = ref.channels[ref.channels >= 0]
    return len(own) // (1 + int(np.count_nonzero(np.diff(own))))


def width_levels(size: int, precision: str, most: int | None = None, step: int | None = None) -> tuple[int, ...]:
    """The widths of a group of ``size`` channels, increasing, the full one last; of ranks no more than ``most``."""
    step = step_of(size, precision) if step is None else step
    found, top = {size}, float(size)
    for octave in range(OCTAVES):
        count = BELOW if octave else TOP
        gap = top / 2 / count
        for k in range(count):
            width = _roundest(top / 2 + k * gap, gap / 3, step)
            if step <= width < size:
                found.add(width)
        top /= 2
    return evenly(sorted(found), len(found) if most is None else most)


def evenly(values: Sequence[Value], count: int) -> tuple[Value, ...]:
    """``count`` of the values, both ends among them, evenly by their place; all where there are no more."""
    if count >= len(values):
        return tuple(values)
    return tuple(values[round(k * (len(values) - 1) / max(1, count - 1))] for k in range(count))


def _roundest(middle: float, reach: float, step: int) -> int:
    """The multiple of ``step`` near the middle with the largest power of two; of equal ones the nearest."""
    first, last = math.ceil((middle - reach) / step), math.floor((middle + reach) / step)
    values = [step * k for k in range(first, last + 1)] or [step * round(middle / step)]
    return max(values, key=lambda v: (v & -v, -abs(v - middle)))


def sum_levels(levels: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Values of a sum of groups with these levels (rule 4)."""
    shares = [k / (SUMS - 1) for k in range(SUMS)]
    return tuple(sorted({sum(own[round(share * (len(own) - 1))] for own in levels) for share in shares}))
