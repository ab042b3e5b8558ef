"""An exported file in words, and the commands that build, time and check its engine elsewhere.

1. ``trtexec``: the types are in the file, so no flag gives a precision. TensorRT 10 wants ``--stronglyTyped`` as well,
   which 11 refuses, so the line is for the one found here, and for 11 where there is none. Times are those of a CUDA
   graph without transfers, as `sluice bench` takes them. The engine that it saves never replaces one written here.
2. ``polygraphy`` compares TensorRT with ONNX Runtime, each value within an absolute or a relative tolerance. Tolerances
   are multiples of the precision's resolution, about 2e-7, 5e-4, 4e-3 and 8e-3: runtimes sum in another order, and
   choose algorithms of their own. ONNX Runtime has no bfloat16 convolutions on a CPU; such a file is only checked for
   infinities and NaNs.
3. An int8 file has the form that one runtime wants; TensorRT's commands are for a file that was written for it.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.commands.export_engine import Asked, Engine, cache_of, difference_told, session_of, unmeasured, write_engine
from sluice.commands.specs import fixed_rows
from sluice.core.errors import SluiceError
from sluice.core.files import ONNX, check_output

if TYPE_CHECKING:
    import onnx


__all__ = [
    "Commands",
    "Outcome",
    "Sized",
    "check_files",
    "commands",
    "outcome",
]

TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": None, "int8": 1e-1}


@dataclass(frozen=True, slots=True)
class Commands:
    """Command lines, quoted for a shell."""

    trtexec: str
    polygraphy: str


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """A model with numbers for its open sizes but the batch, and the shape of every input that is open in the file."""

    model: onnx.ModelProto
    shapes: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The output as JSON and as lines, and the reason where the user wants an engine and there is none."""

    data: dict[str, Any]
    lines: list[str]
    refusal: SluiceError | None


def check_files(path: str, engine: str | None, plan: str | None = None, table: str | None = None) -> None:
    """Check that the file, its engine and the timing cache beside that are three files that can be written.

    Raises:
        SluiceError: two of them are one file, or one is no file, of another kind, or read by the same command.
    """
    read = {"the plan": plan, "the latency table": table}
    if plan is not None and os.path.isdir(plan):
        read |= {"the plan": os.path.join(plan, "plan.json"), "the weights": os.path.join(plan, "slim.safetensors")}
    check_output(path, read, ONNX)
    if engine is None:
        return
    files = {"-o": path, "--engine": engine, "the timing cache beside the engine": cache_of(engine)}
    for (one, first), (other, second) in combinations(files.items(), 2):
        if Path(first).resolve() == Path(second).resolve():
            raise SluiceError(
                f"{one} and {other} are both {second!r}; give each a file of its own, the engine *.engine"
            )
    check_output(engine, read)
    check_output(cache_of(engine), read)


def outcome(
    model: onnx.ModelProto,
    path: str,
    asked: Asked | None,
    *,
    precision: str,
    target: str,
    batch: int,
    error: float | None = None,
    wide: onnx.ModelProto | None = None,
    place: str = "",
    sized: Sized | None = None,
) -> Outcome:
    """Build the engine, if the user wants one, and describe file and engine; ``model`` is the content of ``path``.

    Where there is no engine, the file and the commands are still of use on another machine. An engine that can run, of
    TensorRT or of the target at ``place``, is compared with the fp32 network ``wide``.

    Args:
        error: of a file in another precision, relative to fp32; on the calibration inputs for int8.
        sized: of a file with more open sizes than the batch: the model of the engine, and the shapes of open inputs.
    """
    from sluice.artifacts.engine_check import check_engine
    from sluice.core.weight_bytes import bytes_of_weights, is_large

    fixed = bool(fixed_rows(model))  # the batch, by the network
    size = bytes_of_weights(model) if is_large(model) else model.ByteSize()
    data: dict[str, Any] = {"out": path, "bytes": size, "precision": precision, "batch_fixed": fixed}
    lines = [f"{path}: {size:,} bytes, {precision}{f', batch fixed at {batch}' * fixed}"]
    if error is not None:
        data["error"] = error if math.isfinite(error) else None  # JSON has no infinity
        inputs = "the first calibration inputs" if precision == "int8" else "random inputs"
        lines.append(f"relative error to fp32 {error:.1e}, on {inputs}")
    refusal, built, whole = None, None, model if sized is None else sized.model
    if asked is not None:
        try:
            built = write_engine(whole, asked, batch)
        except SluiceError as error:
            refusal = error
        else:
            data["engine"] = asdict(built)
            lines.append(f"{built.file}: {built.bytes:,} bytes, batch {batch}, by {built.builder}")
    if wide is not None and refusal is None and (built is not None or place):
        engine = built.file if built is not None else f"the engine of {path} on {place}"
        try:
            session = session_of(whole, built, place or target, batch)
            check = check_engine(session, whole, wide, precision, target=place or target, batch=batch)
        except SluiceError as reason:
            lines.append(f"{engine} was not compared with fp32: {reason}")
        else:
            data["engine_error"] = check.error if math.isfinite(check.error) else None
            lines.append(f"{engine}: relative error to {_reference(precision)} {check.error:.1e}, as it runs")
            refusal = None if check.same else check.refusal(engine)
            if asked is not None and asked.kernels:
                apart, count = unmeasured(session.layers(), asked.kernels)
                data["kernels"], data["kernels_not_in_table"] = count, apart
                lines.append(difference_told(apart, count))
    if precision != "int8" or target == "tensorrt":
        own = asked.file if asked is not None else str(Path(path).with_suffix(".engine"))
        version = _version(built)
        shapes = None if sized is None else sized.shapes
        found = commands(
            model, path, own, precision=precision, batch=batch, written=built is not None, version=version,
            shapes=shapes,
        )  # fmt: skip
        data |= asdict(found)
        lines += [
            f"build and time with TensorRT {version or '11 (10 wants --stronglyTyped as well)'}:",
            f"  {found.trtexec}",
            "check the result:",
            f"  {found.polygraphy}",
        ]
    return Outcome(data, lines, refusal)


