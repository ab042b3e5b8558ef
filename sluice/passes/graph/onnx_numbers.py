"""The numbers of a model's initialisers by name, decoded when they are asked for.

onnx copies what it decodes. So whoever asks for one tensor at a time holds one, and not the whole file once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.passes.graph.onnx_graph import OnnxGraph, is_hollow

__all__ = ["Numbers"]


class Numbers(Mapping[str, np.ndarray]):
    """Those of ``model``; hollow tensors have the numbers that they have in ``full``."""

    def __init__(self, model: onnx.ModelProto, full: onnx.ModelProto | None = None) -> None:
        self._own = OnnxGraph(model).initializers
        self._full = OnnxGraph(full).initializers if full is not None else {}

    def __getitem__(self, name: str) -> np.ndarray:
        init = self._own[name]
        return numpy_helper.to_array(self._full[name] if is_hollow(init) else init)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
