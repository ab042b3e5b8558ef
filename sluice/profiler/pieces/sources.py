"""Sources give a piece an input in the layout that the input has inside the whole graph.

1. Runtimes lay activations out in blocks, and fuse a residual addition only if both operands are laid out so. An input
   that meets such an operator directly would arrive plain, as it never does in the whole graph. So a *source*, a
   convolution of one channel, makes it inside the piece, and the source's own time is subtracted:
   ``T(piece) = T(piece with sources) - sum T(source)``.
2. The kernel of a source is 1x1 where one thread computes. Several threads leave the output of a layer in the caches of
   several cores, and the next layer fetches from another core. A source as light as 1x1 seems to finish, now and then,
   before the second thread has noticed. Then its output lies in one core's cache, and as the lowest times count, the
   piece seems to take as little as that. So where there are several threads a source has `TAPS` taps, enough to be
   shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["add_sources", "has_source", "source_model"]


TAPS = 25


def add_sources(
    model: onnx.ModelProto, names: Sequence[str], threads: int = 1
) -> tuple[onnx.ModelProto, list[tuple[int, ...]]]:
    """The model with the named inputs made by sources, and the shapes of these sources."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    shapes: list[tuple[int, ...]] = []
    for info in result.graph.input:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        if info.name in names and has_source(shape):
            node, seed, weight = _source(info.name, shape, threads)
            info.CopyFrom(seed)
            result.graph.node.insert(0, node)
            result.graph.initializer.append(weight)
            shapes.append(shape)
    return result, shapes


def has_source(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be made by a convolution."""
    return len(shape) >= 3


def source_model(shape: tuple[int, ...], threads: int = 1) -> onnx.ModelProto:
    """A source on its own, for its time."""
    node, seed, weight = _source("x", shape, threads)
    output = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "source", [seed], [output], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _source(
    name: str, shape: tuple[int, ...], threads: int
) -> tuple[onnx.NodeProto, onnx.ValueInfoProto, onnx.TensorProto]:
    seed = helper.make_tensor_value_info(f"{name}:seed", onnx.TensorProto.FLOAT, (shape[0], 1, *shape[2:]))
    axes = len(shape) - 2
    reach = round(TAPS ** (1 / axes)) // 2 if threads > 1 else 0
    values = np.random.default_rng(0).standard_normal((shape[1], 1, *[2 * reach + 1] * axes))
    weight = numpy_helper.from_array(values.astype(np.float32), f"{name}:source")
    return helper.make_node("Conv", [seed.name, weight.name], [name], pads=[reach] * 2 * axes), seed, weight
