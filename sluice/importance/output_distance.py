"""How far the outputs of a changed ONNX file are from those of the file itself, without labels.

For an output with reference values ``r`` and values ``y`` of the changed file, both over all examples:

    relative    sum (y - r)^2 / sum (r - mean of r)^2
    logits      mean over examples of KL(softmax r || softmax y)
    cosine      1 - mean over examples of the cosine between y and r

1. ``auto`` takes the divergence ``KL(r || y)`` for outputs that are probabilities over the last axis, and the relative
   distance for all others. The mean over the outputs counts.
2. Outputs of integers or booleans are not looked at: they are choices, made from numbers that are outputs or are not.
3. Only what a change touches is computed again (`sluice.importance.resumed`).
4. A changed file whose output has another shape, or is not finite, is at `BROKEN`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from sluice.core.errors import SluiceError
from sluice.importance.resumed import Resumed, joined
from sluice.passes.files.rows import Rows
from sluice.runtime.targets import untimed_runner

__all__ = ["BROKEN", "LOSSES", "OutputDistance", "cosine", "outputs_of"]

BROKEN = 100.0
LEAST = 1e-9  # of a probability
LOSSES = ("auto", "mse", "logits", "cosine")


class OutputDistance:
    """The outputs of a file on examples, and the distance of other files from them.

    Args:
        loss: one of `LOSSES`; ``mse`` is the relative distance for all outputs.
    Raises:
        SluiceError: no output holds floating-point numbers that are finite.
    """

    def __init__(self, model: onnx.ModelProto, rows: Rows, loss: str = "auto"):
        if loss not in LOSSES:
            raise SluiceError(f"loss={loss!r} is unknown for an ONNX file; give one of {list(LOSSES)}")
        self._loss, self._resumed = loss, Resumed(model, rows)
        self.reference = {
            name: value
            for name, value in self._resumed.reference.items()
            if np.issubdtype(value.dtype, np.floating) and value.size and np.isfinite(value).all()
        }
        if not self.reference:
            raise SluiceError("no output of the file holds finite floats; give data that it was made for")

    def of(self, model: onnx.ModelProto) -> float:
        """The distance of a changed file; 0 for the file itself."""
        return self._mean(self._resumed.outputs(model))

    def of_weight(self, param: str, value: np.ndarray) -> float:
        """The distance of the file with another weight, of the shape of the initializer ``param``."""
        return self._mean(self._resumed.outputs_with(param, value))

    def position(self, params: Iterable[str]) -> int:
        """The place in the graph of a change of these tensors; distances come faster in this order."""
        return self._resumed.position(params)

    def _mean(self, found: Mapping[str, np.ndarray]) -> float:
        return float(np.mean([self._between(found[name], want) for name, want in self.reference.items()]))

    def _between(self, have: np.ndarray, want: np.ndarray) -> float:
        if have.shape != want.shape or not np.isfinite(have).all():
            return BROKEN
        have, want = have.astype(np.float64), want.astype(np.float64)
        if self._loss == "cosine":
            return 1.0 - cosine(have, want)
        if self._loss == "logits":
            return _divergence(_softmax(want), _softmax(have))
        if self._loss == "auto" and _are_probabilities(want):
            return _divergence(want, have)
        return min(BROKEN, float(((have - want) ** 2).sum() / max(((want - want.mean()) ** 2).sum(), LEAST)))


def outputs_of(model: onnx.ModelProto, rows: Rows) -> dict[str, np.ndarray]:
    """Outputs by name for all examples, along axis 0; of every batch where they have no such axis."""
    session, parts = untimed_runner().build(model), list[Mapping[str, np.ndarray]]()
    for feeds in rows.batches():
        parts.append(session.run(feeds))
    return joined(parts)


def cosine(have: np.ndarray, want: np.ndarray) -> float:
    """The mean over axis 0 of the cosine between two arrays of one shape."""
    have, want = (a.reshape(len(a), -1) if a.ndim > 1 else a.reshape(1, -1) for a in (have, want))
    scale = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
    return float(np.mean((have * want).sum(1) / np.maximum(scale, LEAST)))


def _are_probabilities(values: np.ndarray) -> bool:
    return bool(
        values.ndim > 1 and values.shape[-1] > 1 and values.min() >= 0 and np.allclose(values.sum(-1), 1.0, atol=1e-3)
    )


def _divergence(want: np.ndarray, have: np.ndarray) -> float:
    ratio = np.log(np.maximum(want, LEAST)) - np.log(np.maximum(have, LEAST))
    return max(0.0, float((want * ratio).sum(-1).mean()))


def _softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True))
