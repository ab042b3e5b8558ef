"""An engine of TensorRT for ``sluice export``: built, written, compared with fp32 and with the kernels of a table.

1. The engine is built with the timing cache of a table, or else with the one next to its file, and leaves its own
   there.
2. Where it can run, its outputs are compared with fp32 (`sluice.artifacts.engine_check`), and so is the engine of a
   target that the user names.
3. An export takes long, so what is missing here is told before it. Without TensorRT there is no engine, and nothing is
   written. A file for a target that cannot run here is of use elsewhere, and only not compared.
4. With a table it should run the kernels that were measured. Those that no part of the table ran are told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx

    from sluice.runtime.trt.inspect import EngineLayer

__all__ = [
    "Asked",
    "Engine",
    "asked_with",
    "cache_of",
    "check_place",
    "difference_told",
    "session_of",
    "unmeasured",
    "write_engine",
]


@dataclass(frozen=True, slots=True)
class Asked:
    """The file for an engine, and what a table gives for it.

    That is a timing cache to build it with (else the one next to the file, if any), and digests of the kernels that the
    table's parts ran.
    """

    file: str
    cache: bytes = b""
    kernels: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that was written: its file, its size, and the TensorRT that built it."""

    file: str
    bytes: int
    builder: str


def check_place(out: str, engine: str | None, place: str) -> None:
    """Tell what is missing for an engine, or for the comparison with the target at ``place`` (rule 3).

    Raises:
        SluiceError: an engine is wanted, and TensorRT is not here.
    """
    from sluice.core.address import LOCAL, split_target
    from sluice.runtime.targets import make_runner
    from sluice.runtime.trt.build import find_tensorrt

    if engine is not None:
        try:
            find_tensorrt()
        except SluiceError as error:
            raise SluiceError(f"{engine!r} cannot be built here: {error}; or leave out --engine") from error
    elif place and (where := split_target(place))[1] in ("", LOCAL):
        try:
            make_runner(where[0])
        except SluiceError as error:
            print(f"{out} is written, and not compared with fp32: {error}", file=sys.stderr)


def asked_with(engine: str, table: str | os.PathLike[str]) -> Asked:
    """The file for an engine, with the timing cache and the kernels of a table of this TensorRT on this device.

    Raises:
        SluiceError: the table cannot be read, is of another runtime, version or device, or holds no cache.
    """
    from sluice.core.deployment import Deployment
    from sluice.profiler.profile import fingerprint_here
    from sluice.profiler.table.fingerprint import difference
    from sluice.profiler.table.latency_table import LatencyTable
    from sluice.profiler.timing.timing_cache import NAME, known_kernels

    with LatencyTable.open(table) as opened:
        there, cache, kernels = opened.fingerprint, opened.get_blob(NAME), known_kernels(opened)
    if there.runtime != "tensorrt" or not cache:
        raise SluiceError(
            f"{os.fspath(table)!r} holds no timing cache (its runtime is {there.runtime}); give a table that "
            f"`sluice profile --target tensorrt` filled, or leave out --table"
        )
    here = fingerprint_here(Deployment("tensorrt", there.batch, there.threads, there.precision))
    if differences := difference(there, here):
        raise SluiceError(
            f"the timing cache in {os.fspath(table)!r} is of no use here: {'; '.join(differences)}; leave out --table"
        )
    return Asked(engine, cache, kernels)


def write_engine(model: onnx.ModelProto, asked: Asked, batch: int) -> Engine:
    """Build ``model`` with the TensorRT of this machine and write the engine; its timing cache is kept next to it.

    Raises:
        SluiceError: TensorRT is not here, cannot start, or refuses the model; or the file cannot be written.
    """
    from sluice.core.files import write_atomically
    from sluice.runtime.trt.build import build_engine, check_int8, find_tensorrt, product
    from sluice.runtime.trt.settings import Settings

    trt, cache = find_tensorrt(), Path(cache_of(asked.file))
    check_int8(trt, model)
    before = asked.cache or (cache.read_bytes() if cache.is_file() else b"")
    built = build_engine(trt, model, batch=batch, cache=before, settings=Settings.from_environment())
    write_atomically(asked.file, built.plan)
    # RTX has no cache; one that the full TensorRT left is not lost by that.
    if built.cache and built.cache != before:
        write_atomically(cache, built.cache)
    return Engine(asked.file, len(built.plan), product(trt))


def session_of(model: onnx.ModelProto, built: Engine | None, place: str, batch: int) -> Any:
    """The engine that was written, or else that of ``model`` on ``place``.

    Raises:
        SluiceError: it cannot run here.
    """
    from sluice.runtime.targets import make_runner

    runner: Any = make_runner(place)
    if built is None:
        return runner.build(model, batch=batch)
    return runner.load(Path(built.file).read_bytes(), built.file)


def unmeasured(layers: Sequence[EngineLayer], known: Collection[str]) -> tuple[list[str], int]:
    """Layers whose kernels no part of the table ran, and the number of all kernels."""
    from sluice.profiler.timing.timing_cache import digest
    from sluice.runtime.trt.inspect import kernels

    found = [(layer.name, list(kernels([layer]))) for layer in layers]
    return [name for name, own in found if any(digest(k) not in known for k in own)], sum(len(k) for _, k in found)


def difference_told(apart: Sequence[str], count: int) -> str:
    if not apart:
        return f"all {count} kernels of the engine are among those that the table's parts ran"
    told = ", ".join(apart[:3]) + (f" and {len(apart) - 3} more" if len(apart) > 3 else "")
    return f"{len(apart)} of {count} kernels of the engine were measured in no part of the table: {told}"


def cache_of(engine: str | os.PathLike[str]) -> str:
    """Where the timing cache of an engine is kept."""
    return str(Path(engine).with_suffix(".cache"))
