"""Small networks as fp32 ONNX, exported once per run, and running one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.passes.cut.export import finalize, to_onnx
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import any_network
from tests.sequences import sequence
from tests.shared import shared

__all__ = ["arrays", "deployed", "named", "named_sequence", "ops", "optimised", "random_feeds", "run"]


@shared
def _named(name: str) -> bytes:
    return to_onnx(*any_network(name)).SerializeToString()


@shared
def _named_sequence(name: str) -> bytes:
    return to_onnx(*sequence(name)).SerializeToString()


@shared
def _deployed(name: str) -> bytes:
    return finalize(named(name)).SerializeToString()


def named(name: str) -> onnx.ModelProto:
    """With parameter names, as pieces are cut from it."""
    return onnx.load_model_from_string(_named(name))


def named_sequence(name: str) -> onnx.ModelProto:
    """One of `tests.sequences`, with parameter names."""
    return onnx.load_model_from_string(_named_sequence(name))


def deployed(name: str) -> onnx.ModelProto:
    """Folded."""
    return onnx.load_model_from_string(_deployed(name))


def random_feeds(model: onnx.ModelProto, batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        info.name: rng.standard_normal(
            [dim.dim_value or batch for dim in info.type.tensor_type.shape.dim], dtype=np.float32
        )
        for info in model.graph.input
    }


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *, as_written: bool = False) -> dict[str, np.ndarray]:
    return OrtRunner(as_written=as_written).build(model).run(feeds)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}


def optimised(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime really runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return ops(onnx.load(folder / "optimised.onnx"))
