"""What a device does for the one client that has it: build, sample, run, forget.

1. One client at a time, since two would disturb each other's times. A client has a *lease*, and its engines belong to
   it. The lease goes with the connection that it was taken on, and another client waits `PATIENCE_S` for that, then
   gets a sentence. A client that comes back on a new connection takes its own lease over, and finds no engine there.
2. What a client sends is never written to a file, unpickled or executed. A timing cache may hold compiled kernels, so
   none is taken from a client. The runner keeps its own as long as the server runs, and a client learns by a digest
   whether the cache in its table is one that was made here. ONNX Runtime on the CPU saves the optimised graph of a part
   in a folder of its own for a moment (`sluice.runtime.ort.blocked_part`).
3. A client that asks for what cannot be gets a sentence, and so does one whose model a runtime fails on.
4. A device that rests lowers its clock, and while a question is on its way there is nothing to do. So the last engine
   is run until the next question is there, for `AWAKE_S` at the most, as if the turns followed each other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sluice.core.errors import SluiceError
from sluice.runtime.base.host import host_identity
from sluice.runtime.base.runner import Runner, Session, turn
from sluice.runtime.remote.models import model_of
from sluice.runtime.remote.wire import MOST_BURSTS, MOST_REPEATS, VERSION, Hello, pack, unpack

__all__ = ["Busy", "Device", "Lease"]

PATIENCE_S = 2.0
MOST_SESSIONS = 4096
AWAKE_S = 0.05
LEAST_S = 2e-5  # of an inference that keeps anything awake


class Busy(SluiceError):
    """Another client has the device."""


@dataclass(slots=True, eq=False)
class Lease:
    """The time in which one client has the device; ``line`` is its connection."""

    client: str
    line: object
    sessions: dict[int, Session] = field(default_factory=dict)
    made: int = 0
    ended: bool = False


class Device:
    """A runner that one client at a time uses from afar.

    Args:
        target, threads: what the runner was made for.
        patience_s: how long a client waits for another's lease to end.
    """

    def __init__(self, runner: Runner, target: str, threads: int = 1, patience_s: float = PATIENCE_S) -> None:
        self._runner, self._patience_s = runner, patience_s
        self._lease: Lease | None = None
        self._changed, self._work = threading.Condition(), threading.Lock()
        self._caches: set[str] = set()
        parts, caches = hasattr(runner, "build_part"), getattr(runner, "cache", None) is not None
        host = tuple(sorted(host_identity()))
        self.hello = Hello(
            VERSION, target, runner.device, runner.version, runner.clock, threads, host, parts, caches,
            free_borders=getattr(runner, "free_borders", False), fuses=hasattr(runner, "fused"),
        )  # fmt: skip

    def lease(self, client: str, line: object) -> Lease:
        """The lease of this client on this connection (rule 1).

        Raises:
            Busy: another client has one.
        """
        with self._changed:
            before = self._lease
            if before is not None and before.client == client and before.line is line:
                return before
            if before is None or before.client != client:
                if not self._changed.wait_for(lambda: self._lease is None, self._patience_s):
                    raise Busy("another client measures on this device; try again when it is done")
                before = None
            self._lease = found = Lease(client, line)
        if before is not None:
            self._end(before)
        return found

    def hung_up(self, lease: Lease) -> None:
        """The connection of this lease has gone, and its engines with it."""
        self._end(lease)
        with self._changed:
            if self._lease is lease:
                self._lease = None
                self._changed.notify_all()

    def _end(self, lease: Lease) -> None:
        with self._work:  # nothing is freed while the runtime is at work
            lease.ended = True
            lease.sessions.clear()

    def build(
        self, lease: Lease, model: bytes | bytearray, part: bool, batch: int | None, shapes: Any
    ) -> dict[str, Any]:
        if len(lease.sessions) >= MOST_SESSIONS:
            raise SluiceError(f"there are {MOST_SESSIONS} engines of this client on the device; close some first")
        if part and not self.hello.parts:
            raise SluiceError(f"{self.hello.target} builds no parts of networks; ask for a whole one")
        parsed = model_of(model)
        with self._work:
            if part:
                session = self._runner.build_part(parsed)  # type: ignore[attr-defined]
            else:
                session = self._runner.build(parsed, batch=batch, feeds_shapes=_shapes(shapes))
            if lease.ended:
                raise Busy("the client has come back on another connection; ask there")
            lease.made += 1
            lease.sessions[lease.made] = session
        kernels = getattr(session, "kernels", None)
        return {
            "session": lease.made,
            "clock": session.clock,
            "ramps": getattr(session, "ramps", None),
            "kernels": None if kernels is None else _told(kernels),
        }

    def fused(self, model: bytes | bytearray, batch: int | None) -> list[list[str]]:
        """By kernel of the engine, the ONNX nodes that it computes (`sluice.runtime.base.runner`, 8)."""
        if not self.hello.fuses:
            raise SluiceError(f"{self.hello.target} tells no kernels of whole engines; ask for none")
        parsed = model_of(model)
        with self._work:
            return self._runner.fused(parsed, batch=batch)  # type: ignore[attr-defined]

    def sample(self, lease: Lease, session: Any, repeats: Any, count: Any) -> list[float]:
        if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
            raise SluiceError(f"a burst cannot have {_short(repeats)} inferences; give 1 to {MOST_REPEATS}")
        if type(count) is not int or not 1 <= count <= MOST_BURSTS:
            raise SluiceError(f"there cannot be {_short(count)} bursts in a row; give 1 to {MOST_BURSTS}")
        found = _session(lease, session)
        with self._work:
            return turn(found, repeats, count)

    def stay_awake(self, lease: Lease, session: Any, asked: Callable[[], bool]) -> None:
        """Run this engine until ``asked`` says that there is a question (rule 4)."""
        found, end = lease.sessions.get(session), time.perf_counter() + AWAKE_S
        with self._work, suppress(Exception):  # a fault will show again when its time is asked for
            while found is not None and not lease.ended and not asked() and (before := time.perf_counter()) < end:
                found.sample(1)
                if time.perf_counter() < before + LEAST_S:
                    break

    def run(self, lease: Lease, session: Any, tensors: bytes | bytearray) -> bytes:
        found, feeds = _session(lease, session), unpack(tensors)
        with self._work:
            return pack(found.run(feeds))

    def close(self, lease: Lease, sessions: Any) -> None:
        if not isinstance(sessions, list):
            raise SluiceError("the engines to close are no list; give their numbers")
        with self._work:
            for number in sessions:
                if type(number) is int:
                    lease.sessions.pop(number, None)

    def clock_mhz(self) -> int | None:
        read = getattr(self._runner, "sm_clock_mhz", None)
        return None if read is None else read()

    def cache(self, known: Any = None) -> bytes:
        """The timing cache; nothing if ``known`` is the digest of the present one.

        It is serialised here, when a client wants to keep it, and not with every engine.
        """
        with self._work:
            content = bytes(getattr(self._runner, "cache", None) or b"")
        digest = hashlib.sha256(content).hexdigest()
        self._caches.add(digest)
        return b"" if digest == known else content

    def knows(self, digest: Any) -> bool:
        """Whether the timing cache with this digest is, or was, the runner's; then its present one holds all of it."""
        return isinstance(digest, str) and digest in self._caches


def _session(lease: Lease, number: Any) -> Session:
    if type(number) is not int or number not in lease.sessions:
        raise SluiceError(f"there is no engine {_short(number)} of this client on the device; build it first")
    return lease.sessions[number]


def _shapes(shapes: Any) -> Mapping[str, Sequence[int]]:
    plain = isinstance(shapes, dict) and all(
        isinstance(dims, list) and all(type(size) is int for size in dims) for dims in shapes.values()
    )
    if not plain:
        raise SluiceError("the shapes are no lists of whole numbers by input; send what the protocol says")
    return dict(shapes)


def _told(kernels: Counter[Hashable]) -> list[tuple[str, int]]:
    """Kernels as short texts: equal texts are equal kernels."""
    return [(hashlib.sha256(repr(kernel).encode()).hexdigest()[:32], count) for kernel, count in kernels.items()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
