"""The runner of a device that another machine serves: sessions live there, and only times and tensors travel.

1. Device, version, clock and identity are the device's. So the fingerprint of a table that is measured over a line is
   the fingerprint of one that a job measures there, and either goes on with the other's table.
2. What the runner of the device lacks is lacking here: ``build_part``, ``cache``, ``fused``. Kernels are told by a text
   each, of which equal ones are equal kernels.
3. The device takes no timing cache from anybody (`sluice.runtime.remote.device`, 2). If the cache of a table is one
   that it made itself since it was started, it knows all that is in there. If it is not, the table keeps its own, and
   a line in the log says that engines may get other kernels than those that were measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sluice.core.address import LOCAL, target_at
from sluice.core.errors import SluiceError
from sluice.runtime.base.inputs import parsed, place, serialized
from sluice.runtime.base.runner import Clock
from sluice.runtime.remote.line import Line, line_to
from sluice.runtime.remote.local import local_server
from sluice.runtime.remote.wire import MOST_BYTES, Hello, pack, unpack

if TYPE_CHECKING:
    from sluice.runtime.base.inputs import Model

__all__ = ["RemoteRunner", "RemoteSession"]

log = logging.getLogger(__name__)


class RemoteRunner:
    """The runner that `sluice serve --target TARGET --threads N` has at ``address``.

    Raises:
        SluiceError: nobody answers there, or it serves another target or another number of threads.
    """

    def __init__(self, target: str, address: str, threads: int = 1) -> None:
        self._target = target
        self._local = address == LOCAL
        if self._local:
            child = local_server(target, threads)
            self._line = line_to(child.address, child)
        else:
            self._line = line_to(address)
        self._hello = hello = self._line.hello(target)
        if (hello.target, hello.threads) != (target, threads):
            raise SluiceError(
                f"{address} serves {hello.target} with threads={hello.threads}, not {target} with threads={threads}; "
                f"ask for that, or start `sluice serve` anew there"
            )
        if hello.clock not in get_args(Clock):
            raise SluiceError(
                f"{address} times by {hello.clock!r}, which is unknown here; use one release on both sides"
            )
        self.clock: Clock = hello.clock  # type: ignore[assignment]
        self._cache, self._foreign, self._built_since = b"", False, False
        self.free_borders = hello.free_borders
        if hello.parts:
            self.build_part = self._build_part
        if hello.fuses:
            self.fused = self._fused

    def revive(self) -> bool:
        """Whether the device answers again after a `LostLine`; engines that were there are gone."""
        return self._line.again(self._target)

    @property
    def device(self) -> str:
        return self._hello.device

    @property
    def version(self) -> str:
        return self._hello.version

    def host_identity(self) -> frozenset[str]:
        """Of the machine where the device is (`sluice.runtime.base.host`)."""
        return frozenset(self._hello.host)

    def sm_clock_mhz(self) -> int | None:
        """The clock at which the device computes right now, where its driver tells."""
        found = self._line.ask("/clock", self._target, {}).get("mhz")
        return found if type(found) is int else None

    @property
    def cache(self) -> bytes | None:
        """The timing cache of the device, None where its runner has none (rule 3)."""
        if not self._hello.caches:
            return None
        if self._built_since and not self._foreign:
            known = json.dumps({"digest": hashlib.sha256(self._cache).hexdigest()})
            self._cache = self._line.fetch("/cache", self._target, known.encode()) or self._cache
            self._built_since = False
        return self._cache

    @cache.setter
    def cache(self, known: bytes) -> None:
        asked = {"digest": hashlib.sha256(known).hexdigest()}
        self._cache, self._foreign = known, self._line.ask("/offer", self._target, asked).get("known") is not True
        if self._foreign:
            log.warning(
                "%s was started after the table was filled: its engines may get other kernels than those of the table",
                target_at(self._target, self._line.address),
            )

    def build(
        self,
        model: Model,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> RemoteSession:
        """An engine on the device; arguments and errors are those of the device's own runner."""
        query: dict[str, Any] = {} if batch is None else {"batch": int(batch)}
        if batch is not None and batch < 1:
            raise SluiceError(f"cannot build {place(model)} with batch={batch}; give 1 or more")
        if feeds_shapes:
            query["shapes"] = json.dumps({name: [*map(int, dims)] for name, dims in feeds_shapes.items()})
        return self._built(model, query)

    def _build_part(self, model: Model) -> RemoteSession:
        return self._built(model, {"part": 1})

    def _fused(self, model: Model, *, batch: int | None = None) -> list[list[str]]:
        """By kernel of the engine of ``model``, the ONNX nodes that it computes."""
        told = self._sent("/fused", model, {} if batch is None else {"batch": int(batch)}).get("fused")
        if not isinstance(told, list) or not all(isinstance(own, list) for own in told):
            raise SluiceError(f"{self._line.address} tells no kernels; use one release of sluice on both sides")
        return [[str(name) for name in own] for own in told]

    def _built(self, model: Model, query: dict[str, Any]) -> RemoteSession:
        answer = self._sent("/build", model, query)
        return RemoteSession(self._line, self._target, self._hello, answer, place(model))

    def _sent(self, path: str, model: Model, query: dict[str, Any]) -> dict[str, Any]:
        whole = model if isinstance(model, bytes) else parsed(model, weights=True)
        content = serialized(whole)
        if len(content) > MOST_BYTES:
            mend = "give --in-process, or the target without @local" if self._local else "measure on the device itself"
            raise SluiceError(
                f"{place(model)} has {len(content):,} bytes, beyond the {MOST_BYTES:,} that can be sent; {mend}"
            )
        self._built_since = True
        return self._line.send(path, self._target, query, content)


class RemoteSession:
    """An engine on the device; made by `RemoteRunner`. It is closed there once it is collected here."""

    def __init__(self, line: Line, target: str, hello: Hello, answer: dict[str, Any], where: str) -> None:
        self._line, self._target, self._where = line, target, where
        number, clock, ramps, kernels = (answer.get(key) for key in ("session", "clock", "ramps", "kernels"))
        if type(number) is not int or clock not in get_args(Clock) or not isinstance(kernels, (list, type(None))):
            raise SluiceError(f"{line.address} built what is no engine; use one release of sluice on both sides")
        self._session: int = number
        self.clock: Clock = clock  # type: ignore[assignment]
        self.ramps = clock == "cuda" if ramps is None else bool(ramps)
        self.kernels: Counter[Hashable] | None = None if kernels is None else _kernels(kernels, line.address)
        self._connection = line.opened(self, number)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
        path = f"/run?session={self._session}"
        return unpack(self._line.fetch(path, self._target, pack(feeds), self._connection))

    def sample(self, repeats: int) -> float:
        """Milliseconds per inference of one burst, by the device."""
        return self.turn(repeats, 1)[0]

    def turn(self, repeats: int, count: int) -> list[float]:
        """Of ``count`` bursts in a row."""
        asked = {"session": self._session, "repeats": repeats, "count": count}
        found = self._line.ask("/sample", self._target, asked, self._connection).get("ms")
        if not isinstance(found, list) or len(found) != count or not all(type(ms) in (int, float) for ms in found):
            raise SluiceError(f"{self._line.address} tells no times of {self._where}; use one release on both sides")
        return [ms if math.isfinite(ms) else math.nan for ms in map(float, found)]


def _kernels(told: list[Any], address: str) -> Counter[Hashable]:
    try:
        return Counter({str(name): int(count) for name, count in told})
    except (TypeError, ValueError):
        raise SluiceError(f"{address} tells kernels that are none; use one release of sluice on both sides") from None
