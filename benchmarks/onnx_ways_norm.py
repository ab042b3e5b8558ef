"""Channels removed by norm, beside our cuts: onnxsim 0.8.1, at the latency that is asked for.

1. ``apply_structured_pruning`` removes one share of the channels of every layer that it can cut, those of the least
   norm. It knows no latency: the share is bisected until the file is as fast as ours, measured beside it.
2. Files are measured in turns, `TURNS` bursts each; the ratio of the medians counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.targets import make_runner

__all__ = ["NormCut", "cut_by_norm"]

HALVINGS, TURNS, BURST_MS = 6, 15, 20.0
MOST = 0.95  # of the channels
NEAR = 1.02  # times the share that is asked for


@dataclass(frozen=True, slots=True, eq=False)
class NormCut:
    """The file, its measured share of the dense latency; none and a reason where it does not get there.

    ``given`` is the simplified file that was cut.
    """

    model: onnx.ModelProto | None
    share: float | None
    reason: str = ""
    given: onnx.ModelProto | None = None


def cut_by_norm(dense: onnx.ModelProto, example: Mapping[str, np.ndarray], share: float) -> NormCut:
    """The file, simplified at these sizes, with as few channels removed as bring it to ``share`` of the dense latency.

    Args:
        example: inputs at the sizes that are timed.
    """
    try:
        from onnxsim import apply_structured_pruning, simplify
    except ImportError:
        return NormCut(None, None, "onnxsim is not installed")
    given, _ = simplify(dense, overwrite_input_shapes={name: list(value.shape) for name, value in example.items()})
    low, high, best = 0.0, MOST, NormCut(None, None, f"slower than ours with {MOST:.0%} of the channels removed")
    tried = [MOST]
    for _ in range(HALVINGS + 1):
        try:
            made = apply_structured_pruning(given, sparsity=tried[-1])
            ratio = _ratio(made, dense, example)
        except (SluiceError, ValueError, RuntimeError, KeyError) as error:
            return NormCut(None, None, f"fails with {type(error).__name__}: {first_line(error)}")
        if ratio <= NEAR * share:
            high, best = tried[-1], NormCut(made, ratio, given=given)
        else:
            low = tried[-1]
            if low == MOST:
                return NormCut(None, ratio, best.reason)
        tried.append((low + high) / 2)
    return best


def _ratio(made: onnx.ModelProto, dense: onnx.ModelProto, example: Mapping[str, np.ndarray]) -> float:
    sessions = [make_runner("ort-cpu").build(_sized(model, example)) for model in (made, dense)]
    repeats = [max(1, round(BURST_MS / session.sample(1))) for session in sessions]
    times = [[s.sample(n) for s, n in zip(sessions, repeats, strict=True)] for _ in range(TURNS)]
    return float(np.divide(*np.median(times, axis=0)))


def _sized(model: onnx.ModelProto, example: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy with the inputs at these sizes; files in the wild write -1 for open ones."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    del done.graph.value_info[:]
    for info in done.graph.input:
        if info.name in example:
            dims = info.type.tensor_type.shape.dim
            del dims[:]
            for size in example[info.name].shape:
                dims.add(dim_value=size)
    for info in done.graph.output:
        info.type.tensor_type.ClearField("shape")
    return done
