"""The child of `sluice.runtime.remote.local`: ``python -m sluice.commands.serve_local TARGET THREADS SOCKET``.

It serves the listening socket that it inherits, starts the server again when the runtime crashes it
(`sluice.runtime.remote.keeper`), and ends, with all that it started, when its standard input is closed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import suppress

from sluice.runtime.remote.door import complain
from sluice.runtime.remote.keeper import keep_running

__all__ = ["serve"]


def serve(target: str, threads: int, number: int) -> int:
    """Serve until the host ends."""
    threading.Thread(target=_end_with_host, daemon=True).start()
    listening = socket.socket(fileno=number)
    return keep_running(lambda: _serve(target, threads, listening), complain)


def _serve(target: str, threads: int, listening: socket.socket) -> int:
    from sluice.runtime.remote.device import Device
    from sluice.runtime.remote.server import DeviceServer
    from sluice.runtime.targets import make_runner

    device = Device(make_runner(target, threads), target, threads)
    DeviceServer(listening, device, os.environ["SLUICE_TOKEN"]).serve_forever()
    return 0


def _end_with_host() -> None:
    os.read(0, 1)
    with suppress(ProcessLookupError):
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
