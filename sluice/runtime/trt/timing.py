"""The timing cache of TensorRT, and the runtime cache of RTX: one object for all engines of a runner.

1. TensorRT adds to the object in every build. Serialized, parsed and copied at every build it would cost more than the
   build, since it holds some MB after some hundred of them. So it is serialized when somebody asks for its bytes.
2. It belongs to the device and the version. TensorRT refuses one of others; a new one is begun then.
3. RTX has no timing cache: it chooses kernels without measuring. Its kernels are compiled on the device, with the
   context of an engine, and a runtime cache holds them. It takes the place of the timing cache.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RuntimeCache", "TimingCache"]


class TimingCache:
    """The cache, from the bytes of earlier builds; `attach` gives it to a build, ``bytes()`` is its present content."""

    def __init__(self, content: bytes = b"") -> None:
        self._content = content
        self._object: Any = None

    def attach(self, config: Any) -> bool:
        """Let a build with this configuration use it; False where its content was refused (rule 2)."""
        if self._object is not None:
            config.set_timing_cache(self._object, False)
            return True
        self._object = config.create_timing_cache(self._content)
        if self._object is not None and config.set_timing_cache(self._object, False):
            return True
        self._object = config.create_timing_cache(b"")
        config.set_timing_cache(self._object, False)
        return False

    def __bytes__(self) -> bytes:
        return self._content if self._object is None else bytes(self._object.serialize())


class RuntimeCache:
    """The cache of RTX (rule 3); `attach` gives it to the context of an engine, ``bytes()`` is its present content."""

    def __init__(self, content: bytes = b"") -> None:
        self._content = content
        self._object: Any = None

    def attach(self, config: Any) -> None:
        """Let a context with this runtime configuration use it; content of others is left (rule 2)."""
        if self._object is None:
            self._object = config.create_runtime_cache()
            if self._content and not self._object.deserialize(self._content):
                self._object.reset()
        config.set_runtime_cache(self._object)

    def __bytes__(self) -> bytes:
        return self._content if self._object is None else bytes(self._object.serialize())
