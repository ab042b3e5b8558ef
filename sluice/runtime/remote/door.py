"""Who may come in: the address that is listened at, the token, and the name by which a client calls the device.

1. Without a token only this machine is served.
2. A token is compared in constant time. What is sent goes in the clear, so a network of strangers is for ``ssh -L``.
3. A page in a browser can reach a loopback address, too. It cannot send the header that names the client, unless its
   own name leads here; so where there is no token, the device must be called by a number or as ``localhost``.

Neither numpy nor a runtime is loaded with this: the process that listens is forked (`sluice.runtime.remote.keeper`).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
import sys

from sluice.core.errors import SluiceError

__all__ = ["called_by_number", "check_token", "complain", "is_loopback", "is_token", "listen"]

BACKLOG = 16
LEAST_TOKEN = 16  # characters


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
        SluiceError: the address cannot be had.
    """
    try:
        if port > 65535:
            raise OverflowError("there is no such port")
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:
        raise SluiceError(f"cannot listen at {host}, port {port} ({error}); give another --host or --port") from None


def check_token(host: str, token: str) -> str:
    """The token, if it suffices for this address (rule 3).

    Raises:
        SluiceError: it does not.
    """
    if not token and not is_loopback(host):
        raise SluiceError(
            f"whoever reaches {host} could use this device; set SLUICE_TOKEN or give --token-file, or leave out --host "
            f"and come through ssh -L"
        )
    if token and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise SluiceError(f"the token is too short or not plain; give {LEAST_TOKEN} or more letters and digits")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_token(given: str, token: str) -> bool:
    """Whether the header ``Authorization`` holds the token."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token}".encode())


def called_by_number(host: str) -> bool:
    """Rule 3, of the header ``Host``."""
    name = re.sub(r":\d+$", "", host).strip("[]")
    try:
        return name in ("", "localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def complain(reason: str) -> None:
    """One line for the owner of the device."""
    line = "".join(c if c.isprintable() else " " for c in reason)
    print(f"sluice serve: {line}", file=sys.stderr, flush=True)