def commands(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    engine: str | os.PathLike[str],
    *,
    precision: str,
    batch: int = 1,
    written: bool = False,
    version: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Commands:
    """The command lines for ``model``, written to ``path``, and its engine.

    Args:
        written: the engine is there already; the command saves its own beside it.
        version: of TensorRT, the major one.
        shapes: of all open inputs, where more than the batch is open.
    Raises:
        SluiceError: an input has a dynamic dimension that is not its batch.
    """
    from sluice.runtime.trt.settings import Settings

    shapes = _dynamic_inputs(model, batch) if shapes is None else shapes
    cache = cache_of(engine)
    saved = Path(engine).with_suffix(".trtexec.engine") if written else engine
    trtexec = [f"--onnx={os.fspath(path)}", f"--saveEngine={os.fspath(saved)}"]
    if version == 10:
        trtexec.append("--stronglyTyped")
    if shapes:
        trtexec.append("--shapes=" + ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shapes.items()))
    trtexec += [
        f"--timingCacheFile={cache}",
        *Settings.from_environment().trtexec(),
        "--useCudaGraph",
        "--useSpinWait",
        "--noDataTransfers",
    ]
    polygraphy = ["run", os.fspath(path), "--trt", "--strongly-typed"]
    tolerance = TOLERANCES[precision]
    if tolerance is None:
        polygraphy.append("--validate")
    else:
        polygraphy += ["--onnxrt", "--rtol", f"{tolerance:g}", "--atol", f"{tolerance:g}"]
    if shapes:
        polygraphy += ["--input-shapes", *(f"{name}:[{','.join(map(str, dims))}]" for name, dims in shapes.items())]
    polygraphy += ["--load-timing-cache", cache, "--save-timing-cache", cache]
    return Commands(shlex.join(["trtexec", *trtexec]), shlex.join(["polygraphy", *polygraphy]))


def _reference(precision: str) -> str:
    return "its int8 file" if precision == "int8" else "fp32"


def _dynamic_inputs(model: onnx.ModelProto, batch: int) -> dict[str, list[int]]:
    """The shape at ``batch`` of every input that the file leaves open."""
    from sluice.runtime.base.inputs import static_shapes

    open_, fixed = static_shapes(model, None, {}).inputs, static_shapes(model, batch, {}).inputs
    found: dict[str, list[int]] = {}
    for name, dims in fixed.items():
        sizes = [size for size in dims if isinstance(size, int)]
        if len(sizes) < len(dims):
            raise SluiceError(
                f"input {name!r} has shape {list(dims)}, of which only the batch may be open in a deployment; "
                f"export the model with its other sizes fixed"
            )
        if sizes != list(open_[name]):
            found[name] = sizes
    return found


def _version(built: Engine | None) -> int | None:
    """The major version of the TensorRT that built the engine, or of the one that is installed; RTX has no trtexec."""
    from sluice.runtime.trt.build import find_tensorrt, product

    name = built.builder if built is not None else ""
    if not name and find_spec("tensorrt") is not None:
        with suppress(SluiceError):
            name = product(find_tensorrt())
    found = re.match(r"TensorRT (\d+)\.", name)
    return int(found[1]) if found else None
