"""What the runtime says of a file: whether it runs, and the shapes of values that inference does not know.

The file is run as it is, without optimisation, so that every value keeps its name. Inner values are asked for as
outputs, a few at a time. A size at two batches tells how it grows with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from sluice.core.errors import SluiceError, first_line
from sluice.core.weight_bytes import weights_apart
from sluice.passes.graph.onnx_graph import Observed, OnnxGraph

__all__ = ["drawn", "observed", "session_of"]

AT_ONCE = 64  # inner values in one run; they lie in memory together


def session_of(model: onnx.ModelProto, outputs: Sequence[str] = ()) -> Any:
    """A plain session of ONNX Runtime on the CPU.

    Args:
        outputs: inner values that are outputs as well.
    Raises:
        SluiceError: the runtime refuses the file.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise SluiceError("files of others are read by running them; install onnxruntime") from None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    own = len(model.graph.output)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    try:
        return weights_apart(model).loaded(
            options, lambda source: ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        )
    except Exception as error:  # of the runtime's own kinds
        raise SluiceError(f"ONNX Runtime does not load it ({first_line(error)}); give a file that it runs") from None
    finally:
        del model.graph.output[own:]


def drawn(model: onnx.ModelProto, sizes: Mapping[str, int], batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs at these sizes: normal numbers, and ones of every other type."""
    rng, feeds = np.random.default_rng(seed), {}
    for name, info in OnnxGraph(model).inputs.items():
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, batch) for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        floats = np.issubdtype(dtype, np.floating)
        feeds[name] = rng.standard_normal(shape).astype(dtype) if floats else np.ones(shape, dtype)
    return feeds


def observed(
    model: onnx.ModelProto, names: Sequence[str], feeds: Mapping[int, Mapping[str, np.ndarray]]
) -> dict[str, Observed]:
    """Element type and shape of inner values, from a run at each batch of ``feeds``."""
    found: dict[str, Observed] = {}
    for start in range(0, len(names), AT_ONCE):
        part = list(names[start : start + AT_ONCE])
        session = session_of(model, part)
        runs = [session.run(part, dict(one)) for one in feeds.values()]
        for index, name in enumerate(part):
            arrays = [run[index] for run in runs]
            if (
                all(isinstance(a, np.ndarray) and a.dtype != object for a in arrays)
                and len({a.ndim for a in arrays}) == 1
            ):
                kind = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
                found[name] = (
                    kind,
                    [_law(sizes, list(feeds)) for sizes in zip(*(a.shape for a in arrays), strict=True)],
                )
    return found


def _law(sizes: Sequence[int], batches: Sequence[int]) -> tuple[int, int]:
    """``(a, b)``: a + b * batch entries."""
    if len(batches) < 2:
        return sizes[0], 0
    slope = (sizes[1] - sizes[0]) // (batches[1] - batches[0])
    return sizes[0] - slope * batches[0], slope
