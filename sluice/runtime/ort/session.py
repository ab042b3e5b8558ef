"""The common part of sessions of ONNX Runtime on any device: loading, computing, made-up inputs.

1. A build for NVIDIA's GPUs is linked against the libraries of CUDA, so these are loaded before it is imported: by
   torch where that is installed, since two copies in one process would be trouble, else by name or from NVIDIA's
   packages. Libraries that torch does not bring (cuDNN, other versions) ONNX Runtime finds itself once it is imported.
2. Shapes are made static before the graph is optimised. A named dimension is overridden by its name, a dimension
   without one is written into the model.
3. Weights of some megabytes lie beside the model, where the session reads them (`sluice.core.weight_bytes`). So do all
   those of *lean* sessions, which are for outputs and not for times, and are loaded without convolutions in blocks of
   channels.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError, first_line
from sluice.core.weight_bytes import FILED, Apart, bytes_of_weights, weights_apart
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.base.denormals import floating_point_mode
from sluice.runtime.base.inputs import Dims, Shapes, made_up, place, serialized, sized

if TYPE_CHECKING:
    from sluice.runtime.base.inputs import Model

__all__ = ["compute", "load_library", "load_session", "resident_inputs"]

DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


@functools.cache
def load_library(*, cuda: bool) -> str:
    """Import ONNX Runtime, ``cuda``: after the libraries of CUDA (rule 1); why that failed, empty where it did not."""
    if cuda:
        _load_cuda()
    try:
        import onnxruntime
    except ImportError as error:
        return f"the installed ONNX Runtime cannot be imported ({first_line(error)}); install what it needs"
    if cuda and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints missing libraries, and programs read our output
            onnxruntime.preload_dlls()
    return ""


def load_session(
    model: Model | Apart,
    shapes: Shapes,
    provider: str | tuple[str, dict[str, str]],
    *,
    threads: int = 1,
    entries: Mapping[str, str] | None = None,
    optimize: bool = True,
    lean: bool = False,
    save: Path | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` of ``model`` with static ``shapes`` (rules 2 and 3).

    Args:
        entries: further entries of the session's configuration.
        optimize: as a deployed engine is; else the graph is computed as it stands.
        lean: take little memory (rule 3) and keep none of values from run to run; operators run in the order of the
            file, so that a value goes where its last reader stands.
        save: where the optimised graph is written to.
    Raises:
        SluiceError: the model cannot be loaded; with the file's name and ONNX Runtime's reason.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    full = levels.ORT_ENABLE_EXTENDED if lean else levels.ORT_ENABLE_ALL
    options.graph_optimization_level = full if optimize else levels.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = not lean
    if lean:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if save is not None:
        options.optimized_model_filepath = str(save)
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    for name, size in shapes.sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    given = model if isinstance(model, Apart) else sized(model, shapes)
    if not isinstance(given, (Apart, bytes, str, os.PathLike)):
        given = weights_apart(given) if lean or (save is None and bytes_of_weights(given) >= FILED) else given

    def made(source: bytes | str) -> Any:
        with floating_point_mode(flush=False):
            # Without the fallback of the Python wrapper, which would try the CPU where another provider fails.
            return ort.InferenceSession(source, options, providers=[provider], enable_fallback=0)

    try:
        if isinstance(given, Apart):
            return given.loaded(options, made)
        return made(str(Path(given)) if isinstance(given, (str, os.PathLike)) else serialized(given))
    except SluiceError:
        raise
    except Exception as error:  # ORT's exceptions share no base class of their own
        name = place(model.light if isinstance(model, Apart) else model)
        raise SluiceError(f"ONNX Runtime cannot load {name}: {first_line(error)}; check the model") from error


def compute(
    session: Any, where: str, feeds: Mapping[str, np.ndarray], options: Any | None = None
) -> dict[str, np.ndarray]:
    """Outputs by name; `SluiceError` where a feed is missing, unknown or of the wrong type or shape."""
    names = [output.name for output in session.get_outputs()]
    try:
        outputs = session.run(names, dict(feeds), options)
    except Exception as error:
        shapes = {name: tuple(np.shape(value)) for name, value in feeds.items()}
        takes = ", ".join(f"{meta.name}: {meta.type} {meta.shape}" for meta in session.get_inputs())
        raise SluiceError(
            f"ONNX Runtime cannot run {where} on inputs {shapes}: {first_line(error)}; the model takes {takes}"
        ) from error
    return dict(zip(names, outputs, strict=True))


def resident_inputs(session: Any, shapes: Mapping[str, Dims], where: str) -> dict[str, np.ndarray]:
    """Data for every input; `SluiceError` where one has no static shape or a type for which none can be made up."""
    found = {}
    for meta in session.get_inputs():
        dtype = DTYPES.get(meta.type)
        if dtype is None:
            raise SluiceError(
                f"cannot time {where}: input {meta.name!r} is {meta.type}, for which no data can be made up; "
                f"use one of {', '.join(DTYPES)}"
            )
        found[meta.name] = made_up(meta.name, shapes.get(meta.name, tuple(meta.shape)), dtype, where)
    return found


def _load_cuda() -> None:
    if find_spec("torch"):
        with contextlib.suppress(ImportError, OSError):  # ONNX Runtime can do without a torch that is broken
            import torch  # noqa: F401
    else:
        with contextlib.suppress(SluiceError):  # the session that needs a missing library says so
            Cuda.load()
