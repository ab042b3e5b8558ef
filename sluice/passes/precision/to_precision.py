"""Fp32 networks rewritten for the precision of their deployment. numpy and onnx only.

``fp32``: the network as it is; for ONNX Runtime on the CPU with sums that are not fused with layer norms
(`sluice.passes.precision.plain_sums`), and with one thread one axis as a row (`sluice.passes.precision.lines_as_rows`),
padded where that is faster (`sluice.passes.precision.padded_lines`), and attention as one operator where it is marked
(`sluice.passes.precision.flat_attention`).
``fp16``, ``bf16``: strongly typed in 16 bits (`sluice.passes.precision.half`). A GRU in bf16 is refused for TensorRT,
whose parser mixes its gates with float32; a float32 GRU between casts does not build where two follow each other.
``int8``: pairs of ``QuantizeLinear`` and ``DequantizeLinear`` around fp32 operators
(`sluice.passes.precision.quantize`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import checker, shape_inference, version_converter

from sluice.core.deployment import check_precision
from sluice.core.errors import SluiceError, first_line
from sluice.passes.graph.onnx_file import without_defaults
from sluice.passes.precision.flat_attention import with_flat_attention
from sluice.passes.precision.half import LEAST_OPSET, at_opset, to_half
from sluice.passes.precision.lines_as_rows import with_lines_as_rows
from sluice.passes.precision.padded_lines import with_padded_lines
from sluice.passes.precision.plain_sums import with_plain_sums
from sluice.passes.precision.quantize import quantize

__all__ = ["to_precision"]


def to_precision(
    model: onnx.ModelProto,
    precision: str,
    *,
    part: bool = False,
    ranges: Mapping[str, float] | None = None,
    target: str = "ort-cpu",
    exclude: Collection[str] = (),
    threads: int = 1,
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """An fp32 network as it is deployed in ``precision``.

    Args:
        part: the network is a piece, whose borders have the types of inner tensors.
        ranges: for int8, the largest absolute value by tensor (`sluice.artifacts.calibration_ranges`); without them
            every scale is the same arbitrary constant, enough for timing, since latency does not depend on scales.
        target: the runtime of the file; it decides on the form of int8 (`sluice.passes.precision.qdq_placement`).
        exclude: for int8, layers that stay float: names or shell patterns of modules or of their weights.
        reduce_range: for int8, weights have 7 bits, for processors that add products in 16.
        threads: of the runtime; one decides on the form of 1-D layers and paddings.
    Raises:
        SluiceError: there is no such precision, or the network cannot be written in it.
    """
    check_precision(precision)
    model = without_defaults(model)
    if precision == "fp32":
        if target != "ort-cpu":
            return model
        model = with_plain_sums(model)
        if threads != 1:
            return model
        return with_padded_lines(with_lines_as_rows(with_flat_attention(model), part=part))
    try:
        if precision == "int8":
            model = at_opset(model, LEAST_OPSET)
            return quantize(model, ranges=ranges, part=part, target=target, exclude=exclude, reduce_range=reduce_range)
        gru = next((node for node in model.graph.node if node.op_type == "GRU"), None)
        if gru is not None and (precision, target) == ("bf16", "tensorrt"):
            raise SluiceError(f"TensorRT takes no GRU ({gru.name or gru.output[0]}) in bf16; choose fp16 or fp32")
        return to_half(model, precision, part=part)
    except (checker.ValidationError, shape_inference.InferenceError, version_converter.ConvertError) as error:
        reason = first_line(error).rstrip(": ")
        raise SluiceError(
            f"the network cannot be written in {precision}: {reason}; check the fp32 file with onnx.checker, export it "
            f"anew with a recent opset, or choose another precision"
        ) from error
