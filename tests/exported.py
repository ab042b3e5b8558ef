"""Small networks as fp32 ONNX, each exported by one process of a run for all of them, and running one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.passes.cut.export import finalize, to_onnx
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import any_network
from tests.sequences import sequence

__all__ = ["SHARED", "arrays", "deployed", "named", "named_sequence", "ops", "optimised", "random_feeds", "run"]

SHARED = "SLUICE_TEST_EXPORTS"  # names the folder that the processes of a run have in common


@cache
def _shared(kind: str, name: str, make: Callable[[str], onnx.ModelProto]) -> bytes:
    """The file, from the process that was first to need it. Two that need it at once both make it."""
    folder = os.environ.get(SHARED)
    if folder is None:
        return make(name).SerializeToString()
    path = Path(folder, hashlib.sha256(f"{kind} {name}".encode()).hexdigest())
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(make(name).SerializeToString())
        draft.replace(path)
    return path.read_bytes()


def _network(name: str) -> onnx.ModelProto:
    return to_onnx(*any_network(name))


def _sequence(name: str) -> onnx.ModelProto:
    return to_onnx(*sequence(name))


def _deployed(name: str) -> onnx.ModelProto:
    return finalize(named(name))


def named(name: str) -> onnx.ModelProto:
    """With parameter names, as pieces are cut from it."""
    return onnx.load_model_from_string(_shared("named", name, _network))


def named_sequence(name: str) -> onnx.ModelProto:
    """One of `tests.sequences`, with parameter names."""
    return onnx.load_model_from_string(_shared("sequence", name, _sequence))


def deployed(name: str) -> onnx.ModelProto:
    """Folded."""
    return onnx.load_model_from_string(_shared("deployed", name, _deployed))


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
