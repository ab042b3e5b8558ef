"""The staircase of a group: its measured cost by width, the widths worth offering, and the step between widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Staircase", "step_of", "sum_of"]

PACK = 16  # bytes that kernels load at once: four floats, eight halves


ITEM = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # bytes of a value


@dataclass(frozen=True, slots=True)
class Staircase:
    """Measured cost (ms) of a kind of group by width, and the widths worth offering."""

    cost: Mapping[int, float]
    levels: tuple[int, ...]


def sum_of(groups: Sequence[str]) -> str:
    """The name of the staircase of the sum of these groups; of one group, its own name."""
    return " + ".join(groups)


def step_of(size: int, precision: str) -> int:
    """The number that all tried widths of a group of this size are multiples of (rule 1 of
    `sluice.profiler.sweep.explore`)."""
    step = PACK // ITEM[precision]
    while step > 1 and 2 * step > size:
        step //= 2
    return step
