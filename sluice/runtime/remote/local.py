"""A runtime in a process of its own on this machine, ``TARGET@local``: what crashes or hangs it costs one engine.

1. The host holds a listening socket on the loopback and starts a child that serves it (`sluice.commands.serve_local`),
   and that ends with the host, which holds its standard input.
2. An answer that takes longer than `PATIENCE_S` is a hang: the child and all that it started are killed.
3. A child that ended by itself leaves nobody waiting: its connections are closed. `LocalServer.revive` starts another
   on the same socket.
4. Who may open a loopback port of this machine could measure here as well, one at a time. So there is a token, which
   the child has from its environment.
"""

from __future__ import annotations

import atexit
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

__all__ = ["PATIENCE_S", "LocalServer", "local_server"]

PATIENCE_S = 300.0  # of a build, or of bursts in a row
PROGRAM = ("-m", "sluice.commands.serve_local")
_servers: dict[tuple[str, int], LocalServer] = {}
_lock = threading.Lock()


def local_server(target: str, threads: int) -> LocalServer:
    """The server of this runtime, one for all who need it while this process lives."""
    with _lock:
        server = _servers.get((target, threads))
        if server is None:
            server = _servers[target, threads] = LocalServer(target, threads)
            atexit.register(server.close)
        return server


class LocalServer:
    """A child that serves ``target`` on a port of the loopback."""

    def __init__(self, target: str, threads: int) -> None:
        self._target, self._threads = target, threads
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.token = secrets.token_hex(16)
        self._child: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def start(self) -> None:
        number = self._listening.fileno()
        words = [sys.executable, *PROGRAM, self._target, str(self._threads), str(number)]
        paths = [path for path in sys.path if path]
        self._child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[number], start_new_session=True,
            env={**os.environ, "SLUICE_TOKEN": self.token, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        threading.Thread(target=self._watch, args=(self._child,), daemon=True).start()

    def kill(self) -> None:
        """End the child and what it started."""
        child, self._child = self._child, None
        if child is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdin is not None:
                child.stdin.close()

    def close(self) -> None:
        """For good."""
        self.kill()
        self._listening.close()

    def revive(self) -> None:
        """A child that runs (rule 3)."""
        if self._child is None or self._child.poll() is not None:
            self.kill()
            self.start()

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Rule 3."""
        child.wait()
        with suppress(OSError, ValueError):  # closed
            while self._child is child:
                if select.select([self._listening], [], [], 0.2)[0]:
                    self._listening.accept()[0].close()
