"""ONNX -> TensorRT engine, by the Python API of TensorRT 11, which 10.x and TensorRT-RTX share.

1. Networks are strongly typed: the types are those of the ONNX file, no flag of the builder changes them. TensorRT 11
   and RTX know no other networks; 10.x needs a flag for it. An fp32 engine may use TF32 products, TensorRT's default.
2. Sizes are written into the model's inputs before it is parsed. Shape arithmetic then folds in the parser, no kernel
   is chosen for sizes that never come, and the context needs no profile of shapes; a budget speaks of an
   engine of one shape.
3. With a timing cache (`sluice.runtime.trt.timing`) a rebuild is fast and picks the same tactics, without it two builds
   of one file may differ by several percent. RTX has none: it chooses without measuring.
4. Layers are described in detail in the engine, so that they can be traced to the ONNX nodes they are made of.
5. TensorRT knows one logger in a process: the first that any builder or runtime was given is used by all of them, and
   must outlive them. So there is one, never freed, and a caller that wants a reason empties it before.
6. With its last builder TensorRT unloads its kernels, and loads them again, in seconds, with the next. A caller that
   builds many engines keeps a builder.
7. An engine of RTX can be captured as a CUDA graph only if it allocates no memory while it runs. So it is built to be
   given its scratch memory, where the version knows that flag, and a session gives it.
   It is built for the device that is here, where there is one; elsewhere for all that RTX serves. Its convolutions
   write floating point whatever follows them, so that int8 gains nothing, and is not deployed (`check_int8`).
8. An engine runs in one stream. By default TensorRT puts branches, such as the convolution of a shortcut, into a second
   one, where their time does not add to that of the others, and the sum of parts says nothing of the whole.
9. A part of a network is built with the borders that it has inside (`sluice.runtime.trt.borders`), so that no change of
   layout is timed with it, and that the same operators are fused.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.base import nvidia
from sluice.runtime.base.inputs import parsed, place, serialized, static_shapes
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.trt.borders import averaged, channels_last_already, on_rows, set_layouts
from sluice.runtime.trt.images import channels_last
from sluice.runtime.trt.inspect import node_name
from sluice.runtime.trt.settings import Settings
from sluice.runtime.trt.timing import TimingCache

if TYPE_CHECKING:
    import onnx

    from sluice.runtime.base.inputs import Model

__all__ = [
    "Built",
    "build_engine",
    "check_int8",
    "find_tensorrt",
    "is_rtx",
    "listener",
    "make_builder",
    "product",
    "static_model",
]

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
INSTALL = (
    "install tensorrt, or tensorrt-rtx-cu13-libs and tensorrt-rtx-cu13-bindings where only the package index is reached"
)
OLDEST = 10

# "In f at /_src/x.cpp:12", the place in TensorRT's own source, says nothing to the author of a network.
SOURCE = re.compile(r"\.?\s+In \w+ at /?[\w/.]+:\d+\)?$")
ERROR_CODE = re.compile(r"^.*?Error Code \d+: [\w ]+\((.*?)\)?$")
QUOTED = re.compile(r'^.*&& "(.*)"$')


@dataclass(frozen=True, slots=True)
class Built:
    """A serialized engine, and the timing cache that it was built with."""

    plan: bytes
    timing: TimingCache

    @property
    def cache(self) -> bytes:
        """The content of the timing cache now."""
        return bytes(self.timing)


def find_tensorrt() -> ModuleType:
    """TensorRT, or RTX in its place.

    Raises:
        SluiceError: neither is installed, or it is too old.
    """
    broken = ""
    for name in MODULES:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            broken = broken or ("" if error.name == name else f"; {name} lacks {error.name}")
            continue
        except (ImportError, OSError) as error:  # its libraries are not there
            broken = broken or f"; {name} cannot be loaded ({first_line(error)})"
            continue
        if not is_rtx(found) and int(str(found.__version__).split(".")[0]) < OLDEST:
            raise SluiceError(f"{product(found)} is too old; install version {OLDEST} or newer")
        return found
    raise SluiceError(f"TensorRT is not here{broken}; {INSTALL}")


def product(trt: Any) -> str:
    """Name and version, for messages and fingerprints."""
    return f"TensorRT{'-RTX' if is_rtx(trt) else ''} {trt.__version__}"


def is_rtx(trt: Any) -> bool:
    """Is it TensorRT for RTX, which has fewer devices and no timing cache?"""
    return "rtx" in str(trt.__name__)


def make_builder(trt: Any) -> Any:
    """A builder, for any number of engines.

    Raises:
        SluiceError: TensorRT cannot start here.
    """
    log = listener(trt)
    log.errors.clear()
    if hasattr(trt, "init_libnvinfer_plugins"):  # operators that the parser makes of plugins
        trt.init_libnvinfer_plugins(log, "")
    try:
        return trt.Builder(log)
    except TypeError as error:  # what the binding raises where the library made no builder
        raise SluiceError(
            f"{product(trt)} cannot start on this machine: {log.reason() or first_line(error)}; "
            f"run where an NVIDIA GPU with its driver is"
        ) from error


def check_int8(trt: Any, model: Model) -> None:
    """Raises `SluiceError` for an int8 network on RTX (rule 7)."""
    if is_rtx(trt) and any(node.op_type == "QuantizeLinear" for node in parsed(model).graph.node):
        raise SluiceError(
            f"{product(trt)} gains nothing from int8 in {place(model)}: its convolutions write floating point; choose "
            f"fp16, or install the full TensorRT"
        )


def build_engine(
    trt: Any,
    model: Model,
    *,
    batch: int | None = None,
    feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    cache: bytes | TimingCache = b"",
    settings: Settings | None = None,
    builder: Any = None,
    part: bool = False,
) -> Built:
    """Parse ``model`` and build its engine at fixed shapes.

    Args:
        trt: the module that `find_tensorrt` returned.
        batch: the size of every dynamic first dimension.
        feeds_shapes: whole shapes by input; they win over ``batch``.
        cache: timing cache of earlier builds on the same device; an object is added to, bytes are not.
        builder: one of `make_builder` that is kept (rule 6); by default one for this build alone.
        part: build with the borders of a part of a network (rule 9).
    Raises:
        SluiceError: a size is missing, or TensorRT refuses the model; the sentence names the ONNX node and operator
            where TensorRT does.
    """
    settings = settings or Settings()
    where, static = place(model), static_model(model, batch, feeds_shapes)
    last: set[str] = set()
    if part:
        static, last = channels_last(static)
        static = on_rows(static)
    builder = builder or make_builder(trt)
    log = listener(trt)
    log.errors.clear()
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(serialized(static)):
        raise SluiceError(
            f"{product(trt)} cannot parse {where}: {_parser_error(parser, static.graph)}; change the model there"
        )
    if part:
        plain = {info.name for info in (*static.graph.input, *static.graph.output) if info.doc_string == PLAIN}
        set_layouts(trt, network, plain | last | averaged(static) | channels_last_already(static))
    config = builder.create_builder_config()
    config.max_aux_streams = settings.aux_streams
    config.avg_timing_iterations = settings.timings
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if is_rtx(trt):
        _for_rtx(trt, config)
    timing = TimingCache(cache) if isinstance(cache, bytes) else cache
    if not is_rtx(trt) and not timing.attach(config):
        log.errors.clear()  # a fault of the cache is no reason why a build fails
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SluiceError(
            f"{product(trt)} cannot build {where}: {log.reason() or 'it gives no reason'}; change the model there, or "
            f"export it in another precision"
        )
    return Built(bytes(plan), timing)


def static_model(
    model: Model, batch: int | None = None, feeds_shapes: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """The model with the size of every input written into it (rule 2).

    Raises:
        SluiceError: a size is missing or does not fit.
    """
    import onnx

    read = parsed(model, weights=True)
    shapes = static_shapes(read, batch, feeds_shapes or {})
    sizes = {name: [size for size in dims if isinstance(size, int)] for name, dims in shapes.inputs.items()}
    for name, dims in shapes.inputs.items():
        if len(sizes[name]) < len(dims):
            raise SluiceError(
                f"input {name!r} of {place(model)} has dynamic shape {list(dims)}, an engine has one shape; "
                f"give its size with batch= or feeds_shapes="
            )
    declared = [info.type.tensor_type.shape.dim for info in read.graph.input if info.name in sizes]
    if all(dim.HasField("dim_value") for dims in declared for dim in dims):
        return read
    static = onnx.ModelProto()
    static.CopyFrom(read)
    for info in static.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, sizes.get(info.name, ()), strict=False):
            dim.dim_value = size
    for info in static.graph.output:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in shapes.sizes:
                dim.dim_value = shapes.sizes[dim.dim_param]
    # Shapes of inner tensors in the file speak of dimensions that have a size now.
    del static.graph.value_info[:]
    return static


@functools.cache
def listener(trt: Any) -> Any:
    """The logger (rule 5): it keeps the errors; ``reason()`` is the first, without TensorRT's own places.

    Where ``notes`` is a list, everything else that TensorRT says comes into it, its own list of an engine's layers too.
    """

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.notes: list[str] | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif self.notes is not None:
                self.notes.append(message)

        def reason(self) -> str:
            return next((text for error in self.errors if (text := _reason(error))), "")

    return Listener()


def _for_rtx(trt: Any, config: Any) -> None:
    """Rule 7, as far as the version knows it."""
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(trt, "ComputeCapability") and nvidia.compute_capability() is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


def _network_flags(trt: Any) -> int:
    if is_rtx(trt) or int(str(trt.__version__).split(".")[0]) > OLDEST:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parser_error(parser: Any, graph: onnx.GraphProto) -> str:
    """The parser's words about the first node that it refuses."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    for error in errors:
        if error.node_operator():
            name = error.node_name() or node_name(graph.node[error.node()])
            reason = _reason(str(error.desc())) or "it does not support this operator, or not with these attributes"
            return f"node {name!r} ({error.node_operator()}): {reason}"
    return next((_reason(str(error.desc())) for error in errors), "") or "it gives no reason"


def _reason(message: str) -> str:
    """The first line of TensorRT's that says something of the network."""
    for line in message.splitlines():
        text = line.strip()
        if not text or text == "false" or text.startswith("Invalid Node - ") or "catchCudaError" in text:
            continue
        for pattern in (ERROR_CODE, QUOTED):
            if (match := pattern.match(text)) is not None:
                text = match[1]
        return SOURCE.sub("", text).rstrip(" .")
    return ""
