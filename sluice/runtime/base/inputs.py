"""The inputs of an ONNX model for an engine: where the model is, its static shapes, and made-up data.

1. Shapes are made static: the batch takes the place of every dynamic first dimension, and whole shapes that are given
   win over it. A named dimension has one size wherever it occurs.
2. Engines are timed on random normal numbers (integers and booleans are ones), never on zeros: zeros are faster than
   data.
3. Inputs begin with a line of the cache, as the activations inside a network do. numpy's own begin 16 bytes later,
   which made a depthwise convolution with a stride take up to a quarter longer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError, first_line

if TYPE_CHECKING:
    import onnx

    Model = onnx.ModelProto | bytes | str | os.PathLike[str]

__all__ = [
    "Shapes", "made_up", "messages", "parsed", "place", "serialized", "sized", "static_shapes",
]  # fmt: skip

Dims = tuple[int | str | None, ...]
ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of named dimensions, the shape of every input as far as it is known, inputs that had nameless ones."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Dims] = field(default_factory=dict)
    nameless: frozenset[str] = frozenset()


def place(model: Model) -> str:
    """The name of the model in messages."""
    return str(Path(model)) if isinstance(model, (str, os.PathLike)) else "the model in memory"


def parsed(model: Model, *, weights: bool = False) -> onnx.ModelProto:
    """The model; ``weights``: with those that are stored beside the file."""
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load_model(model, load_external_data=weights)
    except Exception as error:  # protobuf's errors share no public base class
        raise SluiceError(f"cannot load {place(model)}: {first_line(error)}; check that it is an ONNX file") from error


def messages(model: Any) -> Iterator[Any]:
    """The model and all messages in it, at any depth."""
    stack = [model]
    while stack:
        message = stack.pop()
        yield message
        for told, value in message.ListFields():
            if told.message_type is not None:
                stack += [value] if hasattr(value, "ListFields") else list(value)


def serialized(model: onnx.ModelProto | bytes) -> bytes:
    if isinstance(model, bytes):
        return model
    try:
        return bytes(model.SerializeToString())
    except ValueError as error:
        raise SluiceError(
            f"the model in memory is too large for one protobuf ({first_line(error)}); "
            f"save it with external data and give the path"
        ) from error


def static_shapes(model: Model, batch: int | None, feeds_shapes: Mapping[str, Sequence[int]]) -> Shapes:
    """The sizes of the inputs, from the model, ``batch`` and ``feeds_shapes`` (rule 1).

    Raises:
        SluiceError: a size is no size, an input does not exist, or the model has another shape.
    """
    where = place(model)
    if batch is not None and batch < 1:
        raise SluiceError(f"cannot build {where} with batch={batch}; give 1 or more")
    graph = parsed(model).graph
    initializers = {tensor.name for tensor in graph.initializer}
    declared = {value.name: _dims(value) for value in graph.input if value.name not in initializers}
    unknown = sorted(set(feeds_shapes) - set(declared))
    if unknown:
        raise SluiceError(f"{where} has no input {unknown[0]!r}; its inputs are {sorted(declared)}")
    sizes: dict[str, int] = {}
    inputs: dict[str, Dims] = {}
    nameless = set()
    for name, dims in declared.items():
        wanted: list[int | None] = [None] * len(dims)
        if name in feeds_shapes:
            wanted = list(feeds_shapes[name])
        elif batch is not None and dims and not isinstance(dims[0], int):
            wanted[0] = batch
        fits = len(wanted) == len(dims) and all(
            not isinstance(dim, int) or size in (None, dim) for dim, size in zip(dims, wanted, strict=True)
        )
        if not fits:
            raise SluiceError(f"input {name!r} of {where} has shape {list(dims)}, which {wanted} does not fit; mend it")
        for dim, size in zip(dims, wanted, strict=True):
            if dim is None and size is not None:
                nameless.add(name)
            if isinstance(dim, str) and size is not None and sizes.setdefault(dim, size) != size:
                raise SluiceError(
                    f"dimension {dim!r} of {where} is given two sizes, {sizes[dim]} and {size} (input {name!r}); "
                    f"give it one"
                )
        inputs[name] = tuple(dim if size is None else size for dim, size in zip(dims, wanted, strict=True))
    resolved = {
        name: tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
        for name, dims in inputs.items()
    }
    return Shapes(sizes, resolved, frozenset(nameless))


def sized(model: Model, shapes: Shapes) -> Model:
    """The model with the sizes of dimensions that have no name written into its inputs; itself where it has none."""
    if not shapes.nameless:
        return model
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(parsed(model, weights=True))
    for info in found.graph.input:
        if info.name in shapes.nameless:
            for dim, size in zip(info.type.tensor_type.shape.dim, shapes.inputs[info.name], strict=True):
                if isinstance(size, int) and not dim.dim_param:
                    dim.dim_value = size
    return found


def made_up(name: str, shape: Dims, dtype: type[np.generic] | np.dtype, where: str, seed: int = 0) -> np.ndarray:
    """Random data for an input (rule 2); `SluiceError` where its shape is not static."""
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape):
        raise SluiceError(
            f"cannot time {where}: input {name!r} has dynamic shape {list(shape)}; "
            f"give its size with batch= or feeds_shapes="
        )
    data = _aligned(sizes, np.dtype(dtype))
    data[...] = np.random.default_rng(seed).standard_normal(sizes) if np.issubdtype(dtype, np.floating) else 1
    return data


def _aligned(sizes: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins with a line of the cache, as arrays of a runtime do (rule 3)."""
    size = math.prod(sizes) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(sizes)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
