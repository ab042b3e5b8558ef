"""Inputs on which the runtime runs a file: given ones, else the first sizes of a few that it takes.

1. First axes are the batch. Two batches are tried before one row alone is.
2. A given input decides on the open sizes that it has. It is repeated to the batch; where the runtime refuses that, its
   own rows are kept, and the batch is fixed.
3. Sizes that are left open are tried in pairs for images, and all alike for anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from sluice.core.errors import SluiceError, first_line
from sluice.passes.files.observe import drawn, session_of
from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["fed", "open_axes", "run_once"]

BATCHES = (2, 3)
# Sizes that are tried for open axes: of images in pairs of height and width, of all other inputs.
IMAGES = ((64, 96), (96, 64), (64, 64), (48, 320), (32, 128), (128, 128), (224, 224), (320, 320), (640, 640))
LENGTHS = (16, 24, 32, 64, 100, 128, 256, 512, 576, 1024, 2048, 4096, 16000)


def run_once(
    model: onnx.ModelProto, name: str, inputs: Mapping[str, np.ndarray]
) -> tuple[dict[int, dict[str, np.ndarray]], dict[str, int]]:
    """Inputs by batch on which the runtime runs the model, and the open sizes beside the batch.

    Where the runtime takes one row alone, the batch is fixed in the model, in place, and its number is 1.
    """
    infos = OnnxGraph(model).inputs
    unknown = [given for given in inputs if given not in infos]
    if unknown:
        raise SluiceError(f"{name!r} has no input {unknown[0]!r}; its inputs are {list(infos)}")
    session, why = session_of(model), ""
    trials = list(_trials(model, inputs))
    as_given = {
        n: inputs[k].shape[axis] for n, places in open_axes(model).items() for k, axis, _ in places if k in inputs
    }
    for batches, chosen in ((BATCHES, trials), ((1,), trials), ((1,), [as_given])):
        for sizes in chosen:
            feeds = {batch: fed(model, sizes, batch, inputs) for batch in batches}
            try:
                for feed in feeds.values():
                    session.run(None, feed)
            except Exception as error:  # of the runtime's own kinds
                why = why or first_line(error)
                continue
            if len(batches) == 1:
                _fix_batch(model, sizes)
            return feeds, sizes
    raise SluiceError(
        f"ONNX Runtime runs {name!r} on none of the inputs tried ({why}); give example inputs for {list(infos)}"
    )


def open_axes(model: onnx.ModelProto) -> dict[str, list[tuple[str, int, int]]]:
    """By name of an open size where it lies: input, axis, rank."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, info in OnnxGraph(model).inputs.items():
        dims = info.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value"):
                found.setdefault(dim.dim_param, []).append((name, axis, len(dims)))
    return found


def _trials(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, int]]:
    """Sizes of the open axes beside the batch, the likely ones first.

    First axes are the batch. A size without a name in a later input may be the batch as well: states are such.
    """
    free, known = open_axes(model), dict[str, int]()
    first = next(iter(OnnxGraph(model).inputs), "")
    others = {name: places for name, places in free.items() if all(axis for _, axis, _ in places)}
    for name, places in others.items():
        known.update((name, inputs[key].shape[axis]) for key, axis, _ in places if key in inputs)
    asked = [name for name in others if name not in known]
    tied = [name for name in asked if all(key != first and name == f"{key}.{axis}" for key, axis, _ in others[name])]
    images = [name for name in asked if others[name][0][2] > 3]
    lengths = [name for name in asked if name not in images]
    for batches in [tied, []] if tied else [[]]:
        flat = [name for name in lengths if name not in batches]
        for pair, length in itertools.product(IMAGES if images else [()], LENGTHS if flat else [0]):
            yield {
                **known,
                **{name: pair[k % 2] for k, name in enumerate(images)},
                **dict.fromkeys(flat, length),
            }


def fed(
    model: onnx.ModelProto, sizes: Mapping[str, int], batch: int, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Inputs at these sizes; those that were given are repeated, or lose rows, until they have the batch."""
    feeds = {**drawn(model, sizes, batch), **inputs}
    for name, places in open_axes(model).items():
        for key, axis, _ in places:
            if key in inputs and name not in sizes:
                feeds[key] = np.take(feeds[key], np.arange(batch) % feeds[key].shape[axis], axis)
    return feeds


def _fix_batch(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    for info in OnnxGraph(model).inputs.values():
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value") and dim.dim_param not in sizes:
                dim.dim_value = 1
