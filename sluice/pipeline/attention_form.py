"""Where a network of ours is exported with its attention marked, to be written as one operator.

1. On ONNX Runtime on this machine's CPU, in fp32 with one thread, if it runs the operator
   (`sluice.passes.precision.flat_attention`). A device elsewhere may have an older one.
2. Every other export for the same profile follows the profile, whose pieces were timed in that form or were not.
3. A file of others keeps its opset; nothing is marked in it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper

from sluice.core.address import LOCAL
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.passes.precision.flat_attention import ATTENTION, has_marked_cores, with_marked_cores
from sluice.profiler.view import Profile
from sluice.runtime.ort.cpu import OrtRunner

__all__ = ["marked_for", "marked_like"]


def marked_for(exported: onnx.ModelProto, deployment: Deployment) -> onnx.ModelProto:
    """The network, which we exported, as it is profiled for a deployment (rule 1)."""
    here = deployment.address in ("", LOCAL)
    asked = (deployment.target, deployment.precision, deployment.threads) == ("ort-cpu", "fp32", 1)
    return with_marked_cores(exported, deployment.batch) if here and asked and runs_attention() else exported


def marked_like(exported: onnx.ModelProto, measured: Profile) -> onnx.ModelProto:
    """The network, which we exported, in the form of the profile (rule 2)."""
    if not has_marked_cores(measured.partition.model):
        return exported
    return with_marked_cores(exported, measured.fingerprint.batch)


@cache
def runs_attention() -> bool:
    """Whether the ONNX Runtime that is installed runs the operator."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 6])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 6])
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], q_num_heads=3, kv_num_heads=3, scale=1.0)
    graph = helper.make_graph([node], "attention", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ATTENTION)], ir_version=10)
    x = np.zeros((1, 2, 6), np.float32)
    try:
        return bool(np.array_equal(OrtRunner().build(model).run({"x": x})["y"], x))
    except SluiceError:
        return False
