"""What goes over the line between a host and the device that it measures on (`sluice serve`), HTTP/1.1.

1. Requests, all but the first with the header ``X-Sluice-Client``, a name that the client made up for itself:

       GET  /hello                            -> what is served (`Hello`)
       POST /build?part=0&batch=8&shapes={}   an ONNX file -> {"session", "clock", "ramps", "kernels"}
       POST /sample {session, repeats, count} -> {"ms": [...]}, of ``count`` bursts in a row
       POST /run?session=1                    tensors (2) -> tensors
       POST /close {"sessions": [...]}        -> {}
       POST /clock {}                         -> {"mhz": of the accelerator, or null}
       POST /fused?batch=8                    an ONNX file -> {"fused": [[node, ...], ...]}, by kernel of its engine
       POST /cache {"digest": ...}            -> the timing cache; nothing if it is still the one with this digest
       POST /offer {"digest": ...}            -> {"known": whether the device has made that timing cache itself}

   What is refused comes with a status of 4xx or 5xx as ``{"error": sentence}``. With a token every request carries
   ``Authorization: Bearer TOKEN``.
2. *Tensors* are a line of JSON, ``[[name, type, shape], ...]``, and the numbers of each in that order, little-endian.
   Types are numpy's names, and those of ml_dtypes. So nothing is unpickled or unpacked, and the length that is declared
   is the length that is allocated.
3. Every length is bounded: `MOST_JSON` bytes of JSON from a client, `MOST_BYTES` of anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError

__all__ = [
    "CLIENT",
    "MOST_BURSTS",
    "MOST_BYTES",
    "MOST_JSON",
    "MOST_REPEATS",
    "VERSION",
    "Hello",
    "from_json",
    "pack",
    "readable",
    "unpack",
]

VERSION = 1
CLIENT = "X-Sluice-Client"
MOST_JSON = 1 << 16
MOST_BYTES = (1 << 31) - 1  # of one protobuf
MOST_REPEATS, MOST_BURSTS = 1 << 20, 1 << 10
MOST_TEXT = 2000  # characters of a name or a sentence
NUMPY = (
    "float16",
    "float32",
    "float64",
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
ML_DTYPES = ("bfloat16", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a device says of itself: all that the fingerprint of a table holds of it, and what its runner can.

    ``host`` as `sluice.runtime.base.host.host_identity`; ``parts``: the runner builds parts of networks in a way of its
    own; ``caches``: it has a timing cache; ``free_borders``: its parts have no sources (`sluice.runtime.base.runner`,
    rule 6); ``fuses``: it tells which operators a kernel computes (rule 8).
    """

    format: int
    target: str
    device: str
    version: str
    clock: str
    threads: int
    host: tuple[str, ...] = ()
    parts: bool = False
    caches: bool = False
    free_borders: bool = False
    fuses: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Any) -> Hello:
        """From JSON.

        Raises:
            SluiceError: it is of another format, or no such thing.
        """
        version = values.get("format") if isinstance(values, dict) else None
        if type(version) is int and version != VERSION:
            raise SluiceError(f"it speaks format {version}, this is {VERSION}; use one release of sluice on both sides")
        wanted: dict[str, type] = {"format": int, "threads": int, "host": list}
        wanted |= dict.fromkeys(("parts", "caches", "free_borders", "fuses"), bool)
        names = [field.name for field in fields(cls)]
        if version is None or any(type(values.get(name)) is not wanted.get(name, str) for name in names):
            raise SluiceError("it is no `sluice serve`")
        told: dict[str, Any] = {n: readable(values[n]) if wanted.get(n, str) is str else values[n] for n in names}
        told["host"] = tuple(readable(str(text)) for text in values["host"])
        return cls(**told)


def from_json(content: bytes | bytearray) -> Any:
    """What the bytes say.

    Raises:
        SluiceError: they are no JSON, or too deep.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise SluiceError("the body is not JSON, or is nested too deeply; send what the protocol says") from None


def readable(text: str) -> str:
    """A name or sentence from the other side, of one line and without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:MOST_TEXT])


def pack(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Tensors by name as bytes (rule 2).

    Raises:
        SluiceError: a type has no name here.
    """
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.name not in (*NUMPY, *ML_DTYPES):
            raise SluiceError(
                f"cannot send {name!r}, it is {array.dtype}; use one of {', '.join((*NUMPY, *ML_DTYPES))}"
            )
    head = json.dumps([[name, array.dtype.name, array.shape] for name, array in arrays.items()]).encode()
    return b"".join([head, b"\n", *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])


def unpack(content: bytes | bytearray) -> dict[str, np.ndarray]:
    """Tensors by name from bytes.

    Raises:
        SluiceError: they say another length than they have, or are no such bytes.
    """
    end = content.find(b"\n", 0, MOST_JSON)
    head = from_json(bytes(content[: max(end, 0)]))
    found, at = {}, end + 1
    try:
        for name, kind, shape in head:
            dtype = _dtype(kind)
            if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError
            size = math.prod(shape) * dtype.itemsize
            if size > len(content) - at:
                raise ValueError
            found[name] = np.frombuffer(content, dtype, math.prod(shape), at).reshape(shape).copy()  # aligned
            at += size
        if at != len(content):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SluiceError("the tensors are not as long as they say, or are none; send what the protocol says") from None
    return found


def _dtype(kind: Any) -> np.dtype:
    if kind in NUMPY:
        return np.dtype(kind)
    if kind not in ML_DTYPES:
        raise ValueError
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, kind))
