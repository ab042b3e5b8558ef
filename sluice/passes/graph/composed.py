"""An activation that is written as several operators: ``x * sigmoid(x)``, or an exporter's form of ``softplus``.

1. Operators that work entry by entry, on numbers and on values that they compute of one value ``x``, are together a
   function of ``x``. No other operator may read the values in between.
2. They are one *activation* if one of them is an activation by itself. So ``x * sigmoid(x)`` is one, and ``x * 2.0``
   is none.
3. The activation has as few operators as possible: the search goes from the last one backwards, until only one value is
   read.

The front ends of `sluice.passes.graph.chains` say which operators work entry by entry, and what a value is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Composed", "composed"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Composed(Generic[V]):
    """``members`` are the values that the operators make, the last one included, ``source`` the one they start from."""

    source: V
    members: frozenset[V]


def composed(
    value: V, operands: Callable[[V], Sequence[V] | None], readers: Callable[[V], Collection[V]]
) -> Composed[V] | None:
    """The operators that end with ``value``; None where that is a single one, or no function of one value.

    Args:
        operands: the values that an operator computes its value of, numbers left out; None if it does not work entry by
            entry on values and numbers alone.
        readers: the values made by the operators that read a value, those of other kinds included.
    """
    first = operands(value)
    if first is None or len(set(first)) < 2:
        return None
    members, border = {value}, set(first)
    while len(border) > 1:
        inner = next((v for v in border if operands(v) and members.issuperset(readers(v))), None)
        if inner is None:
            return None
        members.add(inner)
        border = (border - {inner}) | set(operands(inner) or ())
    return Composed(border.pop(), frozenset(members))
