"""What a runtime raises, whatever it is, is an `EngineFault`: one sentence, and a fault that others can work around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sluice.core.errors import EngineFault, SluiceError, first_line

__all__ = ["building", "running"]


@contextmanager
def building(target: str) -> Iterator[None]:
    """A runtime builds an engine meanwhile; its own sentences become faults as well."""
    try:
        yield
    except EngineFault:
        raise
    except SluiceError as error:
        raise EngineFault(str(error)) from error
    except Exception as error:
        raise EngineFault(_told(target, "build", error)) from error


@contextmanager
def running(target: str) -> Iterator[None]:
    """Engines run meanwhile."""
    try:
        yield
    except SluiceError:
        raise
    except Exception as error:
        raise EngineFault(_told(target, "run", error)) from error


def _told(target: str, what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"{target} cannot {what} an engine ({reason}); see whether it has enough memory"
