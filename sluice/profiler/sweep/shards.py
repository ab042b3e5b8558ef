"""One share of the points of a complete table, for one of several devices or hosts of the same kind.

Points are dealt out one by one, as `sluice.profiler.survey.complete_points` lists them, so shares are equal to a point.
Every share has points of every piece. The dense network is measured by all: what is offered follows from it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sluice.core.errors import SluiceError

__all__ = ["Shard", "shard_argument"]

MOST_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise SluiceError(f"there is no shard {self}; give 1/{self.count} to {self.count}/{self.count}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``: the second of eight."""
        index, _, count = text.partition("/")
        if not (_few(index) and _few(count) and int(count)):
            raise SluiceError(f"{text!r} is no shard; give its number and how many there are, as in 2/8")
        return cls(int(index), int(count))

    def takes(self, position: int) -> bool:
        """Whether this shard gets the item at ``position``, where items are dealt out one by one."""
        return position % self.count == self.index - 1


def shard_argument(text: str) -> Shard:
    """`Shard.parse` as a type of `argparse`."""
    try:
        return Shard.parse(text)
    except SluiceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _few(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS
