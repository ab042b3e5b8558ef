"""A runtime that crashes takes its process with it, so the server is a child of one that only starts it again.

1. The parent holds the listening socket and does nothing else. It loads no runtime: a fork of one would not work.
2. A child that a signal ended (a crash, or the system out of memory) is started again. One that ended by itself, or
   that was told to, was meant to end.
3. A parent that is killed takes its child with it, since the child reads from a pipe that only the parent holds open.
4. Where the system cannot fork, the server runs in the only process there is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

__all__ = ["keep_running"]

ASKED = (signal.SIGINT, signal.SIGTERM)
PAUSE_S = 0.5  # for a server that crashes at once


def keep_running(serve: Callable[[], int], say: Callable[[str], None]) -> int:
    """Run ``serve`` in a child until it ends by itself; its exit status. ``say`` is told of crashes."""
    if not hasattr(os, "fork"):
        return serve()
    alive, held = os.pipe()
    while True:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(held)
            threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
            _exit_with(serve)
        ended = _waited(child)
        if ended >= 0 or -ended in ASKED:
            return ended if ended >= 0 else 128 - ended
        say(f"the runtime ended by {signal.Signals(-ended).name}; the server was started again")
        time.sleep(PAUSE_S)


def _exit_with(serve: Callable[[], int]) -> None:
    """Never back into what the parent was doing."""
    status = 1
    try:
        status = serve()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _waited(child: int) -> int:
    """The exit status of the child, or less than 0 the signal that ended it; what ends the parent ends the child."""
    # By handlers, as a shell starts what runs in the background with SIGINT ignored.
    before = {number: signal.signal(number, lambda number, frame: _pass_on(child, number)) for number in ASKED}
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)
