"""Values of a 16-bit network that stay float32. numpy and onnx only.

They begin at three places:

1. *Integers*: positions, lengths, sizes. An integer of more than 8 bits is cast to float32. (Those of 8 bits, images
   above all, are exact in every 16-bit type.) They are not exact beyond 2048 in fp16 and 256 in bf16.
2. *Constants* that 16 bits cannot hold: finite ones beyond the largest number, or all so small that digits are lost.
   An operator that reads such a constant, or a value computed of constants alone with one among them, computes in
   float32. Layers do not (`sluice.passes.precision.half` refuses their weights), nor do operators that read it as a
   mask, a limit or an epsilon (`ROUNDED`): there its size does not matter.
3. *Sums of squares* in fp16, as in norms: the square of 256 is beyond its largest number. The square stays float32, and
   so does ``ReduceMean`` or ``ReduceSum`` of it, or the operator that does both.

An operator of `ARITHMETIC` whose float32 operands are such values and constants alone computes in float32 as well.
These values end at a layer, where they meet any other value, and where they lead back to an integer. A division by one
of them is float32, too: a norm that is kept from zero by 1e-12 is zero in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.graph.operators import onnx_with
from sluice.passes.precision.qdq_placement import WEIGHTED

__all__ = ["ARITHMETIC", "stays_float32"]

WIDE_INTEGERS = frozenset(
    [
        *(TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    ]
)
# Operators that compute element by element, sum, compare or only arrange.
ARITHMETIC = onnx_with("arithmetic")
ROUNDED = onnx_with("limit")
SUMS = frozenset(["ReduceMean", "ReduceSum"])
SUMS_OF_SQUARES = frozenset(["ReduceL2", "ReduceSumSquare"])


def stays_float32(graph: onnx.GraphProto, kinds: Mapping[str, int], dtype: np.dtype) -> frozenset[str]:
    """The values that stay float32.

    Args:
        graph: its nodes in topological order, its constants stored as initialisers.
        kinds: types of values, as ONNX counts them.
        dtype: the 16-bit type of the others.
    """
    floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    there = OnnxGraph(graph)
    constants = there.initializers
    squares = _summed_squares(there) if dtype == np.float16 else set()
    found: set[str] = set()
    unfit: set[str] = set()  # made of constants
    divided: set[str] = set()  # readers of these are in 16 bits
    for node in graph.node:
        read = floats.intersection(node.input)
        counts = node.op_type == "Cast" and kinds.get(node.input[0]) in WIDE_INTEGERS and node.output[0] in floats
        scales = node.op_type not in WEIGHTED | ROUNDED and (
            not unfit.isdisjoint(read) or not _fits(node, constants, read, dtype)
        )
        if scales and read <= unfit | constants.keys():
            unfit.update(node.output)
        sums = node.output[0] in squares & floats
        continues = node.op_type in ARITHMETIC and not found.isdisjoint(read) and read <= found | constants.keys()
        if counts or scales or sums or continues:
            found.update(node.output)
        elif node.op_type == "Div" and node.input[1] in found:
            divided.update(node.output)
    return frozenset(found | divided)


def _fits(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], read: set[str], dtype: np.dtype) -> bool:
    """Whether 16 bits hold the float32 constants of ``node``, its own value among them (rule 2)."""
    info = ml_dtypes.finfo(dtype)
    own = [a.t for a in node.attribute if a.name == "value" and a.t.data_type == TensorProto.FLOAT]
    for tensor in [*own, *(constants[name] for name in sorted(read & constants.keys()))]:
        array = numpy_helper.to_array(tensor)
        largest = float(np.abs(array[np.isfinite(array)]).max(initial=0))
        if largest and not float(info.smallest_normal) <= largest <= float(info.max):
            return False
    return True


def _summed_squares(graph: OnnxGraph) -> set[str]:
    """Rule 3: sums of squares, and the squares."""
    made, constants = graph.producers, graph.initializers
    found: set[str] = set()
    for node in graph.graph.node:
        if node.op_type in SUMS_OF_SQUARES:
            found.update(node.output)
        elif node.op_type in SUMS and node.input[0] in made and _is_square(made[node.input[0]], constants):
            found.update((node.input[0], *node.output))
    return found


def _is_square(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    if node.op_type == "Pow" and node.input[1] in constants:
        return bool(np.all(numpy_helper.to_array(constants[node.input[1]]) == 2))
    return node.op_type == "Mul" and node.input[0] == node.input[1]
