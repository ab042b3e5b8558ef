"""One share of the points of a complete table, for one of several devices or hosts of the same kind.

A point belongs to the share that a hash of its key and extents says, so the shares of all hosts fit together whatever
each of them offers. The dense network is measured by all: what is offered follows from it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass

from sluice.core.errors import SluiceError

__all__ = ["Shard", "shard_argument"]


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
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
        if found is None or not int(found[2]):
            raise SluiceError(f"{text!r} is no shard; give its number and how many there are, as in 2/8")
        return cls(int(found[1]), int(found[2]))

    def takes(self, key: str, extents: tuple[int, ...]) -> bool:
        """Whether the point is in this share."""
        drawn = hashlib.sha256(f"{key} {extents}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") % self.count == self.index - 1


def shard_argument(text: str) -> Shard:
    """`Shard.parse` as a type of `argparse`."""
    try:
        return Shard.parse(text)
    except SluiceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
