"""Change one size of a shape that an ONNX graph computes, and leave the computed sizes computed.

Exporters join the target of an Expand or Reshape from computed sizes, the batch for one, and from numbers. A number is
replaced where it stands. Where the place of the size cannot be told, the shape is cut before and behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["constant", "with_size"]

_END = 2**63 - 1


def constant(name: str, values: np.ndarray) -> Any:
    """A graphsurgeon constant."""
    import onnx_graphsurgeon as gs

    return gs.Constant(name, np.ascontiguousarray(values))


def with_size(shape: Any, index: int, size: int, name: str) -> list[Any]:
    """The graphsurgeon nodes that compute ``shape`` with ``size`` at ``index``, counted from the end (-1 is the last).

    The last of them has the new shape as its output, which is called ``name``.
    """
    import onnx_graphsurgeon as gs

    parts = _joined(shape, index, size, name)
    if parts is not None:
        return [gs.Node("Concat", attrs={"axis": 0}, inputs=parts, outputs=[gs.Variable(name)])]

    def cut(what: str, start: int, stop: int) -> Any:
        bounds = [constant(f"{name}_{what}_{k}", np.array([k], dtype=np.int64)) for k in (start, stop)]
        return gs.Node("Slice", inputs=[shape, *bounds], outputs=[gs.Variable(f"{name}_{what}")])

    ends = {"before": cut("before", 0, index)}
    if index != -1:
        ends["behind"] = cut("behind", index + 1, _END)
    sizes = constant(f"{name}_size", np.array([size], dtype=np.int64))
    parts = [ends["before"].outputs[0], sizes, *(node.outputs[0] for node in list(ends.values())[1:])]
    return [*ends.values(), gs.Node("Concat", attrs={"axis": 0}, inputs=parts, outputs=[gs.Variable(name)])]


def _joined(shape: Any, index: int, size: int, name: str) -> list[Any] | None:
    """The parts that ``shape`` is joined from, with another number at ``index``; None where no part holds it alone."""
    if not shape.inputs or shape.inputs[0].op != "Concat":
        return None
    parts, stop = list(shape.inputs[0].inputs), 0
    for k in range(len(parts) - 1, -1, -1):
        length = _length(parts[k])
        if length is None:
            return None
        start = stop - length
        if start <= index < stop:
            values = getattr(parts[k], "values", None)
            if values is None and length > 1:
                return None
            numbers = np.zeros(1, dtype=np.int64) if values is None else values.copy()
            numbers[index - start] = size
            parts[k] = constant(f"{name}_{k}", numbers)
            return parts
        stop = start
    return None


def _length(part: Any) -> int | None:
    shape = part.shape
    return int(shape[0]) if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None
