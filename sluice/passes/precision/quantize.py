"""INT8: a network with pairs of ``QuantizeLinear`` and ``DequantizeLinear``. numpy and onnx only.

    q = clip(round(x / s) + z),    x ~ s (q - z)

1. Batch norms are folded first.
2. Weights are int8 with one scale per output channel, ``s = max|w| / 127`` and ``z = 0``, in front of
   ``DequantizeLinear``; ``s = max|w| / 64`` with a reduced range, for processors that add products in 16 bits
   (`sluice.runtime.ort.saturation`). Biases stay fp32.
3. Activations have one scale per tensor. For TensorRT they are int8 with ``s = max|x| / 127``, ``z = 0``. For ONNX
   Runtime they are uint8, with ``z = 128`` and the same scale, or ``z = 0`` and ``s = max|x| / 255`` where nothing is
   negative. Which of them have a pair is said in `sluice.passes.precision.qdq_placement`.
4. An operator that only moves numbers has one scale before and behind.
5. For ONNX Runtime, ``Gemm`` leaves its bias to an ``Add``, and the bias behind ``MatMul`` becomes a row (1, N), which
   it does not fuse into a ``Gemm``: one with a bias and floating-point results is computed in fp32, twice as slowly as
   before quantisation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_graph import attributes
from sluice.passes.precision.fold import fold_batch_norms, remove_unused
from sluice.passes.precision.qdq_placement import Pairs, dialect_of

__all__ = ["REDUCED_STEPS", "STEPS", "quantize", "tensors_to_calibrate"]

# Without ranges, and for a tensor or channel of zeros, which may have any.
ANY_RANGE = 1.0
STEPS, REDUCED_STEPS = 127, 64
# A smaller scale has fewer digits, or is zero.
LEAST_SCALE = np.finfo(np.float32).tiny


def quantize(
    model: onnx.ModelProto,
    *,
    ranges: Mapping[str, float] | None = None,
    part: bool = False,
    target: str = "ort-cpu",
    exclude: Collection[str] = (),
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """An fp32 network with pairs; the arguments are those of `sluice.passes.precision.to_precision.to_precision`.

    Raises:
        SluiceError: ``exclude`` names no layer, or ``ranges`` lack a tensor.
    """
    done = fold_batch_norms(model)
    _Quantizer(done, Pairs(done, dialect_of(target), exclude), ranges, reduce_range).rewrite(part)
    remove_unused(done.graph)
    onnx.checker.check_model(done, full_check=True)
    return done


def tensors_to_calibrate(
    model: onnx.ModelProto, *, target: str = "ort-cpu", exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """The tensors whose ranges `quantize` needs; names of ``model`` with its batch norms folded."""
    pairs = Pairs(fold_batch_norms(model), dialect_of(target), exclude)
    return tuple(sorted({pairs.origin(name) for name in pairs.tensors()}))


class _Quantizer:
    """Rewrites the graph that ``pairs`` has read."""

    def __init__(self, model: onnx.ModelProto, pairs: Pairs, ranges: Mapping[str, float] | None, reduced: bool):
        self.graph, self.pairs, self.ranges = model.graph, pairs, ranges
        self.steps = REDUCED_STEPS if reduced else STEPS
        self.dialect = pairs.dialect
        self.integer = TensorProto.UINT8 if self.dialect.unsigned else TensorProto.INT8
        self.added: set[str] = set()
        self.amplitudes: dict[str, float] = {}

    def rewrite(self, part: bool) -> None:
        chosen = self.pairs.tensors(part=part)
        # ``pairs`` reads the names that are changed below.
        self.amplitudes = {name: self.amplitude(name) for name in sorted(chosen)}
        outputs = {info.name: info for info in self.graph.output if part}
        nodes: list[onnx.NodeProto] = []
        renamed: dict[str, str] = {}
        for info in self.graph.input:
            if info.name not in chosen:
                continue
            name, quantised = info.name, f"{info.name}:quantized"
            renamed[name] = f"{name}:dequantized"
            if part:
                info.type.tensor_type.elem_type = self.integer
                quantised = name
            else:
                nodes.append(self.half("QuantizeLinear", name, name, quantised))
            nodes.append(self.half("DequantizeLinear", name, quantised, renamed[name]))
        for node in list(self.graph.node):
            layer = self.pairs.is_quantised(node)
            if layer:
                self.quantize_weight(node, nodes)
            node.input[:] = [renamed.get(name, name) for name in node.input]
            nodes.append(node)
            if layer and self.dialect.separate_bias:
                node = self.separate_bias(node, nodes)
            for index, name in enumerate(node.output):
                if name not in chosen:
                    continue
                # The name goes to the dequantised value, so that its readers stay as they are.
                node.output[index] = f"{name}:float"
                quantised, dequantised = f"{name}:quantized", name
                if name in outputs:
                    outputs[name].type.tensor_type.elem_type = self.integer
                    quantised, dequantised = name, f"{name}:dequantized"
                    renamed[name] = dequantised
                nodes.append(self.half("QuantizeLinear", name, f"{name}:float", quantised))
                if name not in outputs or name in self.pairs.readers:
                    nodes.append(self.half("DequantizeLinear", name, quantised, dequantised))
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def half(self, op_type: str, tensor: str, source: str, target: str) -> onnx.NodeProto:
        """One half of the pair of ``tensor``."""
        steps, zero = 127, 0
        if self.dialect.unsigned:
            steps, zero = (255, 0) if tensor in self.pairs.nonnegative else (127, 128)
        operands = [
            self.put(f"{tensor}:scale", np.array(max(self.amplitudes[tensor] / steps, LEAST_SCALE), np.float32)),
            self.put(f"{tensor}:zero", np.array(zero, helper.tensor_dtype_to_np_dtype(self.integer))),
        ]
        return helper.make_node(op_type, [source, *operands], [target])

    def amplitude(self, tensor: str) -> float:
        tensor = self.pairs.origin(tensor)
        if self.ranges is not None and tensor not in self.ranges:
            raise SluiceError(f"ranges lack tensor {tensor!r}; take them from calibration batches of this very network")
        found = ANY_RANGE if self.ranges is None else self.ranges[tensor]
        return min(found, self.pairs.bound(tensor)) or ANY_RANGE

    def quantize_weight(self, layer: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
        """Rule 2."""
        name = layer.input[1]
        transposed = layer.op_type == "Gemm" and attributes(layer).get("transB", 0)
        axis = 0 if layer.op_type == "Conv" or transposed else 1  # of the output channels
        base = f"{name}:int8:{axis}"
        layer.input[1] = f"{base}:dequantized"
        if base in self.added:
            return
        weight = numpy_helper.to_array(self.pairs.initial[name])
        others = tuple(d for d in range(weight.ndim) if d != axis)
        amplitudes = np.abs(weight).max(axis=others)
        scale = np.maximum(np.where(amplitudes > 0, amplitudes, ANY_RANGE) / self.steps, LEAST_SCALE).astype(np.float32)
        along = scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        operands = [
            self.put(base, np.clip(np.rint(weight / along), -self.steps, self.steps).astype(np.int8)),
            self.put(f"{base}:scale", scale),
            self.put(f"{base}:zero", np.zeros(scale.shape, np.int8)),
        ]
        nodes.append(helper.make_node("DequantizeLinear", operands, [layer.input[1]], axis=axis))

    def separate_bias(self, layer: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
        """Rule 5; the operator that makes the layer's output then."""
        out = layer.output[0]
        if layer.op_type == "Gemm" and len(layer.input) > 2 and attributes(layer).get("beta", 1.0) == 1.0:
            nodes.append(helper.make_node("Add", [f"{out}:product", layer.input.pop()], [out]))
            layer.output[0] = f"{out}:product"
            return nodes[-1]
        users = self.pairs.readers.get(out, [])
        if layer.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add":
            for index, name in enumerate(users[0].input):
                bias = self.pairs.initial.get(name)
                if bias is not None and len(bias.dims) == 1:
                    users[0].input[index] = self.put(f"{name}:row", numpy_helper.to_array(bias)[None])
        return layer

    def put(self, name: str, array: np.ndarray) -> str:
        """A new initialiser, once; its name."""
        if name not in self.added:
            self.added.add(name)
            self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name
