"""A target may be on another machine: ``NAME@HOST:PORT``, where `sluice serve` runs; the port may be left out.

``NAME@local`` is this machine, in a process of its own.

The host is a name or a number; a number of IPv6 stands in brackets, ``tensorrt@[fe80::2]:8765``.
"""

from __future__ import annotations

import re

from sluice.core.errors import SluiceError

__all__ = ["LOCAL", "PORT", "host_and_port", "split_target", "target_at"]

PORT = 8765
LOCAL = "local"
ADDRESS = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<host>[A-Za-z0-9_](?:[A-Za-z0-9._-]*)))(?::(?P<port>[0-9]{1,5}))?"
)


def split_target(target: str) -> tuple[str, str]:
    """``"tensorrt@jetson"`` as ``("tensorrt", "jetson:8765")``; ``("tensorrt", "")`` for a target of this machine.

    Raises:
        SluiceError: there is an address, and it is none.
    """
    if not isinstance(target, str) or "@" not in target:
        return target, ""
    name, _, address = target.partition("@")
    if address == LOCAL:
        return name, LOCAL
    host, port = host_and_port(address)
    return name, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def target_at(name: str, address: str) -> str:
    """The other way round."""
    return f"{name}@{address}" if address else name


def host_and_port(address: str) -> tuple[str, int]:
    """``"jetson:8765"`` as ``("jetson", 8765)``.

    Raises:
        SluiceError: it is no address.
    """
    found = ADDRESS.fullmatch(address)
    port = int(found["port"] or PORT) if found else 0
    if found is None or not 1 <= port <= 65535:
        raise SluiceError(
            f"{address!r} is no address of a device; give HOST:PORT with a port of 1 to 65535, as jetson:{PORT}"
        )
    return found["six"] or found["host"], port
