"""Whether this CPU adds products of uint8 and int8 in 16 bits, so that int8 networks overflow.

x86 without VNNI adds two products in one int16: 2 x 255 x 127 > 32,767, so a sum is cut off. With weights of 7 bits no
sum can be: 2 x 255 x 64 < 32,767. The instruction is the processor's, so a product in ONNX Runtime tells it of every
runtime on this machine.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import TensorProto, helper

from sluice.runtime.ort.cpu import OrtRunner

__all__ = ["sums_saturate"]

LENGTH, ROWS = 64, 16


@cache
def sums_saturate() -> bool:
    """Largest numbers by largest weights; True where the product of two matrices is not the sum."""
    a, b, y = (
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("a", TensorProto.UINT8, [ROWS, LENGTH]),
            ("b", TensorProto.INT8, [LENGTH, ROWS]),
            ("y", TensorProto.INT32, [ROWS, ROWS]),
        )
    )
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "sums", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"a": np.full((ROWS, LENGTH), 255, np.uint8), "b": np.full((LENGTH, ROWS), 127, np.int8)}
    return bool((OrtRunner().build(model).run(feeds)["y"] != LENGTH * 255 * 127).any())
