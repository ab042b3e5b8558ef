"""The file that is deployed, made of a graph in fp32; no torch.

1. `deploy_onnx`: the graph in its precision.
2. `rounding_error`: the relative error of a precision on a few inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import onnx

from sluice.artifacts.calibration_ranges import PERCENTILE, activation_ranges, slices
from sluice.core.deployment import check_precision, check_target
from sluice.core.errors import SluiceError
from sluice.passes.precision.emulation import emulated
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base.compare import relative_error

__all__ = ["deploy_onnx", "rounding_error"]


def deploy_onnx(
    model: onnx.ModelProto,
    precision: str,
    calibration: Iterable[Any] | None = None,
    *,
    target: str = "ort-cpu",
    exclude: Collection[str] = (),
    percentile: float = PERCENTILE,
    threads: int = 1,
) -> onnx.ModelProto:
    """An fp32 network, finalized, as it is deployed in ``precision``.

    Args:
        calibration: for int8, some hundred inputs as they occur in deployment, in batches of ``(inputs, labels)`` or of
            inputs alone; a mapping names the file's inputs, anything else gives them in order.
        target, threads: the runtime that the file is for; int8 and paddings have other forms for others.
        exclude: for int8, names or shell patterns of layers that stay float, often the first and the last.
        percentile: for int8, see `sluice.artifacts.calibration_ranges`.
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
    return to_precision(model, precision, ranges=ranges, target=target, exclude=exclude)


def rounding_error(narrow: onnx.ModelProto, wide: onnx.ModelProto, batches: Iterable[Any]) -> float:
    """The relative error of a file to the one in fp32 on the first inputs of ``batches``, 16 where that can be.

    Raises:
        SluiceError: the batch does not fit the network.
    """
    from sluice.runtime.targets import make_runner

    runner, feeds = make_runner("ort-cpu"), next(slices(batches, wide))
    return relative_error(runner.build(emulated(narrow)).run(feeds), runner.build(wide).run(feeds))
