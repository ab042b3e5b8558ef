"""One connection to a device: its requests, their limits, and what is refused (`sluice.runtime.remote.wire`).

1. The token is asked for before anything else is read, and compared in constant time. A page in a browser can reach a
   loopback address, too. It cannot send the header that names the client, unless its own name leads here; so where
   there is no token, the device must be called by a number or as ``localhost``.
2. A request is refused before its body is read. A short body is then read and dropped, so that the connection lasts; a
   long one ends it. A body without a length, or one in pieces, is refused.
3. Whatever goes wrong costs the client a sentence, and the server a line on standard error where the fault may be here.
"""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.remote.device import Busy, Lease
from sluice.runtime.remote.door import called_by_number, complain, is_token
from sluice.runtime.remote.wire import CLIENT, MOST_BYTES, MOST_JSON, from_json, readable

__all__ = ["Handler"]

WAIT_S = 10.0  # for the first request, and for each of a client that has no lease
MOST_DROPPED = 1 << 20  # bytes of a refused body
PIECE, MOST_LINGERED = 1 << 20, 64
LENGTH = re.compile(r"[0-9]{1,12}", re.ASCII)
CLIENT_NAME = re.compile(r"[A-Za-z0-9-]{8,64}", re.ASCII)
BYTES = "application/octet-stream"
BODY = {"/build": MOST_BYTES, "/fused": MOST_BYTES, "/run": MOST_BYTES} | dict.fromkeys(
    ("/sample", "/close", "/clock", "/cache", "/offer"), MOST_JSON
)


class _Refused(Exception):
    """A status and a sentence; ``ends``: the rest of the connection cannot be understood."""

    def __init__(self, status: HTTPStatus, reason: str, ends: bool = False) -> None:
        super().__init__(reason)
        self.status, self.ends = status, ends


class _Gone(Exception):
    """The client has gone, or says nothing any more."""


