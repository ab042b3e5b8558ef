"""The one exception that means "your input, not our bug".

A message is one sentence with *what* went wrong, *where* (name, shape) and *what to do*. The command line
prints it and exits with status 1; every other exception is a fault of this package and keeps its traceback.
"""

from __future__ import annotations

__all__ = ["EngineFault", "LostLine", "SluiceError", "Unreachable", "first_line"]


class SluiceError(Exception):
    """A mistake of the user's that the message explains and tells how to mend, in one line whatever it quotes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


class Unreachable(SluiceError):
    """A budget below what any configuration reaches."""


class EngineFault(SluiceError):
    """A runtime failed on an engine, when it built it or when it ran it."""


class LostLine(EngineFault):
    """The connection to a device is gone; what was asked of it may be asked again."""


def first_line(error: BaseException) -> str:
    """The message of another library's exception, short enough for one sentence; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
