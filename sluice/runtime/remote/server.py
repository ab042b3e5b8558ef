"""The HTTP server of a device; http.server alone.

1. Every connection has a thread. It waits `sluice.runtime.remote.handler.WAIT_S` for a request, and the client that has
   the device may be idle for `IDLE_S`; then the connection ends, and a lease with it.
2. Of clients that have no lease `MOST_WAITING` connections are kept; one more ends the oldest. So nobody who only opens
   connections keeps the client out that may use the device.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from contextlib import suppress
from typing import Any

from sluice.runtime.remote.device import Device
from sluice.runtime.remote.door import complain
from sluice.runtime.remote.handler import Handler

__all__ = ["DeviceServer"]

IDLE_S = 900.0
MOST_WAITING = 16


class DeviceServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves ``device`` on an open, listening socket.

    Args:
        token: what clients must know; empty on a loopback address alone.
        idle_s: how long the client that has the device may say nothing.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, listening: socket.socket, device: Device, token: str = "", idle_s: float = IDLE_S) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.device, self.token, self.idle_s = device, token, idle_s
        self._waiting: list[socket.socket] = []
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.waits(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line; a client that has gone is no fault."""
        error = sys.exception()
        if not isinstance(error, OSError):
            complain(f"{type(error).__name__}: {error}")

    def waits(self, request: socket.socket) -> None:
        """A connection without a lease (rule 1)."""
        with self._lock:
            self._waiting.append(request)
            old = self._waiting.pop(0) if len(self._waiting) > MOST_WAITING else None
        if old is not None:
            _shut(old)

    def waits_no_more(self, request: socket.socket) -> None:
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