class Handler(BaseHTTPRequestHandler):
    """``server`` is a `sluice.runtime.remote.server.DeviceServer`."""

    server: Any
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sluice", ""
    timeout = WAIT_S
    disable_nagle_algorithm = True
    lease: Lease | None = None
    unread = 0
    _sampled: int | None = None  # the engine that the last question was about

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def finish(self) -> None:
        self.server.waits_no_more(self.connection)
        if self.lease is not None:
            self.server.device.hung_up(self.lease)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError, _Gone):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself does not understand."""
        self._refuse(_Refused(HTTPStatus(code), message or "this is no request", ends=True))

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._sampled = None
        self._answer(self._post)
        if self._sampled is not None and self.lease is not None and not self.close_connection:
            self.server.device.stay_awake(self.lease, self._sampled, self._asked)

    def _answer(self, ask: Callable[[], tuple[str, bytes]]) -> None:
        self.unread = 0
        try:
            self._check()
            kind, content = ask()
        except _Refused as refused:
            self._refuse(refused)
        except Busy as error:
            self._refuse(_Refused(HTTPStatus.CONFLICT, str(error)))
        except SluiceError as error:
            self._refuse(_Refused(HTTPStatus.BAD_REQUEST, str(error)))
        except _Gone:
            raise
        except Exception as error:
            complain(reason := f"the device failed at {self._path}: {type(error).__name__}: {first_line(error)}")
            self._refuse(_Refused(HTTPStatus.INTERNAL_SERVER_ERROR, f"{reason}; see whether it has memory left"))
        else:
            self._send(HTTPStatus.OK, kind, content)

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    @property
    def _query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.path.partition("?")[2]).items()}

    def _check(self) -> None:
        """Rules 1 and 2."""
        host = (self.headers.get("Host") or "").strip()
        length = self.headers.get_all("Content-Length") or []
        if self.headers.get("Transfer-Encoding") or len(length) > 1 or not LENGTH.fullmatch("".join(length) or "0"):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body has no length; give one Content-Length", ends=True)
        self.unread = int("".join(length) or 0)
        if self.server.token and not is_token(self.headers.get("Authorization") or "", self.server.token):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong; set SLUICE_TOKEN to the device's")
        if not self.server.token and not called_by_number(host):
            raise _Refused(HTTPStatus.FORBIDDEN, "without a token the device is called localhost or by its number")

    def _get(self) -> tuple[str, bytes]:
        if self._path != "/hello":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such thing here; GET /hello says what is")
        return _json(self.server.device.hello.to_json())

    def _post(self) -> tuple[str, bytes]:
        path = self._path
        if path not in BODY:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such thing here; GET /hello says what is")
        if self.unread > BODY[path]:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{self.unread:,} bytes are more than the device takes at {path}, {BODY[path]:,}",
                ends=True,
            )
        lease, device = self._leased(), self.server.device
        content = self._body()
        if path == "/build":
            return _json(device.build(lease, content, *_build_query(self._query)))
        if path == "/run":
            return BYTES, device.run(lease, _whole(self._query.get("session", "")), content)
        if path == "/fused":
            return _json({"fused": device.fused(content, _build_query(self._query)[1])})
        asked = from_json(content) if content else {}
        if not isinstance(asked, dict):
            raise SluiceError("the body is no JSON object; send what the protocol says")
        if path == "/cache":
            return BYTES, device.cache(asked.get("digest"))
        if path == "/sample":
            engine, repeats, count = (asked.get(key) for key in ("session", "repeats", "count"))
            found = device.sample(lease, engine, repeats, 1 if count is None else count)
            self._sampled = engine
            return _json({"ms": found})
        if path == "/close":
            device.close(lease, asked.get("sessions"))
            return _json({})
        if path == "/clock":
            return _json({"mhz": device.clock_mhz()})
        return _json({"known": device.knows(asked.get("digest"))})

    def _asked(self) -> bool:
        """Whether the next request, or the end of the connection, is there."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def _leased(self) -> Lease:
        client = self.headers.get(CLIENT) or ""
        if not CLIENT_NAME.fullmatch(client):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the client gives itself no name; give one as {CLIENT}")
        lease = self.server.device.lease(client, self.connection)
        if self.lease is None:
            self.server.waits_no_more(self.connection)
            self.connection.settimeout(self.server.idle_s)
        self.lease = lease
        return lease

    def _body(self) -> bytearray:
        content = bytearray()
        while self.unread and (piece := self._piece()):
            content += piece
        if self.unread:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body ends early; send all of it", ends=True)
        return content

    def _piece(self) -> bytes:
        """Some more of the body; not all at once, since no memory is set aside for what may never come."""
        try:
            piece = self.rfile.read(min(PIECE, self.unread))
        except OSError as error:
            raise _Gone from error
        self.unread -= len(piece)
        return piece

    def _refuse(self, refused: _Refused) -> None:
        if not refused.ends and self.unread <= MOST_DROPPED:
            while self.unread and self._piece():
                pass
        if refused.ends or self.unread:
            self.close_connection = True
        self._send(refused.status, *_json({"error": readable(str(refused))}))
        if self.close_connection:
            self._linger()

    def _linger(self) -> None:
        """A client that is still sending would lose the answer with the connection: let it read that first."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.5)
            for _ in range(MOST_LINGERED):
                if not self.connection.recv(PIECE):
                    break

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _build_query(asked: dict[str, str]) -> tuple[bool, int | None, Any]:
    part, batch = asked.get("part", "0"), asked.get("batch", "")
    if part not in ("0", "1"):
        raise SluiceError("part is 0 or 1; send what the protocol says")
    return part == "1", _whole(batch) if batch else None, from_json(asked.get("shapes", "{}").encode())


def _whole(text: str) -> int:
    if not LENGTH.fullmatch(text):
        raise SluiceError(f"{readable(text[:40])!r} is no whole number; send what the protocol says")
    return int(text)


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()
