"""Sums in front of layer norms, written so that ONNX Runtime on the CPU does not fuse the two.

1. An ``Add`` whose one reader is a layer norm becomes ``SkipLayerNormalization``. That kernel of ONNX Runtime 1.31.1
   takes five to nine times as long on the CPU as the sum and the norm one after the other. One thread, microseconds per
   sum and norm of so many positions and channels, four in a row, beside other jobs:

       positions x channels    49 x 64    32 x 128    24 x 384    128 x 384    197 x 768
       fused                   14.1       18.4        40.0        211          658
       apart                   3.1        3.1         5.4         24           74

2. So such a sum is written as ``Sum``, which computes the same and is not fused. Nor does the time of a piece then
   depend on how many readers its sum has, which is one where the block behind it is dropped.
"""

from __future__ import annotations

import onnx

__all__ = ["with_plain_sums"]


def with_plain_sums(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ``Sum`` for every ``Add`` that a layer norm reads; itself if there are none."""
    normed = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    chosen = [k for k, node in enumerate(model.graph.node) if node.op_type == "Add" and node.output[0] in normed]
    if not chosen:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for k in chosen:
        result.graph.node[k].op_type = "Sum"
    return result
