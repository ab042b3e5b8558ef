"""The file that is deployed, made of a graph in fp32; no torch.

1. `deploy_onnx`: the graph in its precision.
2. `rounding_error`: the relative error of a precision on a few inputs.
3. `reference_session`: what the file says, whatever a processor makes of it: 16 bits are emulated, int8 is computed
   operator by operator.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import onnx

from sluice.artifacts.calibration_ranges import PERCENTILE, activation_ranges, slices
from sluice.core.deployment import ON_CPU, check_precision, check_target
from sluice.core.errors import SluiceError
from sluice.core.weight_bytes import Parked
from sluice.passes.precision.emulation import emulated
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base.compare import relative_error
from sluice.runtime.ort.cpu import OrtRunner, OrtSession
from sluice.runtime.ort.saturation import sums_saturate

__all__ = ["deploy_onnx", "reference_session", "rounding_error"]

log = logging.getLogger(__name__)


def deploy_onnx(
    model: onnx.ModelProto,
    precision: str,
    calibration: Iterable[Any] | None = None,
    *,
    target: str = "ort-cpu",
    exclude: Collection[str] = (),
    percentile: float = PERCENTILE,
    threads: int = 1,
    reduce_range: bool | None = None,
) -> onnx.ModelProto:
    """An fp32 network, finalized, as it is deployed in ``precision``.

    Args:
        calibration: for int8, some hundred inputs as they occur in deployment, in batches of ``(inputs, labels)`` or of
            inputs alone; a mapping names the file's inputs, anything else gives them in order.
        target, threads: the runtime that the file is for; int8 and paddings have other forms for others.
        exclude: for int8, names or shell patterns of layers that stay float, often the first and the last.
        percentile: for int8, see `sluice.artifacts.calibration_ranges`.
        reduce_range: for int8, weights of 7 bits, so that no sum overflows on x86 without VNNI; by default where the
            target runs on a CPU and this one overflows (`sluice.runtime.ort.saturation`).
    Raises:
        SluiceError: there is no such precision or target, int8 has no calibration, or the network cannot be written in
            the precision.
    """
    check_target(target)
    if check_precision(precision) != "int8":
        return to_precision(model, precision, target=target, threads=threads)
    if calibration is None:
        raise SluiceError(
            "int8 needs to know the ranges of activations; give calibration= some hundred inputs, in batches"
        )
    ranges = activation_ranges(model, calibration, percentile=percentile, target=target, exclude=exclude)
    if reduce_range is None:
        reduce_range = target in ON_CPU and sums_saturate()
        if reduce_range:
            log.info("int8 weights have 7 bits, since this CPU adds products of 8 bits in 16")
    return to_precision(model, precision, ranges=ranges, target=target, exclude=exclude, reduce_range=reduce_range)


def reference_session(model: onnx.ModelProto | Parked) -> OrtSession:
    """Rule 3, on this CPU; any precision, but fp32 of a parked file."""
    if isinstance(model, Parked):
        return OrtRunner(timed=False).build(model)
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return OrtRunner(as_written=quantised, timed=False).build(emulated(model))


def rounding_error(narrow: onnx.ModelProto, wide: onnx.ModelProto, batches: Iterable[Any]) -> float:
    """The relative error of a file to the one in fp32 on the first inputs of ``batches``, 16 where that can be.

    Raises:
        SluiceError: the batch does not fit the network.
    """
    feeds = next(slices(batches, wide))
    return relative_error(reference_session(narrow).run(feeds), reference_session(wide).run(feeds))
