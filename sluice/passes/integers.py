"""Arithmetic on integers inside a floating-point network: positions, lengths, sizes. onnx only.

1. It begins where an integer of more than 8 bits is cast to float32. (Those of 8 bits, images above all, are exact in
   every 16-bit type.)
2. An operator of `ARITHMETIC` whose float32 operands are such values and constants alone continues it.
3. It ends at a layer, where it meets any other value, and where it leads back to an integer.

These values are not rounded to 16 bits: integers are not exact there beyond 2048 (fp16) and 256 (bf16), and beyond
65504 fp16 knows none.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto

__all__ = ["ARITHMETIC", "integer_arithmetic"]

WIDE_INTEGERS = frozenset(
    [
        *(TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    ]
)
# What computes element by element, sums, compares or only arranges.
ARITHMETIC = frozenset(
    [
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "CumSum", "Div", "Exp", "Floor", "Log", "Max", "Min", "Mod"),
        *("Mul", "Neg", "Pow", "Range", "Reciprocal", "Round", "Sign", "Sin", "Sqrt", "Sub", "Sum", "Where"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"),
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"),
        *("Transpose", "Unsqueeze"),
    ]
)


def integer_arithmetic(graph: onnx.GraphProto, kinds: Mapping[str, int]) -> frozenset[str]:
    """The values that arithmetic on integers makes.

    Args:
        graph: its nodes in topological order, its constants stored as initialisers.
        kinds: types of values, as ONNX counts them.
    """
    floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    constants = {init.name for init in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        read = floats.intersection(node.input)
        begins = node.op_type == "Cast" and kinds.get(node.input[0]) in WIDE_INTEGERS and node.output[0] in floats
        continues = node.op_type in ARITHMETIC and not found.isdisjoint(read) and read <= found | constants
        if begins or continues:
            found.update(node.output)
    return frozenset(found)
