"""``sluice serve``: the device's side of ``--target TARGET@HOST:PORT``.

The line that says where it listens is the first on standard output, when the runtime has started. The token is never an
argument, since every user of a machine sees those.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress

from sluice.core.address import split_target
from sluice.core.deployment import check_target
from sluice.core.errors import SluiceError
from sluice.core.files import read_bytes

__all__ = ["serve"]

TOKEN = "SLUICE_TOKEN"


def serve(args: argparse.Namespace) -> int:
    """Let another machine measure on this device, as its --target TARGET@HOST:PORT; needs no torch here."""
    if split_target(check_target(args.target))[1]:
        raise SluiceError(f"what is served runs on this machine; leave the address out of --target {args.target}")
    from sluice.runtime.remote.door import check_token, complain, listen
    from sluice.runtime.remote.keeper import keep_running

    token = check_token(args.host, _token(args.token_file))
    with listen(args.host, args.port) as listening:
        return keep_running(lambda: _serve(args, listening, token), complain)


def _serve(args: argparse.Namespace, listening: socket.socket, token: str) -> int:
    from sluice.runtime.remote.device import Device
    from sluice.runtime.remote.server import DeviceServer
    from sluice.runtime.targets import make_runner

    try:
        device = Device(make_runner(args.target, args.threads), args.target, args.threads)
    except SluiceError as error:
        print(f"sluice: error: {error}", file=sys.stderr)
        return 1
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked_to_end.set())
    host, port = listening.getsockname()[:2]
    told = {**device.hello.to_json(), "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}
    line = f"{args.target} on {device.hello.device}, {device.hello.version}, at {host}, port {port}"
    print(json.dumps(told) if args.json else line, flush=True)
    server = DeviceServer(listening, device, token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked_to_end.wait()
    return 0


def _token(path: str | None) -> str:
    if path is None:
        return os.environ.get(TOKEN, "").strip()
    with suppress(UnicodeDecodeError):
        if token := read_bytes(path, "a token").decode().strip():
            return token
    raise SluiceError(f"{path!r} holds no token; write some 32 letters and digits into it")
