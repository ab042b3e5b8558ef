"""Examples of a file's inputs, and how they come in batches.

1. Every input of the file has values for all examples. They lie along its batch axis: the open axis that has no number
   (`sluice.passes.files.read`, rule 3), or axis 0 where the batch is fixed.
2. A file with a fixed batch is fed as many examples at once as it takes. Examples that do not fill a batch are left.
3. An input without a batch axis has the same values for every batch.
4. As many examples run at once as `sluice.passes.files.room` leaves room for, `BATCH` at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.passes.files.read import OnnxFile
from sluice.passes.files.room import examples_at_once
from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["Rows", "rows_of"]

Feeds = dict[str, np.ndarray]
BATCH = 32  # examples that are run at once


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """``count`` examples: values by input, the batch axis by input; the batch where it is fixed, else ``at_once``."""

    values: Mapping[str, np.ndarray]
    axes: Mapping[str, int]
    count: int
    batch: int | None = None
    at_once: int = BATCH

    def part(self, start: int, stop: int) -> Rows:
        """The examples from ``start`` to before ``stop``, where they lie: nothing is copied."""
        cut = slice(start, stop)
        kept = {n: x[(slice(None),) * self.axes[n] + (cut,)] if n in self.axes else x for n, x in self.values.items()}
        return Rows(kept, self.axes, len(range(self.count)[cut]), self.batch, self.at_once)

    def spread(self, count: int) -> Rows:
        """At most ``count`` examples, evenly spread; whole batches where the batch is fixed."""
        step = self.batch or 1
        wanted = max(step, min(self.count, count) // step * step)
        return self.at(np.linspace(0, self.count - 1, wanted).round().astype(int))

    def at(self, picked: np.ndarray) -> Rows:
        """The examples at these places."""
        kept = {n: np.take(x, picked, self.axes[n]) if n in self.axes else x for n, x in self.values.items()}
        return Rows(kept, self.axes, len(picked), self.batch, self.at_once)

    def batches(self, size: int | None = None) -> Iterator[Feeds]:
        """Batches of ``size`` or ``at_once`` examples, the last one smaller; of a fixed batch whole ones (rule 2)."""
        step = self.batch or size or self.at_once
        stop = self.count if self.batch is None else self.count // step * step
        for start in range(0, stop, step):
            yield dict(self.part(start, min(start + step, stop)).values)


def rows_of(file: OnnxFile, inputs: Mapping[str, np.ndarray]) -> Rows:
    """The examples in the types that the file takes.

    Raises:
        SluiceError: an input is missing, has another shape, or another number of examples than the first one.
    """
    infos = OnnxGraph(file.model).inputs
    axes: dict[str, int] = {}
    values: dict[str, np.ndarray] = {}
    fixed: int | None = None
    for name, info in infos.items():
        if name not in inputs:
            raise SluiceError(f"the data has no values for input {name!r}; give all of {list(infos)}")
        value = _typed(name, np.asarray(inputs[name]), info)
        dims = info.type.tensor_type.shape.dim
        if len(dims) != value.ndim:
            raise SluiceError(
                f"the data of input {name!r} has shape {value.shape}, the file takes {len(dims)} axes; "
                f"give one example after the other along the batch axis"
            )
        values[name] = value
        if not dims:
            continue
        axis = next((d for d, dim in enumerate(dims) if _is_batch(dim, file.sizes)), None)
        if axis is None and not file.batch_is_open:
            axis, fixed = 0, fixed or dims[0].dim_value or 1
        if axis is not None:
            axes[name] = axis
    counts = {name: values[name].shape[axis] for name, axis in axes.items()}
    if not counts:
        raise SluiceError("no input of the file has a batch axis; give a file whose first input has one")
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise SluiceError(
                f"the data has {count} examples of {name!r} and {counts[first]} of {first!r}; give as many"
            )
    if counts[first] < (fixed or 1):
        raise SluiceError(f"the data has {counts[first]} examples, the file takes {fixed} at once; give more")
    at_once = examples_at_once(file.model, BATCH) if file.batch_is_open else BATCH
    return Rows(values, axes, counts[first], None if file.batch_is_open else fixed, at_once)


def _is_batch(dim: onnx.TensorShapeProto.Dimension, sizes: Mapping[str, int]) -> bool:
    return not dim.HasField("dim_value") and dim.dim_param not in sizes


def _typed(name: str, value: np.ndarray, info: onnx.ValueInfoProto) -> np.ndarray:
    wanted = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    if value.dtype != wanted and (np.issubdtype(wanted, np.floating) != np.issubdtype(value.dtype, np.floating)):
        raise SluiceError(f"the data of input {name!r} is {value.dtype}, the file takes {wanted}; convert it")
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
        raise SluiceError(f"the data of input {name!r} holds values that are no finite numbers; give others")
    return np.ascontiguousarray(value, dtype=wanted)
