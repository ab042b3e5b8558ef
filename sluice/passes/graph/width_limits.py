"""Widths that the user wants kept: a least share or number of channels, and a number that widths are multiples of.

1. A pattern means tensors as in `sluice.passes.graph.exclusion`. A group obeys it if it means a weight that makes it.
2. ``keep`` is a share of the channels above 0 and up to 1, a float, or a number of channels, an int.
3. Of several patterns that mean a group the largest least width counts, and the least common multiple.
4. The full width is always offered. A pattern that means no layer is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sluice.core.errors import SluiceError
from sluice.passes.graph.exclusion import check_meant, excluded_by
from sluice.passes.graph.groups import Analysis

__all__ = ["FREE", "WidthLimit", "WidthLimits"]


@dataclass(frozen=True, slots=True)
class WidthLimit:
    """Of one group: the least width, and what widths are multiples of."""

    least: int = 1
    multiple: int = 1

    def allowed(self, levels: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the levels that it allows; the last one is the full width."""
        return tuple(w for w in levels if w == levels[-1] or (w >= self.least and w % self.multiple == 0))


@dataclass(frozen=True, slots=True)
class WidthLimits:
    """What is asked for, by pattern.

    Raises:
        SluiceError: a share, a number of channels or a multiple is none.
    """

    keep: Mapping[str, float] = field(default_factory=dict)
    multiple: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given in (("keep", self.keep), ("multiple", self.multiple)):
            if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
                raise SluiceError(f"{name}={given!r} is no mapping from layers; give {name}={{'head.*': ...}}")
        for pattern, value in self.keep.items():
            share = isinstance(value, float) and 0.0 < value <= 1.0
            if not share and not (type(value) is int and value >= 1):
                raise SluiceError(
                    f"keep={{{pattern!r}: {value!r}}} is no part of the channels; give a share as 0.5, or a whole "
                    "number of channels"
                )
        for pattern, value in self.multiple.items():
            if type(value) is not int or value < 1:
                raise SluiceError(f"multiple={{{pattern!r}: {value!r}}} is none; give a whole number of 1 or more")

    def of(self, analysis: Analysis) -> dict[str, WidthLimit]:
        """By group, where anything is asked for.

        Raises:
            SluiceError: a pattern means no layer.
        """
        check_meant("keep", self.keep, analysis)
        check_meant("multiple", self.multiple, analysis)
        found: dict[str, WidthLimit] = {}
        for group in analysis.groups:
            makers = {ref.param for ref in group.refs if (ref.param, ref.axis) in analysis.producers}

            def means(pattern: str, makers: set[str] = makers) -> bool:
                return any(excluded_by(param, [pattern]) for param in makers)

            parts = [value for pattern, value in self.keep.items() if means(pattern)]
            least = [math.ceil(v * group.size - 1e-9) if isinstance(v, float) else min(v, group.size) for v in parts]
            multiples = [value for pattern, value in self.multiple.items() if means(pattern)]
            if least or multiples:
                found[group.name] = WidthLimit(max(least, default=1), math.lcm(*multiples))
        return found


FREE = WidthLimits()
