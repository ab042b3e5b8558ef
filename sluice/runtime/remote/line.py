"""The connection of a host to a device (`sluice.runtime.remote.wire`), shared by all that speak to one address.

1. One connection is kept alive. The engines on the device live as long as it does, so an engine knows the connection
   that it was built on, by a number.
2. A connection that ended while nothing was on it is made again, without a word. The device ends an idle one.
3. Any other loss is a `LostLine`: what was measured is in the table, and the next run goes on from there. A device that
   has lost its power says nothing, so the system is told to ask whether the other side is still there.
4. An engine that is collected here is closed there with the next request, since collecting comes at any moment, also in
   the middle of one.
5. A device that is a child of this process (`sluice.runtime.remote.local`) is killed where it does not answer in time.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from sluice.core.address import host_and_port, target_at
from sluice.core.errors import LostLine, SluiceError, first_line
from sluice.runtime.remote.local import PATIENCE_S, LocalServer
from sluice.runtime.remote.wire import CLIENT, MOST_BYTES, Hello, from_json, readable

__all__ = ["TOKEN", "Line", "line_to"]

TOKEN = "SLUICE_TOKEN"
CONNECT_S = 10.0
ANSWER_S = 3600.0  # an engine may take long to build
AGAIN_S = 10.0
PROBES = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds, seconds, times
MOST_ANSWER = 1 << 24  # bytes of JSON

_lines: weakref.WeakValueDictionary[str, Line] = weakref.WeakValueDictionary()


def line_to(address: str, child: LocalServer | None = None) -> Line:
    """The line to this address, or to the child that serves here; one for all who need it now."""
    line = _lines.get(address)
    if line is None:
        line = _lines[address] = Line(address, child)
    return line


class Line:
    """A connection that is made when it is needed; ``number`` counts those that there were (rule 1)."""

    def __init__(self, address: str, child: LocalServer | None = None) -> None:
        self.address, self.number, self._child = address, 0, child
        self._client = secrets.token_hex(16)
        self._held: list[http.client.HTTPConnection] = []
        self._open = 0
        self._to_close: deque[tuple[int, int]] = deque()
        weakref.finalize(self, _hang_up, self._held)

    def hello(self, target: str) -> Hello:
        """What is served there.

        Raises:
            SluiceError: nobody answers, or it is no `sluice serve` of this release.
        """
        answer = self._exchange("GET", "/hello", target, b"", None, MOST_ANSWER)
        try:
            return Hello.of(from_json(answer))
        except SluiceError as error:
            raise SluiceError(f"{self.address} cannot measure for this host: {error}; see what runs there") from None

    def again(self, target: str) -> bool:
        """Whether the device answers again, after the line to it was lost."""
        end = time.monotonic() + AGAIN_S
        while True:
            if self._child is not None:  # at each try: one that has just ended may not be known to have ended
                self._child.revive()
            try:
                self.hello(target)
                return True
            except LostLine:
                if time.monotonic() > end:
                    return False
                time.sleep(0.2)

    def opened(self, owner: object, session: int) -> int:
        """An engine of the present connection, which goes with its ``owner``; the number of that connection."""
        self._open += 1
        weakref.finalize(owner, self._forget, self.number, session).atexit = False
        return self.number

    def ask(self, path: str, target: str, body: dict[str, Any], number: int | None = None) -> dict[str, Any]:
        """A question in JSON and its answer; ``number`` of the connection that it must go over."""
        return self._checked(self._json("POST", path, target, json.dumps(body).encode(), number), path)

    def send(self, path: str, target: str, query: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Bytes, and the answer in JSON."""
        return self._checked(self._json("POST", f"{path}?{urlencode(query)}", target, body), path)

    def fetch(self, path: str, target: str, body: bytes = b"", number: int | None = None) -> bytes:
        """Bytes, and the answer in bytes."""
        return self._exchange("POST", path, target, body, number, MOST_BYTES)

    def _checked(self, answer: Any, path: str) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise SluiceError(f"{self.address} answers {path} with what it should not; use one release on both sides")
        return answer

    def _json(self, method: str, path: str, target: str, body: bytes = b"", number: int | None = None) -> Any:
        return from_json(self._exchange(method, path, target, body, number, MOST_ANSWER))

    def _forget(self, number: int, session: int) -> None:
        self._open -= 1
        self._to_close.append((number, session))

    def _exchange(self, method: str, path: str, target: str, body: bytes, number: int | None, most: int) -> bytes:
        where = target_at(target, self.address)
        kept = bool(self._held)
        if kept:
            self._close_collected(where)
        # Another connection may have another engine of the same number.
        if number is not None and (number != self.number or not self._held):
            raise LostLine(self._lost(where, "the engines there went with it"))
        try:
            return self._once(method, path, where, body, most)
        except LostLine:
            if not kept or self._open or number is not None:
                raise
        return self._once(method, path, where, body, most)  # rule 2

    def _lost(self, where: str, reason: str) -> str:
        if self._child is not None:
            return f"the runtime of {where.partition('@')[0]} ended or hung in its own process ({readable(reason)})"
        return (
            f"the line to {where} was lost ({readable(reason)}); what was measured is kept, see that `sluice serve` "
            f"runs there and start again"
        )

    def _close_collected(self, where: str) -> None:
        sessions = []
        while self._to_close:
            number, session = self._to_close.popleft()
            sessions += [session] if number == self.number else []
        if sessions:
            with suppress(LostLine):  # the request that follows says so
                self._once("POST", "/close", where, json.dumps({"sessions": sessions}).encode(), MOST_ANSWER)

    def _once(self, method: str, path: str, where: str, body: bytes, most: int) -> bytes:
        connection = self._held[0] if self._held else self._connect(where)
        headers = {CLIENT: self._client, "Content-Type": "application/octet-stream"}
        if token := self._child.token if self._child is not None else os.environ.get(TOKEN, "").strip():
            headers["Authorization"] = f"Bearer {token}"
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # what is refused is answered before it is all sent
                connection.request(method, path, body if method == "POST" else None, headers)
            response = connection.getresponse()
            content = response.read(most + 1)
            if len(content) > most or response.length:  # what is left of it
                raise http.client.HTTPException("the answer is cut off, or too long")
            if response.will_close:
                _hang_up(self._held)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            _hang_up(self._held)
            if isinstance(error, TimeoutError) and self._child is not None:
                self._child.kill()
            raise LostLine(self._lost(where, first_line(error) or type(error).__name__)) from None
        except BaseException:  # interrupted in the middle of an answer, which nobody would read
            _hang_up(self._held)
            raise
        if response.status == 200:
            return content
        raise SluiceError(f"{where}: {_reason(content, response.status)}")

    def _connect(self, where: str) -> http.client.HTTPConnection:
        host, port = host_and_port(self.address)
        connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            target, _, address = where.partition("@")
            raise LostLine(
                f"nobody answers at {address} ({error.strerror or error}); run `sluice serve --target {target}` there, "
                f"or give another address"
            ) from None
        connection.sock.settimeout(ANSWER_S if self._child is None else PATIENCE_S)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if hasattr(socket, name):
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._held.append(connection)
        self.number += 1
        self._to_close.clear()
        return connection


def _hang_up(held: list[http.client.HTTPConnection]) -> None:
    while held:
        held.pop().close()


def _reason(content: bytes, status: int) -> str:
    with suppress(SluiceError):
        answer = from_json(content)
        if isinstance(answer, dict) and isinstance(answer.get("error"), str):
            return readable(answer["error"])
    return f"it answers with status {status}; see that `sluice serve` runs there"
